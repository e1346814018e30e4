"""Shipped tiles of the Triton kernels, one small table an op.

A key holds what changes the code of a kernel (data type, precision, direction), never the batch size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["EBR_NARROW", "EBR_WIDE", "NarrowTile", "WideTile", "ebr_narrow_tile", "ebr_wide_tile"]


class NarrowTile(NamedTuple):
    """Rows, hidden units and feature columns of a step of the narrow EBR kernels."""

    rows: int
    hidden: int
    features: int
    warps: int
    stages: int


# (operands, direction); float32 without TF32 runs on the plain arithmetic units and wants small tiles
EBR_NARROW = {
    ("16 bit", "forward"): NarrowTile(64, 64, 128, 8, 2),
    ("16 bit", "backward"): NarrowTile(32, 32, 64, 8, 1),
    ("tf32", "forward"): NarrowTile(32, 32, 64, 8, 2),
    ("tf32", "backward"): NarrowTile(32, 32, 64, 8, 1),
    ("ieee", "forward"): NarrowTile(32, 32, 32, 8, 1),
    ("ieee", "backward"): NarrowTile(16, 32, 16, 8, 1),
}


def ebr_narrow_tile(dtype: torch.dtype, direction: str, precision: str) -> NarrowTile:
    """The shipped tile for float32 at this precision, or for a 16-bit type."""
    return EBR_NARROW[precision if dtype == torch.float32 else "16 bit", direction]


class WideTile(NamedTuple):
    """Tile of a grouped product, and rows and depth of the launch that ends the discriminator."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    loss_rows: int
    loss_depth: int
    loss_warps: int
    registers: int  # to a thread at most: left to itself, ptxas spills a few bytes to run one block more


EBR_WIDE = {
    "16 bit": WideTile(64, 128, 64, 8, 3, 32, 64, 8, 208),
    "tf32": WideTile(64, 64, 32, 4, 3, 16, 32, 8, 200),
    "ieee": WideTile(64, 64, 16, 8, 2, 16, 16, 8, 208),
}


def ebr_wide_tile(dtype: torch.dtype, precision: str) -> WideTile:
    """The shipped tile for float32 at this precision, or for a 16-bit type."""
    return EBR_WIDE[precision if dtype == torch.float32 else "16 bit"]
