"""Options of an AGOP run, checked once, with one line for whatever is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mmc_fast.errors import InputError

__all__ = ["Options", "resolve_blocks"]

_BACKENDS = ("auto", "cpp", "triton", "cuda", "eager")
_PRECISIONS = {
    "float64": torch.float64, "fp64": torch.float64, torch.float64: torch.float64,
    "float32": torch.float32, "fp32": torch.float32, torch.float32: torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, torch.bfloat16: torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What an accumulator was asked for; the meaning of each is in ``agop``."""

    layer: int | str
    output: str
    center: bool
    reduction: str
    probes: int | None
    precision: str | torch.dtype | None
    backend: str
    chunk_size: int | None
    input_cov: bool
    memory_budget: int
    seed: int

    def __post_init__(self) -> None:
        _one_of("output", self.output, ("logits", "probs"))
        _one_of("reduction", self.reduction, ("sum", "mean"))
        _one_of("backend", self.backend, _BACKENDS)
        if self.precision is not None and self.precision not in _PRECISIONS:
            raise InputError(
                f"agop: precision={self.precision!r}; allowed are None (the head's dtype), 'float64', 'float32', 'bf16'"
            )
        _whole("probes", self.probes, optional=True)
        _whole("chunk_size", self.chunk_size, optional=True)
        _whole("memory_budget", self.memory_budget, optional=False)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise InputError(f"agop: seed={self.seed!r}; pass an integer")

    def compute_dtype(self, head_dtype: torch.dtype) -> torch.dtype:
        """Precision of the forward pass: at least float32, whatever the rows of deep heads are rounded to."""
        asked = _PRECISIONS[self.precision] if self.precision is not None else head_dtype
        if not asked.is_floating_point:
            raise InputError(f"agop: the head's weights are {asked}; a floating dtype is needed")
        if asked == torch.bfloat16:
            return torch.float64 if head_dtype == torch.float64 else torch.float32
        return torch.float64 if asked == torch.float64 else torch.float32

    def row_dtype(self, head_dtype: torch.dtype) -> torch.dtype:
        """Precision of the products of Jacobian rows."""
        if self.precision is not None and _PRECISIONS[self.precision] == torch.bfloat16:
            return torch.bfloat16
        return self.compute_dtype(head_dtype)

    def meaning(self) -> tuple[object, ...]:
        """The options that give accumulated numbers their meaning (not speed, not the final division)."""
        precision = None if self.precision is None else str(_PRECISIONS[self.precision])
        return (self.layer, self.output, self.center, self.probes, precision, self.input_cov)

    def check_autograd(self) -> None:
        """Refuse what the vector-Jacobian path cannot do."""
        if self.backend not in ("auto", "eager"):
            raise RuntimeError(
                f"agop: backend={self.backend!r} has no kernel for heads other than Linear layers and elementwise "
                "activations; use backend='eager' or 'auto'"
            )
        if self.precision is not None and _PRECISIONS[self.precision] == torch.bfloat16:
            raise InputError(
                "agop: precision='bf16' is for chains of Linear layers; give this head in bfloat16 instead"
            )


def resolve_blocks(blocks: Mapping[str, int] | Sequence[int] | None, width: int) -> dict[str, int]:
    """Name -> width of the modality blocks, which must add up to the layer's input; one block by default."""
    if blocks is None:
        return {"input": width}
    named = dict(blocks) if isinstance(blocks, Mapping) else {str(i): size for i, size in enumerate(blocks)}
    for name, size in named.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise InputError(f"agop: block {name!r} has width {size!r}; pass whole numbers >= 0")
    if sum(named.values()) != width:
        raise InputError(
            f"agop: the blocks {named} add up to {sum(named.values())} but the layer's input has width {width}"
        )
    return named


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"agop: {name}={value!r}; allowed are {', '.join(map(repr, allowed))}")


def _whole(name: str, value: object, optional: bool) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"agop: {name}={value!r}; pass an integer >= 1{' or None' if optional else ''}")
