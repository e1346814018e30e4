"""Tile sizes, warps and stages of every kernel as shipped, and how products of float32 may be rounded.

One table per op. A key holds what changes the best choice on one machine (the kind of product, a class of widths) and
never the batch size: a batch of another size must not compile, nor tune, anew.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = [
    "AGOP",
    "EBR_NARROW",
    "EBR_WIDE",
    "Config",
    "NarrowTile",
    "WideTile",
    "ebr_narrow_tile",
    "ebr_wide_tile",
    "input_precision",
    "product_kind",
    "splits",
]

PROGRAMS = 264  # about two per multiprocessor of an H100; fewer tiles than this are split along the samples


class Config(NamedTuple):
    """``blocks``: the constexpr tile sizes by name; then warps per program and stages of the software pipeline."""

    blocks: dict[str, int]
    warps: int
    stages: int

    @property
    def launch(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**self.blocks, "num_warps": self.warps, "num_stages": self.stages}


# kernel -> kind of product (see product_kind) -> config
AGOP: dict[str, dict[str, Config]] = {
    "hidden": {
        "ieee": Config({"BLOCK_H": 64, "BLOCK_N": 64, "BLOCK_K": 32}, 4, 2),
        "tf32": Config({"BLOCK_H": 128, "BLOCK_N": 128, "BLOCK_K": 32}, 8, 3),
        "half": Config({"BLOCK_H": 128, "BLOCK_N": 128, "BLOCK_K": 64}, 8, 3),
    },
    "coactivation": {
        "int8": Config({"BLOCK_H": 64, "BLOCK_N": 128}, 4, 3),
    },
    "gram": {
        "ieee": Config({"BLOCK_H": 64, "BLOCK_R": 16}, 8, 2),
        "tf32": Config({"BLOCK_H": 64, "BLOCK_R": 32}, 8, 3),
        "half": Config({"BLOCK_H": 64, "BLOCK_R": 64}, 8, 3),
    },
    "fold": {"all": Config({"BLOCK": 256}, 4, 2)},
    "chain": {
        "ieee": Config({"BLOCK_H": 64, "BLOCK_R": 32, "BLOCK_K": 16}, 8, 2),
        "tf32": Config({"BLOCK_H": 64, "BLOCK_R": 64, "BLOCK_K": 32}, 8, 2),
        "half": Config({"BLOCK_H": 64, "BLOCK_R": 64, "BLOCK_K": 32}, 8, 2),
    },
    "rows": {
        "ieee": Config({"BLOCK_H": 64, "BLOCK_R": 64, "BLOCK_K": 32}, 4, 2),
        "tf32": Config({"BLOCK_H": 128, "BLOCK_R": 64, "BLOCK_K": 32}, 8, 3),
        "half": Config({"BLOCK_H": 128, "BLOCK_R": 64, "BLOCK_K": 64}, 8, 3),
    },
}


def input_precision() -> str:
    """``"ieee"``, or ``"tf32"`` where ``torch.get_float32_matmul_precision()`` allows it."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def product_kind(dtype: torch.dtype) -> str:
    """Key of the tables: ``"half"`` for 16-bit operands, else the precision that float32 products may have."""
    return input_precision() if dtype == torch.float32 else "half"


def splits(tiles: int, rows: int, smallest: int) -> int:
    """Into how many parts to cut ``rows``, so that ``tiles`` of each fill the machine; at least ``smallest`` rows each."""
    return max(1, min(-(-PROGRAMS // max(1, tiles)), rows // smallest))


class NarrowTile(NamedTuple):
    """Rows, hidden units and feature columns of a step of the narrow EBR kernels.

    ``depth``: of a product over latents or units of the discriminator, at most. ``weights``: backward of rows and of
    weights in two launches, this the tile of the second; together they would spill.
    """

    rows: int
    hidden: int
    features: int
    depth: int = 128
    warps: int = 8
    stages: int = 1
    registers: int = 255  # to a thread at most: left to itself, ptxas spills to run one block more
    weights: NarrowTile | None = None


# (operands, direction); float32 without TF32 runs on the plain arithmetic units and wants small tiles, and wide latents too
EBR_NARROW = {
    ("16 bit", "forward"): NarrowTile(64, 64, 128, stages=2),
    ("16 bit", "backward"): NarrowTile(32, 32, 64),
    ("16 bit, latent above 64", "forward"): NarrowTile(32, 64, 64, stages=2),
    ("16 bit, latent above 64", "backward"): NarrowTile(16, 32, 64, depth=64),
    ("tf32", "forward"): NarrowTile(32, 32, 64),
    ("tf32", "backward"): NarrowTile(32, 32, 64, weights=NarrowTile(16, 32, 64)),
    ("tf32", "backward of a source"): NarrowTile(16, 32, 64, weights=NarrowTile(16, 32, 64)),
    ("tf32, latent above 64", "forward"): NarrowTile(32, 32, 64, depth=64),
    ("tf32, latent above 64", "backward"): NarrowTile(16, 32, 64, weights=NarrowTile(16, 32, 64, depth=64)),
    ("ieee", "forward"): NarrowTile(16, 32, 32, depth=32),
    ("ieee", "backward"): NarrowTile(16, 16, 32, depth=32),
    ("ieee", "backward of a source"): NarrowTile(16, 16, 16, depth=32),
    ("ieee, latent above 64", "forward"): NarrowTile(16, 32, 32, depth=32),
    ("ieee, latent above 64", "backward"): NarrowTile(16, 16, 32, depth=16),
    ("ieee, latent above 64", "backward of a source"): NarrowTile(16, 16, 16, depth=32),
}


def ebr_narrow_tile(
    dtype: torch.dtype, direction: str, precision: str, latent: int, d_source: bool = False
) -> NarrowTile:
    """The shipped tile for a 16-bit type, or float32 at this precision, and this width of the latent."""
    operands = precision if dtype == torch.float32 else "16 bit"
    if latent > 64:
        operands += ", latent above 64"
    usual = EBR_NARROW[operands, direction]
    return EBR_NARROW.get((operands, f"{direction} of a source"), usual) if d_source else usual


class WideTile(NamedTuple):
    """Tile of a grouped product, and rows, units and depth of the launch that ends the discriminator."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    loss_rows: int
    loss_units: int
    loss_depth: int
    loss_warps: int
    registers: int  # to a thread at most: left to itself, ptxas spills a few bytes to run one block more


EBR_WIDE = {
    "16 bit": WideTile(64, 128, 64, 8, 3, 32, 128, 64, 8, 208),
    "tf32": WideTile(64, 64, 32, 4, 3, 16, 128, 32, 8, 200),
    "ieee": WideTile(64, 64, 16, 8, 2, 16, 64, 16, 8, 208),
}


def ebr_wide_tile(dtype: torch.dtype, precision: str) -> WideTile:
    """The shipped tile for float32 at this precision, or for a 16-bit type."""
    return EBR_WIDE[precision if dtype == torch.float32 else "16 bit"]
