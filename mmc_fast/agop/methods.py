"""The ways to sum ``JᵀJ``: exact counts, derivative Gram, Jacobian rows, autograd. One class each, one interface."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmc_fast._util.numbers import integer, make_plain
from mmc_fast.errors import InputError
from mmc_fast.ops.agop import op as primitives
from mmc_fast.ops.dispatch import choose, explain

from .head import Affine
from .result import Factored
from .rows import AutogradRows, ChainRows, forward_chain, step
from .state import CountState, MomentState, Panel, ProbeState, State, add_gram

_BACKENDS = ("auto", "cpp", "triton", "cuda", "eager")
_PRECISIONS: dict[object, torch.dtype | None] = {
    None: None,
    "float64": torch.float64, torch.float64: torch.float64,
    "float32": torch.float32, torch.float32: torch.float32,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, torch.bfloat16: torch.bfloat16,
}  # fmt: skip
_SHIFT_ROWS = 1024
_STEP_ROWS = 2048


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
        for name, value, allowed in (
            ("output", self.output, ("logits", "probs")),
            ("reduction", self.reduction, ("sum", "mean")),
            ("backend", self.backend, _BACKENDS),
        ):
            if value not in allowed:
                raise InputError(f"agop: {name}={value!r}; allowed are {', '.join(map(repr, allowed))}")
        if self.precision not in _PRECISIONS:
            raise InputError(
                f"agop: precision={self.precision!r}; allowed are None (the head's dtype), 'float64', 'float32', 'bf16'"
            )
        for name, number, rest in (
            ("probes", self.probes, " or None"), ("chunk_size", self.chunk_size, " or None"),
            ("memory_budget", self.memory_budget, ""),
        ):  # fmt: skip
            if not (number is None and rest) and (integer(number) or 0) < 1:
                raise InputError(f"agop: {name}={number!r}; pass an integer >= 1{rest}")
        if integer(self.seed) is None:
            raise InputError(f"agop: seed={self.seed!r}; pass an integer")
        make_plain(self)

    def compute_dtype(self, head_dtype: torch.dtype) -> torch.dtype:
        """Precision of the forward pass: at least float32, whatever the rows of deep heads are rounded to."""
        if not head_dtype.is_floating_point:
            raise InputError(f"agop: the head's weights are {head_dtype}; a floating dtype is needed")
        asked = head_dtype if self.bf16 else _PRECISIONS[self.precision] or head_dtype
        return torch.float64 if asked == torch.float64 else torch.float32

    @property
    def bf16(self) -> bool:
        """Whether the Jacobian rows are taken in bfloat16."""
        return _PRECISIONS[self.precision] == torch.bfloat16

    def meaning(self) -> tuple[object, ...]:
        """The options that give accumulated numbers their meaning (not speed, not the final division)."""
        precision = _PRECISIONS[self.precision]
        return (self.layer, self.output, self.center, self.probes, precision and str(precision), self.input_cov)

    def refuse_backend(self, what: str) -> None:
        """Raise for an explicit backend that has no kernel for ``what``."""
        if self.backend not in ("auto", "eager"):
            raise RuntimeError(
                f"agop: backend={self.backend!r} has no kernel for {what}; use backend='eager' or 'auto'"
            )


class Method(ABC):
    """A way to sum: it adds inputs u of the layer to a state, and gives the factors of G in the end.

    Attributes:
        name: for ``AGOPResult.method``.
        primitive: the op that takes most of the time, if it is one of ours.
        backend: what ran last.
        whole_batches: ``update`` cuts its input into chunks itself.
        state: the sums, None where G needs none but the number of samples.
        nonfinite: int64 ``[1]``, above zero once a pre-activation was NaN or infinite.
        floats_per_sample: numbers alive per sample of a chunk, about.
        inputs, outputs: d, and C where a method is set up from data.
    """

    name: str
    primitive: str | None = None
    backend: str | None = None
    whole_batches = False
    state: Any = None
    floats_per_sample: int
    outputs = 0

    def __init__(
        self, inputs: int, dtype: torch.dtype, device: torch.device, w1: Tensor | None = None,
        w2: Tensor | None = None, nonfinite: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.inputs, self.dtype, self.device, self._w1, self._w2 = inputs, dtype, device, w1, w2
        self.nonfinite = torch.zeros(1, dtype=torch.int64, device=device) if nonfinite is None else nonfinite

    @abstractmethod
    def update(self, u: Tensor, chunk_rows: int) -> None:
        """Add the samples ``u [n, d]``; ``chunk_rows`` is for methods of whole batches, 0 lets them choose."""

    def unshare(self) -> None:
        """Go on with a copy of the sums, since a result keeps those it was made from."""
        self.state, self.nonfinite = copy.deepcopy(self.state), self.nonfinite.clone()

    def factored(self, n: int, scale: float) -> list[Factored]:
        """The factors of G, then those of independent estimates of it, if there are any."""
        width = self.inputs if self._w1 is None else len(self._w1)
        return [
            Factored(width, panel, self._w2, self._w1, scale, self.dtype, self.device, *self._whole())
            for panel in self._panels(n)
        ]

    def _panels(self, n: int) -> list[Panel]:
        return self.state.panels(n)

    def _whole(self) -> tuple[Tensor, str] | tuple[()]:
        """The sums themselves where a final product may read them, and its backend."""
        return ()


class _ConstantMethod(Method):
    """No activation after the layer: the same Jacobian ``W1`` for every sample, ``G = N W1ᵀW1``, zero about the mean."""

    name = "constant"
    backend = "eager"

    def __init__(self, w1: Tensor, options: Options) -> None:
        super().__init__(w1.shape[1], w1.dtype, w1.device, w1)
        options.refuse_backend("a layer with no activation after it")
        self._affine, self._center = Affine(w1, None, None), options.center
        self.floats_per_sample = self.inputs

    def update(self, u: Tensor, chunk_rows: int) -> None:
        step(u, self._affine, self.nonfinite)

    def _panels(self, n: int) -> list[Panel]:
        w1 = self._affine.weight
        eye = (0.0 if self._center else float(n)) * torch.eye(len(w1), dtype=torch.float64, device=w1.device)
        return [lambda start, stop: eye[start:stop, start:].clone()]


class _OneActivation(Method):
    """One activation left: ``S = (W2ᵀW2) ∘ AᵀA`` with ``A = s'(z)``."""

    whole_batches = True
    _floats_per_unit: int

    def __init__(
        self, chain: Sequence[Affine], w1: Tensor, w2: Tensor, options: Options, nonfinite: Tensor | None = None
    ) -> None:
        super().__init__(chain[0].weight.shape[1], w1.dtype, w1.device, w1, w2, nonfinite)
        index = next(i for i, affine in enumerate(chain) if affine.activation is not None)
        self._lead, self._affine = chain[:index], chain[index]
        self._center, self._request = options.center, options.backend
        units, columns = self._affine.weight.shape
        self.floats_per_sample = columns + self._floats_per_unit * units

    def _finished(self, sums: Tensor) -> tuple[Tensor, str] | tuple[()]:
        """The sums and the backend of the final product; nothing where panels by torch take less memory."""
        usable = [row.backend for row in explain("agop_finalise", self._w1) if row.usable]
        backend = next((name for name in usable if self._request in ("auto", name)), "eager")
        return () if backend == "eager" else (sums, backend)


class _CountMethod(_OneActivation):
    """(Leaky) ReLU: integer co-activation counts."""

    name = "co-activation counts"
    primitive = "relu_coactivation_update"
    _floats_per_unit = 3

    def __init__(self, chain: Sequence[Affine], w1: Tensor, w2: Tensor, options: Options) -> None:
        width = len(w1)
        zeros = torch.zeros(width * width + 2, dtype=torch.int64, device=w1.device)  # one fill for both
        super().__init__(chain, w1, w2, options, zeros[-1:] if width % 2 else zeros[-2:-1])  # 16 divides its address
        activation = self._affine.activation
        self._slope = activation.alpha if activation is not None else 0.0
        self.state: CountState = CountState(zeros[:-2].view(width, width), self._slope, options.center)

    def update(self, u: Tensor, chunk_rows: int) -> None:
        for affine in self._lead:
            u, _ = step(u, affine, self.nonfinite)
        self.backend = primitives.relu_coactivation_update(
            u, self._affine.weight, self._affine.bias, self.state.counts, self.nonfinite,
            chunk_rows=chunk_rows, backend=self._request,
        )  # fmt: skip

    def _whole(self) -> tuple[Tensor, str] | tuple[()]:
        return () if self._slope or self._center else self._finished(self.state.counts)


class _SmoothMethod(_OneActivation):
    """Any other activation: Gram matrix of its derivatives."""

    name = "derivative Gram"
    primitive = "derivative_gram_update"
    _floats_per_unit = 4

    def __init__(self, chain: Sequence[Affine], w1: Tensor, w2: Tensor, options: Options) -> None:
        super().__init__(chain, w1, w2, options)
        self._gram_backend = choose("syrk_update", options.backend, w1)
        self.state: MomentState = MomentState(1, len(w1), options.center, w1.device)

    def update(self, u: Tensor, chunk_rows: int) -> None:
        samples, activation = len(u), self._affine.activation
        if not samples or activation is None:
            return
        for affine in self._lead:
            u, _ = step(u, affine, self.nonfinite)
        batch, shift = self.state, None
        if self._center:
            batch, shift = MomentState(1, len(batch.gram), True, self.device), self._typical_derivative(u)
        sums = torch.zeros_like(batch.gram[0])
        if shift is None and activation.kind in primitives.ACTIVATIONS:
            self.backend = primitives.derivative_gram_update(
                u, self._affine.weight, self._affine.bias, activation.kind, batch.gram, sums, self.nonfinite,
                activation.alpha, activation.beta, chunk_rows=chunk_rows, backend=self._request,
            )  # fmt: skip
        else:
            for part in u.split(chunk_rows or _STEP_ROWS):
                self._add_shifted(part, shift, batch.gram, sums)
            self.backend = self._gram_backend
        batch.advance(samples)
        if shift is not None:
            batch.gram.addr_(sums, sums, alpha=-1 / samples)
            batch.mean = (sums / samples + shift.double())[None]
            self.state.merge(batch)

    def _add_shifted(self, u: Tensor, shift: Tensor | None, gram: Tensor, sums: Tensor) -> None:
        """Add ``AᵀA`` and ``Σ A`` of ``A = s'(z) − shift`` to ``gram`` and ``sums``, float64.

        A shift near the mean keeps a later ``AᵀA − Σ A Σ Aᵀ / N`` free of cancellation.
        """
        _, a = step(u, self._affine, self.nonfinite)
        if a is None:
            return
        a = a if shift is None else a - shift
        add_gram(a, gram, self._gram_backend)
        sums += a.sum(dim=0)

    def _typical_derivative(self, u: Tensor) -> Tensor:
        """The mean derivative over evenly spaced rows: near the true mean, so that centring later cancels little."""
        some = u[:: -(-len(u) // _SHIFT_ROWS)]
        _, a = step(some, self._affine, torch.zeros_like(self.nonfinite))
        mean = u.new_zeros(len(self._affine.weight)) if a is None else a.mean(dim=0)
        return torch.nan_to_num(mean, nan=0.0, posinf=0.0, neginf=0.0)

    def _whole(self) -> tuple[Tensor, str] | tuple[()]:
        return self._finished(self.state.gram)


class _RowMethod(Method):
    """Jacobian rows (or random combinations of them) from a chain of layers, then their Gram matrix."""

    primitive = "syrk_update"

    def __init__(self, chain: Sequence[Affine], w1: Tensor, v: Sequence[Tensor], options: Options) -> None:
        row_dtype = torch.bfloat16 if options.bf16 else w1.dtype
        self._rows = rows = ChainRows(w1, v, options.output, options.probes, row_dtype)
        super().__init__(chain[0].weight.shape[1], w1.dtype, w1.device, None if rows.ends_at_input else w1)
        self.name = "row chain" if options.probes is None else "probes"
        self.backend = choose("syrk_update", options.backend, w1)
        self.floats_per_sample = rows.floats_per_sample
        self._chain = chain
        self.state = _row_state(options, rows.count, rows.outputs, rows.width, w1.device, self.backend)

    def update(self, u: Tensor, chunk_rows: int) -> None:
        y, derivatives = forward_chain(u, self._chain, self.nonfinite)
        state = self.state
        if isinstance(state, ProbeState):
            signs = state.draw(len(u)).to(y)
            state.add(self._rows(y, derivatives, signs).to(self.dtype), signs)
        else:
            last = None
            if self.backend == "triton" and state.mean is None:
                last = self._rows.last_step(y, derivatives)
            if last is not None:
                primitives.chain_gram_update(*last, state.gram, backend="triton")
            else:
                state.add(self._rows(y, derivatives, None).to(self.dtype))
        state.advance(len(u))


class AutogradMethod(Method):
    """Any other head: one vector-Jacobian product per output (or probe) over a chunk of samples."""

    backend = "eager"

    def __init__(self, rows: AutogradRows, inputs: int, outputs: int, device: torch.device, options: Options) -> None:
        super().__init__(inputs, rows.dtype, device)
        self.name = "vector-Jacobian products" if options.probes is None else "probes"
        self.outputs, self.rows, self._output = outputs, rows, options.output
        self.floats_per_sample = rows.floats_per_sample + 4 * inputs + 2 * outputs
        self.state = _row_state(options, outputs, outputs, inputs, device, None)

    def update(self, u: Tensor, chunk_rows: int) -> None:
        state = self.state
        signs = state.draw(len(u)).to(u) if isinstance(state, ProbeState) else None
        for index, rows in enumerate(self.rows(u, self._output, signs, self.nonfinite)):
            if signs is None:
                state.add(rows[:, None, :], first=index)
            else:
                state.add(rows[:, None, :], signs, first=index)
        state.advance(len(u))


def choose_method(chain: Sequence[Affine], options: Options) -> Method:
    """For a chain of layers: a closed form where one activation is left and the output is logits; rows otherwise."""
    w1, v = _collapse(chain)
    if options.output == "probs" or options.probes is not None or len(v) > 1:
        return _RowMethod(chain, w1, v, options)
    if not v:
        return _ConstantMethod(w1, options)
    activation = next(affine.activation for affine in chain if affine.activation is not None)
    closed = _CountMethod if activation.kind in ("relu", "leaky_relu") else _SmoothMethod
    return closed(chain, w1, v[0], options)


def _collapse(chain: Sequence[Affine]) -> tuple[Tensor, list[Tensor]]:
    """Multiply runs of weights without an activation between them: ``W1 [h, d]`` and the weights ``V_1 .. V_r`` in

    ``∂y/∂u = V_r D_r … V_1 D_1 W1`` with ``D_q`` the diagonal of the q-th activation's derivative. Where the output
    itself is activated, ``V_r`` is the identity.
    """
    factors: list[Tensor] = []
    run: Tensor | None = None
    for affine in chain:
        weight = affine.weight
        run = weight if run is None else (weight.double() @ run.double()).to(weight.dtype)
        if affine.activation is not None:
            factors.append(run)
            run = None
    if run is None:
        last = factors[-1]
        run = torch.eye(last.shape[0], dtype=last.dtype, device=last.device)
    factors.append(run)
    return factors[0], factors[1:]


def _row_state(
    options: Options, rows: int, outputs: int, width: int, device: torch.device, kernel: str | None
) -> State:
    if options.probes is None:
        return MomentState(rows, width, options.center, device, kernel)
    return ProbeState(options.probes, outputs, width, options.center, device, options.seed, kernel)
