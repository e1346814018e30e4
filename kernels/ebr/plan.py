"""What an EBR launch needs to know before it starts: tiles, sizes, and the call's tensors as kernels take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..common import DTYPES, Tile, input_precision, triton_version

__all__ = ["TILES", "Inputs", "Needs", "Sizes", "Upstream", "unsupported"]

MOST_MODALITIES = 64

# kind of product (common.product_kind) -> tiles of the grouped products and of the end of the discriminator. A key never
# holds the batch size: a batch of another size must not be tuned anew.
TILES = {
    "half": {
        "product": Tile({"BM": 64, "BN": 128, "BK": 64}, 8, 3, 208),
        "loss": Tile({"BM": 32, "BP": 128, "BK": 64}, 8, 3, 208),
    },
    "tf32": {
        "product": Tile({"BM": 64, "BN": 64, "BK": 32}, 4, 3, 200),
        "loss": Tile({"BM": 16, "BP": 128, "BK": 32}, 8, 3, 200),
    },
    "ieee": {
        "product": Tile({"BM": 64, "BN": 64, "BK": 16}, 8, 2, 208),
        "loss": Tile({"BM": 16, "BP": 64, "BK": 16}, 8, 2, 208),
    },
}


@dataclass(frozen=True)
class Sizes:
    """Widths of one EBR head; ``psi`` starts with the latent width and ends with m."""

    m: int
    dims: tuple[int, ...]
    hidden: int
    psi: tuple[int, ...]

    @staticmethod
    def of(features: Sequence[Tensor], params: Sequence[Tensor]) -> Sizes:
        m = len(features)
        discriminator = params[8 * m :]
        psi = (discriminator[0].shape[1], *(w.shape[0] for w in discriminator[0::2]))
        return Sizes(m, tuple(f.shape[1] for f in features), params[0].shape[0], psi)

    @property
    def latent(self) -> int:
        return self.psi[0]


def _rounded_to_tf32(like: Tensor) -> bool:
    """Whether this compiler rounds float32 operands on this device although IEEE is asked for."""
    if like.device.type != "cuda" or like.dtype != torch.float32 or input_precision() != "ieee":
        return False
    return triton_version() < (3, 9) and torch.cuda.get_device_capability(like.device)[0] == 10


def unsupported(features: Sequence[Tensor], params: Sequence[Tensor]) -> str | None:
    """Say which size the kernels cannot run, None where they can."""
    m, dtype = len(features), features[0].dtype
    if _rounded_to_tf32(features[0]):
        return (
            f"Triton {triton.__version__} compiles some IEEE float32 products to TF32 for compute capability 10; install "
            "Triton 3.9 or newer, or allow TF32 with torch.set_float32_matmul_precision('high')"
        )
    if dtype not in DTYPES:
        return f"the kernels compute in float32, bfloat16 and float16 and features[0] is {dtype}"
    if m > MOST_MODALITIES:
        return f"the kernels take at most {MOST_MODALITIES} modalities and got {m}"
    for i in range(2 * m):
        if params[4 * i].shape[0] != params[0].shape[0]:
            return "the kernels need one hidden width for all encoders and decoders"
    sizes = Sizes.of(features, params)
    if 0 in (*sizes.dims, *sizes.psi, sizes.hidden):
        return "the kernels need widths of at least 1"
    return None


@dataclass(frozen=True)
class Inputs:
    """Tensors of a call, with their strides, and the flags that shape it."""

    features: tuple[Tensor, ...]
    params: tuple[Tensor, ...]
    sizes: Sizes
    present: Tensor | None
    source: Tensor | None
    normalizer: Tensor | None
    residual: bool
    normalize: bool

    @staticmethod
    def of(features, params, present, source, normalizer, residual: bool, normalize: bool) -> Inputs:
        params = tuple(p.contiguous() for p in params)  # nn.Linear holds them so; a copy is only made of others
        if present is not None:
            present = present.view(torch.uint8)
        return Inputs(
            tuple(features), params, Sizes.of(features, params), present, source, normalizer, residual, normalize
        )

    @property
    def batch(self) -> int:
        return self.features[0].shape[0]

    def column(self, kind: int) -> tuple[Tensor, ...]:
        """One tensor a modality: 0-3 encoder ``W₁ b₁ W₂ b₂``, 4-7 decoder."""
        base, m = (kind // 4) * 4 * self.sizes.m, self.sizes.m
        return tuple(self.params[base + 4 * i + kind % 4] for i in range(m))

    @property
    def psi(self) -> tuple[Tensor, ...]:
        return self.params[8 * self.sizes.m :]

    @property
    def strided_features(self) -> tuple[tuple, tuple[int, ...], tuple[int, ...]]:
        """As kernels take them: tensors, strides of rows, strides of columns."""
        return strided(self.features)

    @property
    def mask(self) -> tuple[Tensor | None, int, int]:
        """``present`` and its strides."""
        return (None, 0, 0) if self.present is None else (self.present, *self.present.stride())

    @property
    def routing(self) -> tuple[Tensor | None, int, int, int]:
        """``source`` and its strides: None, int64 ``[B, m]`` or float ``[B, m, m]``."""
        if self.source is None:
            return None, 0, 0, 0
        return (self.source, *(*self.source.stride(), 0)[:3])

    @property
    def denominators(self) -> tuple[Tensor | None, int]:
        """``normalizer`` and the distance to its last value."""
        n = None if self.normalizer is None else self.normalizer.reshape(-1)
        return (None, 0) if n is None else (n, (n.numel() - 1) * n.stride(0))


def strided(matrices: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[int, ...]]:
    """Matrices, strides of their rows, strides of their columns."""
    return tuple(matrices), tuple(t.stride(0) for t in matrices), tuple(t.stride(1) for t in matrices)


class Needs(NamedTuple):
    """Which gradients are wanted of a backward: of some feature, of the source, of some parameter."""

    features: bool
    source: bool
    params: bool


@dataclass(frozen=True)
class Upstream:
    """Gradients of what forward returned, None where there is none."""

    recovered: tuple[Tensor | None, ...]
    latents: Tensor | None
    discrimination: Tensor | None
    reconstruction: Tensor | None

    def given(self, inputs: Inputs) -> tuple:
        """Those of ``recovered`` with strides, stand-ins where there is none, and which of them are real."""
        held = [f if d is None else d for d, f in zip(self.recovered, inputs.features, strict=True)]
        return (*strided(held), tuple(int(d is not None) for d in self.recovered))

    def losses(self, inputs: Inputs, counts: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The denominators, and the gradients of the two losses; with one modality the first has none."""
        return counts, self.discrimination if inputs.sizes.m > 1 else None, self.reconstruction

    @property
    def strided_latents(self) -> tuple[Tensor | None, int, int, int]:
        return (None, 0, 0, 0) if self.latents is None else (self.latents, *self.latents.stride())
