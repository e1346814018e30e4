"""The ways to sum ``JᵀJ``: exact counts, derivative Gram, Jacobian rows, autograd. One class each, one interface."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mmc_fast.errors import InputError
from mmc_fast.ops.agop import op as primitives
from mmc_fast.ops.dispatch import choose

from .autograd import OpaqueRunner
from .finish import Factored, count_panel
from .gram import shifted_derivative_gram
from .head import Affine
from .probes import ProbeSums
from .rows import RowChain, collapse, forward_chain, step
from .state import CountState, MomentState

__all__ = [
    "AutogradMethod",
    "ConstantMethod",
    "CountMethod",
    "Method",
    "RowMethod",
    "SmoothMethod",
    "choose_chain_method",
]

_SHIFT_ROWS = 1024


class Method(Protocol):
    """What an accumulator asks of a way to sum: states that merge, and the factors of G in the end."""

    name: str
    primitive: str | None  # the op that takes most of the time, if it is one of ours
    backend: str | None  # what ran last
    whole_batches: bool  # update() cuts its input into chunks itself

    def states(self) -> list[CountState | MomentState | ProbeSums]: ...
    def unshare(self) -> None: ...
    def floats_per_sample(self) -> int: ...
    def update(self, u: Tensor, nonfinite: Tensor, chunk_rows: int) -> None: ...
    def factored(self, n: int, scale: float) -> Factored: ...
    def halves(self, n: int, scale: float) -> list[Factored] | None: ...


class _Base:
    primitive: str | None = None
    backend: str | None = None
    whole_batches = False

    def halves(self, n: int, scale: float) -> list[Factored] | None:
        return None


class ConstantMethod(_Base):
    """No activation after the layer: the same Jacobian ``P`` for every sample, ``G = N PᵀP``, zero about the mean."""

    name = "constant"

    def __init__(self, p: Tensor, center: bool) -> None:
        self._p, self._center = p, center
        self.backend = "eager"

    def states(self) -> list[CountState | MomentState | ProbeSums]:
        return []

    def unshare(self) -> None:
        pass

    def floats_per_sample(self) -> int:
        return self._p.shape[1]

    def update(self, u: Tensor, nonfinite: Tensor, chunk_rows: int) -> None:
        step(u, Affine(self._p, None, None), nonfinite)

    def factored(self, n: int, scale: float) -> Factored:
        p, width = self._p, self._p.shape[0]
        repeated = 0.0 if self._center else float(n)
        return Factored(
            width,
            lambda start, stop: repeated * torch.eye(width, dtype=torch.float64, device=p.device)[start:stop, start:],
            None, p, scale, p.dtype, p.device,
        )  # fmt: skip


class CountMethod(_Base):
    """One (leaky) ReLU left: integer co-activation counts, ``S = (VᵀV) ∘ AᵀA``."""

    name = "co-activation counts"
    primitive: str | None = "relu_coactivation_update"
    whole_batches = True

    def __init__(self, chain: list[Affine], p: Tensor, v: Tensor, center: bool, backend: str) -> None:
        self._lead, self._affine = _split_at_activation(chain)
        self._p, self._v, self._center, self._request = p, v, center, backend
        activation = self._affine.activation
        self._slope = activation.alpha if activation is not None and activation.kind == "leaky_relu" else 0.0
        self._state = CountState(p.shape[0], p.device)

    def states(self) -> list[CountState | MomentState | ProbeSums]:
        return [self._state]

    def unshare(self) -> None:
        self._state = self._state.detach_copy()

    def floats_per_sample(self) -> int:
        return self._affine.weight.shape[1] + 3 * self._affine.weight.shape[0]

    def update(self, u: Tensor, nonfinite: Tensor, chunk_rows: int) -> None:
        for affine in self._lead:
            u, _ = step(u, affine, nonfinite)
        self.backend = primitives.relu_coactivation_update(
            u, self._affine.weight, self._affine.bias, self._state.counts, nonfinite,
            chunk_rows=chunk_rows, backend=self._request,
        )  # fmt: skip

    def factored(self, n: int, scale: float) -> Factored:
        panel = count_panel(self._state.counts, n, self._slope, self._center)
        plain = self._slope == 0 and not self._center and _finishes_natively(self._request, self._p)
        return Factored(
            len(self._state.counts), panel, self._v, self._p, scale, self._p.dtype, self._p.device,
            self._state.counts if plain else None,
        )  # fmt: skip


class SmoothMethod(_Base):
    """One other activation left: Gram matrix of its derivatives, ``S = (VᵀV) ∘ AᵀA``."""

    name = "derivative Gram"
    primitive: str | None = "derivative_gram_update"
    whole_batches = True

    def __init__(self, chain: list[Affine], p: Tensor, v: Tensor, center: bool, backend: str) -> None:
        self._lead, self._affine = _split_at_activation(chain)
        if self._affine.activation is None:
            raise InputError("agop: no activation follows the layer")
        self._activation = self._affine.activation
        self._p, self._v, self._center, self._request = p, v, center, backend
        self._backend = choose("syrk_update", backend, p)
        self._state = MomentState(1, p.shape[0], center, p.device)

    def states(self) -> list[CountState | MomentState | ProbeSums]:
        return [self._state]

    def unshare(self) -> None:
        self._state = self._state.detach_copy()

    def floats_per_sample(self) -> int:
        return self._affine.weight.shape[1] + 4 * self._affine.weight.shape[0]

    def update(self, u: Tensor, nonfinite: Tensor, chunk_rows: int) -> None:
        samples = len(u)
        if not samples:
            return
        for affine in self._lead:
            u, _ = step(u, affine, nonfinite)
        gram, sums = self._state.gram, torch.zeros_like(self._state.gram[0])
        shift = None
        if self._center:
            gram, shift = torch.zeros_like(gram), self._typical_derivative(u)
        activation = self._activation
        if shift is None and activation.kind in primitives.ACTIVATIONS:
            self.backend = primitives.derivative_gram_update(
                u, self._affine.weight, self._affine.bias, activation.kind, gram, sums, nonfinite,
                alpha=activation.alpha, chunk_rows=chunk_rows, backend=self._request,
            )  # fmt: skip
        else:
            shifted_derivative_gram(
                u,
                self._affine.weight,
                self._affine.bias,
                activation.function,
                shift,
                gram,
                sums,
                nonfinite,
                chunk_rows,
                _own_kernel(self._backend),
            )
            self.backend = self._backend
        if shift is not None:
            gram.addr_(sums, sums, alpha=-1 / samples)
            self._state.add_moments(samples, gram, (sums / samples + shift.double())[None])
        self._state.advance(samples)

    def _typical_derivative(self, u: Tensor) -> Tensor:
        """The mean derivative over evenly spaced rows: near the true mean, so that centring later cancels little."""
        some = u[:: -(-len(u) // _SHIFT_ROWS)]
        _, derivative = step(some, self._affine, torch.zeros(1, dtype=torch.int64, device=u.device))
        mean = u.new_zeros(self._affine.weight.shape[0]) if derivative is None else derivative.mean(dim=0)
        return torch.nan_to_num(mean, nan=0.0, posinf=0.0, neginf=0.0)

    def factored(self, n: int, scale: float) -> Factored:
        gram = self._state.gram
        return Factored(
            len(gram), lambda start, stop: gram[start:stop, start:].clone(),
            self._v, self._p, scale, self._p.dtype, self._p.device,
            gram if _finishes_natively(self._request, self._p) else None,
        )  # fmt: skip


class RowMethod(_Base):
    """Jacobian rows (or random combinations of them) from a chain of layers, then their Gram matrix."""

    primitive: str | None = "syrk_update"

    def __init__(
        self, chain: list[Affine], rows: RowChain, p: Tensor, center: bool, probes: int | None, seed: int, backend: str
    ) -> None:
        self._chain, self._rows, self._p = chain, rows, p
        self.name = "row chain" if probes is None else "probes"
        self.backend = choose("syrk_update", backend, p)
        kernel = _own_kernel(self.backend)
        self._sums: MomentState | ProbeSums
        if probes is None:
            self._sums = MomentState(rows.rows, rows.width, center, p.device, kernel)
        else:
            self._sums = ProbeSums(probes, rows.outputs, rows.width, center, p.device, seed, kernel)

    def states(self) -> list[CountState | MomentState | ProbeSums]:
        return [self._sums]

    def unshare(self) -> None:
        self._sums = self._sums.detach_copy()

    def floats_per_sample(self) -> int:
        return self._rows.floats_per_sample

    def update(self, u: Tensor, nonfinite: Tensor, chunk_rows: int) -> None:
        logits, derivatives = forward_chain(u, self._chain, nonfinite)
        if isinstance(self._sums, ProbeSums):
            signs = self._sums.draw(len(u)).to(logits)
            rows = self._rows(logits, derivatives, signs)
            self._sums.add(rows.to(self._p.dtype), signs)
            return
        last = self._rows.last_step(logits, derivatives) if self.backend == "triton" else None
        if last is not None and self._sums.mean is None:
            primitives.chain_gram_update(*last, self._sums.gram, backend="triton")
            self._sums.advance(len(u))
        else:
            rows = self._rows(logits, derivatives, None)
            self._sums.add(rows.to(self._p.dtype))
            self._sums.advance(len(u))

    def factored(self, n: int, scale: float) -> Factored:
        p = None if self._rows.ends_at_input else self._p
        return _from_sums(self._sums, n, scale, p, self._p.dtype, self._p.device)

    def halves(self, n: int, scale: float) -> list[Factored] | None:
        p = None if self._rows.ends_at_input else self._p
        return _probe_halves(self._sums, n, scale, p, self._p.dtype, self._p.device)


class AutogradMethod(_Base):
    """Any other head: one vector-Jacobian product per output (or probe) over a chunk of samples."""

    def __init__(
        self, runner: OpaqueRunner, output: str, center: bool, probes: int | None, seed: int, width: int, outputs: int
    ) -> None:
        self.name = "vector-Jacobian products" if probes is None else "probes"
        self.backend = "eager"
        self._runner, self._output = runner, output
        device = runner.device
        self._sums: MomentState | ProbeSums
        if probes is None:
            self._sums = MomentState(outputs, width, center, device)
        else:
            self._sums = ProbeSums(probes, outputs, width, center, device, seed)

    def states(self) -> list[CountState | MomentState | ProbeSums]:
        return [self._sums]

    def unshare(self) -> None:
        self._sums = self._sums.detach_copy()

    def floats_per_sample(self) -> int:
        return self._runner.floats_per_sample

    def update(self, u: Tensor, nonfinite: Tensor, chunk_rows: int) -> None:
        sums = self._sums
        signs = sums.draw(len(u)).to(u) if isinstance(sums, ProbeSums) else None
        for index, rows in self._runner.rows(u, self._output, signs, nonfinite):
            if isinstance(sums, ProbeSums):
                sums.add_one(rows, signs, index)
            else:
                sums.add(rows[:, None, :], first=index)
        sums.advance(len(u))

    def factored(self, n: int, scale: float) -> Factored:
        return _from_sums(self._sums, n, scale, None, self._runner.dtype, self._runner.device)

    def halves(self, n: int, scale: float) -> list[Factored] | None:
        return _probe_halves(self._sums, n, scale, None, self._runner.dtype, self._runner.device)


def choose_chain_method(
    chain: list[Affine],
    *,
    output: str,
    center: bool,
    probes: int | None,
    row_dtype: torch.dtype,
    backend: str,
    seed: int,
) -> Method:
    """The exact closed form where one activation is left and the output is logits; rows otherwise."""
    p, v = collapse(chain)
    if output == "logits" and probes is None and len(v) <= 1:
        if not v:
            _refuse_backend(backend, "a layer with no activation after it")
            return ConstantMethod(p, center)
        activation = next(affine.activation for affine in chain if affine.activation is not None)
        closed = CountMethod if activation.kind in ("relu", "leaky_relu") else SmoothMethod
        return closed(chain, p, v[0], center, backend)
    rows = RowChain.build(p, v, output, probes, row_dtype)
    return RowMethod(chain, rows, p, center, probes, seed, backend)


def _refuse_backend(backend: str, what: str) -> None:
    if backend not in ("auto", "eager"):
        raise RuntimeError(f"agop: backend={backend!r} has no kernel for {what}; use backend='eager' or 'auto'")


def _own_kernel(backend: str) -> str | None:
    """The backend where its ``syrk_update`` sums in float64 by itself, None for plain PyTorch."""
    return backend if backend in ("cpp", "triton") else None


def _finishes_natively(backend: str, p: Tensor) -> bool:
    return backend in ("auto", "cpp") and choose("agop_finalise", "auto", p) == "cpp"


def _split_at_activation(chain: list[Affine]) -> tuple[list[Affine], Affine]:
    index = next(i for i, affine in enumerate(chain) if affine.activation is not None)
    return chain[:index], chain[index]


def _from_sums(
    sums: MomentState | ProbeSums, n: int, scale: float, p: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Factored:
    if isinstance(sums, ProbeSums):
        panel, width = sums.panel(n), sums.width
    else:
        gram = sums.gram
        panel, width = lambda start, stop: gram[start:stop, start:].clone(), len(gram)
    return Factored(width, panel, None, p, scale, dtype, device)


def _probe_halves(
    sums: MomentState | ProbeSums, n: int, scale: float, p: Tensor | None, dtype: torch.dtype, device: torch.device
) -> list[Factored] | None:
    if not isinstance(sums, ProbeSums) or len(sums.parts) < 2:
        return None
    return [Factored(sums.width, part, None, p, scale, dtype, device) for part in sums.part_panels(n)]
