"""What an EBR launch needs to know before it starts: sizes, options as kernel constants, dummies for what is absent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Inputs", "Needs", "Sizes", "Upstream", "float_precision", "index_type", "padded", "unsupported"]

NARROW_LATENT = 128  # widest latent of the narrow path
NARROW_FEATURE = 512  # widest feature: a program computes hidden units again for each block of it
NARROW_PSI = 64  # widest hidden layer of the discriminator there; at most one
MOST_MODALITIES = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def padded(width: int) -> int:
    """The next power of two that a matrix unit takes."""
    return max(16, triton.next_power_of_2(width))


def float_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: TF32 only where torch's global setting allows it."""
    allowed = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"


def index_type(tensors: Sequence[Tensor]) -> tl.dtype:
    """The integer type of offsets: 32 bits where every element of every tensor is in their reach, else 64.

    Half the registers for addresses, which is what decides whether the backward of the narrow path spills.
    """
    reach = [sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) for t in tensors]
    return tl.int32 if max(reach) < 2**31 - 2**24 else tl.int64


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

    def narrow(self, dtype: torch.dtype) -> bool:
        """Whether one program can hold a row tile of every width at once, in its registers."""
        hidden = self.psi[1:-1]
        spills = dtype == torch.float32 and _triton_version() > (3, 7)  # tiles of latents above 64, compiled by 3.9
        return (
            self.latent <= (min(64, NARROW_LATENT) if spills else NARROW_LATENT)
            and max(self.dims) <= NARROW_FEATURE
            and len(hidden) <= 1
            and all(p <= NARROW_PSI for p in hidden)
        )


def _triton_version() -> tuple[int, ...]:
    return tuple(map(int, triton.__version__.split(".")[:2]))


def _rounded_to_tf32(like: Tensor) -> bool:
    """Whether this compiler rounds float32 operands on this device although IEEE is asked for."""
    if like.device.type != "cuda" or like.dtype != torch.float32 or float_precision(like.dtype) != "ieee":
        return False
    return _triton_version() < (3, 9) and torch.cuda.get_device_capability(like.device)[0] == 10


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
    """Tensors of a call as kernels take them, with strides, and the flags that say what is real."""

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
    def strides_x(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(f.stride(0) for f in self.features), tuple(f.stride(1) for f in self.features)

    @property
    def masks(self) -> list[Tensor]:
        """``present`` and ``source``, where given."""
        return [t for t in (self.present, self.source) if t is not None]

    @property
    def mask_arguments(self) -> dict[str, object]:
        """``present`` and ``source`` with strides, stand-ins where they are None, and the constants that say so."""
        like = self.features[0]
        p, s = self.present, self.source
        kind = 0 if s is None else (2 if s.is_floating_point() else 1)
        return {
            "present": like if p is None else p,
            "stride_pb": 0 if p is None else p.stride(0),
            "stride_pm": 0 if p is None else p.stride(1),
            "HAS_PRESENT": p is not None,
            "source": like if s is None else s,
            "stride_sb": 0 if s is None else s.stride(0),
            "stride_si": 0 if s is None else s.stride(1),
            "stride_sj": s.stride(2) if s is not None and kind == 2 else 0,
            "SOURCE": kind,
        }

    @property
    def normalizer_arguments(self) -> dict[str, object]:
        n = self.normalizer
        return {
            "normalizer": self.features[0] if n is None else n.reshape(-1),
            "second": 0 if n is None else (n.numel() - 1) * n.reshape(-1).stride(0),
            "HAS_NORMALIZER": n is not None,
        }


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

    def given(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Those of ``recovered``, stand-ins where there is none."""
        return tuple(f if d is None else d for d, f in zip(self.recovered, inputs.features, strict=True))

    def arguments(self, inputs: Inputs, latents: Tensor, counts: Tensor) -> dict[str, object]:
        """Everything but ``given`` as a kernel takes it, stand-ins for what is absent, and the constants that say so."""
        given, d = self.given(inputs), self.latents
        stride_lm, stride_lb, stride_lk = (0, 0, 0) if d is None else d.stride()
        return {
            "has_grad": tuple(int(t is not None) for t in self.recovered),
            "stride_db": tuple(t.stride(0) for t in given),
            "stride_dd": tuple(t.stride(1) for t in given),
            "d_latents": latents if d is None else d,
            "stride_lm": stride_lm,
            "stride_lb": stride_lb,
            "stride_lk": stride_lk,
            "d_md": counts if self.discrimination is None else self.discrimination,
            "d_rec": counts if self.reconstruction is None else self.reconstruction,
            "MD_LOSS": self.discrimination is not None and inputs.sizes.m > 1,
            "REC_LOSS": self.reconstruction is not None,
            "HAS_D_LATENTS": d is not None,
        }
