"""Average gradient outer product of a fusion head: one call, or an accumulator for streams and several processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmc_fast.errors import InputError

from .autograd import OpaqueRunner, check_independent_rows, run_prefix
from .head import Affine, OpaqueHead, ParsedHead, fingerprint, parse_head, refuse_training_mode, tensor_versions
from .methods import AutogradMethod, Method, choose_chain_method
from .options import Options, resolve_blocks
from .result import AGOPResult
from .state import MomentState
from .sync import all_reduce_sums

__all__ = ["AGOPAccumulator", "AGOPResult", "agop"]

STATE_VERSION = 1
_CACHE_BYTES = 16 * 2**20  # a chunk's working set, unless the budget is smaller


def agop(
    head: nn.Module,
    inputs: Tensor | Iterable[Tensor],
    *,
    layer: int | str = 0,
    output: str = "logits",
    center: bool = False,
    reduction: str = "sum",
    probes: int | None = None,
    precision: str | torch.dtype | None = None,
    backend: str = "auto",
    chunk_size: int | None = None,
    memory_budget: int = 256 * 2**20,
    seed: int = 0,
) -> Tensor:
    """Average gradient outer product ``G = Σ_n J_nᵀ J_n``, ``J_n = ∂y_n/∂u_n`` at a layer's input u. Exact by default.

    ``y = W_L s(… s(W_1 u + b_1))`` with one activation after the layer: ``G = W_1ᵀ ((W_2ᵀW_2) ∘ AᵀA) W_1`` with
    ``A = s'(z)``; for (leaky) ReLU ``AᵀA`` comes from exact integer co-activation counts, at about the cost of the
    forward product and independent of the number of outputs. Deeper layers and softmax outputs go through Jacobian
    rows in chunks, other modules through vector-Jacobian products. ``[N, C, d]`` is never formed.

    Args:
        head: ``nn.Sequential`` (nested or not) of ``nn.Linear`` and elementwise activations; a module whose
            ``agop_layers()`` returns such modules in order; or any module that maps ``[N, d]`` to ``[N, C]``
            row by row.
        inputs: what the head takes, ``[N, d]``, or an iterable of such batches. Converted to the head's device and
            dtype a chunk at a time.
        layer: index over the Linear layers in forward order (negative allowed): G is at that layer's input. Or the
            name of a Linear module; or "input", the head's own input, which is what 0 means for a head that is no
            ``nn.Sequential``.
        output: "logits", what the head returns, or "probs", the softmax of that.
        center: subtract the mean Jacobian over ALL samples first.
        reduction: "sum", or "mean" to divide by N.
        probes: None for the exact sum, or k random ±1 combinations of the outputs per sample: unbiased, at a cost
            that does not grow with C.
        precision: None (the head's dtype; float32 inside for half precision), "float64", "float32", or "bf16":
            Jacobian rows in bfloat16, for deep heads and probes. The forward pass and the sums keep float32.
        backend: "auto", or one of "cpp", "triton", "cuda", "eager", which then runs or raises with the reason.
        chunk_size: samples per step, rounded up to a multiple of 64; None: from the memory budget. Changes only
            rounding, and integer counts not at all.
        memory_budget: bytes for one chunk.
        seed: of the probes.

    Returns ``[d, d]``, exactly symmetric, in the head's dtype. All NaN if any pre-activation is NaN or infinite.
    s'(0) = 0 for ReLU.

    Raises:
        InputError: options, shapes or heads without a meaning here, among them heads in training mode with dropout
            or batch normalisation and heads whose rows depend on each other.
        RuntimeError: an explicit backend that cannot run.

    Time for one hidden ReLU layer: ``N h d`` multiply-adds and ``N h² / 2`` bit operations; memory ``O(h² + d²)`` and
    a chunk.
    Source: METHOD, section 4 (lemma 2, theorems 2 and 3 of the collapse paper; Radhakrishnan et al., Science 2024).
    """
    accumulator = AGOPAccumulator(
        head, layer=layer, output=output, center=center, reduction=reduction, probes=probes, precision=precision,
        backend=backend, chunk_size=chunk_size, memory_budget=memory_budget, seed=seed,
    )  # fmt: skip
    return accumulator.update(inputs).compute().matrix


class AGOPAccumulator:
    """Sums for an AGOP over batches, restarts and processes, in memory ``O(h² + d²)`` and a chunk.

    The head is read when the accumulator is made; a head whose weights change afterwards is refused. Options are those
    of ``agop``, and:

    Args:
        blocks: widths of the modality blocks of the layer's input, in order: a sequence, or a mapping name -> width.
        input_cov: also accumulate mean and covariance of the layer's inputs (float64, one more pass).
    """

    def __init__(
        self,
        head: nn.Module,
        *,
        layer: int | str = 0,
        output: str = "logits",
        center: bool = False,
        reduction: str = "sum",
        probes: int | None = None,
        precision: str | torch.dtype | None = None,
        backend: str = "auto",
        chunk_size: int | None = None,
        blocks: Mapping[str, int] | Sequence[int] | None = None,
        input_cov: bool = False,
        memory_budget: int = 256 * 2**20,
        seed: int = 0,
    ) -> None:
        self.options = Options(
            layer, output, center, reduction, probes, precision, backend, chunk_size, input_cov, memory_budget, seed
        )
        self._parsed = parse_head(head, layer, self.options.compute_dtype)
        refuse_training_mode(head)
        self._head, self._blocks = head, blocks
        self._versions = tensor_versions(head)
        self._fingerprint: str | None = None
        self._method: Method | None = None
        self._covariance: MomentState | None = None
        self._nonfinite: Tensor | None = None
        self._pending: dict[str, Any] | None = None
        self._n, self._shared, self._synced, self._checked = 0, False, False, False
        if isinstance(self._parsed, ParsedHead):
            chain = self._parsed.chain
            dtype = self.options.compute_dtype(self._parsed.dtype)
            row_dtype = self.options.row_dtype(self._parsed.dtype)
            method = choose_chain_method(
                chain, output=output, center=center, probes=probes, row_dtype=row_dtype, backend=backend, seed=seed
            )
            self._start(method, chain[0].weight.shape[1], dtype, chain[0].weight.device)
        else:
            self.options.check_autograd()

    @property
    def n(self) -> int:
        """Samples so far."""
        return self._n

    def update(self, inputs: Tensor | Iterable[Tensor]) -> AGOPAccumulator:
        """Add ``[N, d]`` or each batch of an iterable (one that fails has added those before it); returns self."""
        if not isinstance(inputs, Tensor):
            for batch in _batches(inputs):
                self.update(batch)
            return self
        if self._synced:
            raise RuntimeError(
                "agop: this accumulator holds the sum over all processes, so more data would be counted in each; "
                "sync() once, after the last update()"
            )
        self._check_head()
        self._check_inputs(inputs)
        device_type = inputs.device.type if self._parsed.device is None else self._parsed.device.type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device_type, enabled=False):
            self._update(inputs.detach())
        return self

    def merge(self, other: AGOPAccumulator) -> AGOPAccumulator:
        """Add the sums of another accumulator of the same head and options; returns self."""
        if not isinstance(other, AGOPAccumulator):
            raise TypeError(f"agop: merge takes an AGOPAccumulator, got {type(other).__name__}")
        if self._synced or other._synced:
            raise RuntimeError(
                "agop: one of the accumulators holds the sum over all processes already; merge before sync()"
            )
        if self.fingerprint != other.fingerprint:
            raise InputError(
                "agop: the accumulators differ in the head (structure or weights) or in layer, output, center, probes, "
                "precision or input_cov; merge only sums of one head with one set of options"
            )
        if self.options.probes and self.options.seed == other.options.seed and self._n and other._n:
            raise InputError(
                f"agop: both accumulators drew probes with seed {self.options.seed}, so they are not independent; "
                "give each a seed of its own"
            )
        if other._method is None:
            return self
        if self._method is None:
            self._start_like(other)
        self._unshare()
        method, nonfinite = self._running()
        for mine, theirs in zip(self._states(method), other._states(other._running()[0]), strict=True):
            mine.merge(theirs)
        nonfinite += other._running()[1].to(nonfinite.device)
        method.backend = method.backend or other._method.backend
        self._n += other._n
        return self

    def sync(self, group: Any = None) -> AGOPAccumulator:
        """Sum over the processes of a ``torch.distributed`` group with one all-reduce; returns self.

        Every process calls it, once, after its last update, and then holds the total. Integer counts are exact.
        Raises RuntimeError where no process group is initialised or where heads, options or probe seeds do not fit.
        """
        if self._synced:
            raise RuntimeError("agop: sync() was called before; the sums are those of all processes already")
        self._check_head()
        if self._method is None:
            raise RuntimeError(
                "agop: this process has seen no batch, and the widths of this head are known only from one; "
                "update() with an empty batch of the right width first"
            )
        self._unshare()
        method, nonfinite = self._running()
        self._n = all_reduce_sums(
            self._states(method),
            nonfinite,
            self._n,
            self.fingerprint,
            self.options.seed if self.options.probes else None,
            group,
        )
        self._synced = True
        return self

    def compute(self) -> AGOPResult:
        """The AGOP of everything added so far; later updates do not change a result."""
        if self._method is None:
            raise InputError(
                "agop: no data yet, and the widths of this head are known only from data; call update() first"
            )
        self._check_head()
        if self.options.reduction == "mean" and not self._n:
            raise InputError("agop: reduction='mean' over 0 samples has no value; pass data, or reduction='sum'")
        method, nonfinite = self._running()
        scale = 1.0 / self._n if self.options.reduction == "mean" else 1.0
        self._shared = True
        covariance, mean = self._input_moments()
        parsed = self._parsed
        return AGOPResult(
            method.factored(self._n, scale), method.halves(self._n, scale),
            n=self._n, layer=parsed.layer, output=self.options.output, centered=self.options.center,
            reduction=self.options.reduction, finite=not int(nonfinite), dtype=parsed.dtype or self._dtype,
            blocks=resolve_blocks(self._blocks, self._width), probes=self.options.probes,
            input_cov=covariance, input_mean=mean, method=method.name, backend=method.backend if self._n else None,
        )  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the head and of the options that give the sums their meaning."""
        if self._fingerprint is None:
            self._check_head()
            self._fingerprint = fingerprint(self._head, self.options.meaning())
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later: tensors, numbers, strings; ``torch.load(weights_only=True)`` reads it."""
        state: dict[str, Any] = {
            "version": STATE_VERSION, "fingerprint": self.fingerprint, "n": self._n, "synced": self._synced,
            "started": self._method is not None, "seed": self.options.seed,
        }  # fmt: skip
        if self._method is not None:
            method, nonfinite = self._running()
            state["nonfinite"] = int(nonfinite)
            state["shape"] = list(self._shape)
            state["backend"] = method.backend
            state["sums"] = [part.to_tensors() for part in self._states(method)]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the sums by stored ones; InputError for a state of another head, other options or another version."""
        if not isinstance(state, Mapping) or "fingerprint" not in state or "version" not in state:
            raise InputError("agop: this is not the state of an AGOPAccumulator; pass what state_dict() returned")
        if state["version"] != STATE_VERSION:
            raise InputError(
                f"agop: the state has version {state['version']}; this release reads version {STATE_VERSION}"
            )
        if state["fingerprint"] != self.fingerprint:
            raise InputError(
                "agop: the state belongs to another head (structure or weights) or to other options (layer, output, "
                "center, probes, precision, input_cov); make the accumulator from the same head and options"
            )
        if state["started"]:
            if self._method is None:
                self._start_shape(*state["shape"])
            self._unshare()
            method, nonfinite = self._running()
            for part, tensors in zip(self._states(method), state["sums"], strict=True):
                part.load_tensors(dict(tensors))
            nonfinite.fill_(state["nonfinite"])
            method.backend = state["backend"]
        self._n, self._synced = int(state["n"]), bool(state["synced"])

    # -- one batch ---------------------------------------------------------------------------------------------------

    def _update(self, x: Tensor) -> None:
        parsed, dtype = self._parsed, self._compute_dtype(x)
        device = parsed.device or x.device
        if self._method is None:
            self._start_opaque(x[:4].to(device=device, dtype=dtype))
        if not self._checked:
            self._check_rows(x[:4].to(device=device, dtype=dtype))
        self._unshare()
        method, nonfinite = self._running()
        ready = x.dtype == dtype and x.device == device and not parsed.prefix and self._covariance is None
        rows = self._chunk_rows(method, x)
        if ready and method.whole_batches:
            method.update(x, nonfinite, rows if self.options.chunk_size else 0)
            self._n += len(x)
            return
        for part in x.split(rows):
            u = run_prefix(part.to(device=device, dtype=dtype), parsed.prefix, nonfinite)
            method.update(u, nonfinite, 0)
            if self._covariance is not None:
                self._covariance.add(u[:, None, :])
                self._covariance.advance(len(u))
            self._n += len(part)

    def _chunk_rows(self, method: Method, x: Tensor) -> int:
        if self.options.chunk_size is not None:
            return -(-self.options.chunk_size // 64) * 64
        size = torch.finfo(self._dtype).bits // 8
        per_sample = size * (method.floats_per_sample() + x.shape[1])
        rows = min(_CACHE_BYTES, self.options.memory_budget) // per_sample // 64 * 64
        return rows or max(1, min(64, self.options.memory_budget // per_sample))

    # -- set-up ------------------------------------------------------------------------------------------------------

    def _compute_dtype(self, x: Tensor) -> torch.dtype:
        return self.options.compute_dtype(self._parsed.dtype or x.dtype)

    def _start(self, method: Method, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._method, self._width, self._dtype = method, width, dtype
        self._nonfinite = torch.zeros(1, dtype=torch.int64, device=device)
        resolve_blocks(self._blocks, width)
        if self.options.input_cov:
            self._covariance = MomentState(1, width, True, device)
        self._shape = (width, 0, str(dtype).removeprefix("torch."))

    def _start_opaque(self, some: Tensor) -> None:
        """Learn widths from a few rows (made up where there are none); only heads that are not chains need it."""
        parsed = self._parsed
        if not isinstance(parsed, OpaqueHead):
            raise RuntimeError("agop: a chain of layers is set up when the accumulator is made")
        some = some if len(some) else some.new_zeros(1, some.shape[1])
        self._runner = OpaqueRunner(parsed, some.dtype, some.device)
        u = run_prefix(some, parsed.prefix, torch.zeros(1, dtype=torch.int64, device=some.device))
        width, outputs = self._runner.shape(u)
        self._start_shape(width, outputs, str(some.dtype).removeprefix("torch."))

    def _start_shape(self, width: int, outputs: int, dtype_name: str) -> None:
        parsed, dtype = self._parsed, getattr(torch, dtype_name)
        if not isinstance(parsed, OpaqueHead):
            raise InputError("agop: the state does not fit a chain of Linear layers")
        if not hasattr(self, "_runner"):
            self._runner = OpaqueRunner(parsed, dtype, parsed.device or torch.device("cpu"))
        options = self.options
        method = AutogradMethod(
            self._runner, options.output, options.center, options.probes, options.seed, width, outputs
        )
        self._start(method, width, dtype, self._runner.device)
        self._shape = (width, outputs, dtype_name)

    def _start_like(self, other: AGOPAccumulator) -> None:
        self._start_shape(*other._shape)

    def _running(self) -> tuple[Method, Tensor]:
        if self._method is None or self._nonfinite is None:
            raise RuntimeError("agop: no data yet; call update() first")
        return self._method, self._nonfinite

    def _states(self, method: Method) -> list[Any]:
        return [*method.states(), *([self._covariance] if self._covariance is not None else [])]

    def _unshare(self) -> None:
        """A result keeps the sums it was made from, so copy them before they change."""
        if self._shared and self._method is not None:
            self._method.unshare()
            self._shared = False

    def _input_moments(self) -> tuple[Tensor | None, Tensor | None]:
        if self._covariance is None or self._covariance.mean is None or not self._n:
            return None, None
        upper = self._covariance.gram.triu()
        covariance = (upper + upper.triu(1).t()) / self._n
        if int(self._running()[1]):
            covariance = torch.full_like(covariance, float("nan"))
        return covariance, self._covariance.mean[0].clone()

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check_head(self) -> None:
        if tensor_versions(self._head) != self._versions:
            raise RuntimeError(
                "agop: the head's weights changed after the accumulator was made, so its sums would mix two heads; "
                "make a new accumulator (a copy of the head if training goes on)"
            )

    def _check_inputs(self, x: Tensor) -> None:
        if x.dim() != 2:
            raise InputError(
                f"agop: inputs have shape {list(x.shape)}; pass [samples, features] or an iterable of such"
            )
        if not x.is_floating_point():
            raise InputError(f"agop: inputs are {x.dtype}; pass a floating dtype, e.g. inputs.float()")
        first = next(iter(self._parsed.prefix), None) or next(iter(getattr(self._parsed, "chain", [])), None)
        if isinstance(first, Affine) and first.weight.shape[1] != x.shape[1]:
            raise InputError(
                f"agop: inputs have {x.shape[1]} columns but the head's first Linear takes {first.weight.shape[1]}"
            )

    def _check_rows(self, some: Tensor) -> None:
        """Perturb one row, for heads with parts of unknown make; check the promise of ``agop_layers()`` as well."""
        self._checked = True
        parsed = self._parsed
        unused = torch.zeros(1, dtype=torch.int64, device=some.device)
        if isinstance(parsed, OpaqueHead):
            name = type(self._head).__name__

            def call(rows: Tensor) -> Tensor:
                return self._runner.forward(run_prefix(rows, parsed.prefix, unused))[1]

            check_independent_rows(call, some, f"the head ({name})")
        elif any(isinstance(module, nn.Module) for module in parsed.prefix):
            check_independent_rows(
                lambda rows: run_prefix(rows, parsed.prefix, unused), some, "the part before the layer"
            )
        if hasattr(self._head, "agop_layers") and len(some) and isinstance(parsed, ParsedHead):
            self._check_protocol(some, parsed, unused)

    def _check_protocol(self, some: Tensor, parsed: ParsedHead, unused: Tensor) -> None:
        from .rows import forward_chain

        listed, _ = forward_chain(run_prefix(some, parsed.prefix, unused), parsed.chain, unused)
        real = self._head(some.to(parsed.dtype)).to(listed.dtype)
        eps = torch.finfo(parsed.dtype).eps
        if real.shape != listed.shape or not torch.allclose(
            real, listed, rtol=1e3 * eps, atol=1e3 * eps * float(real.abs().max()), equal_nan=True
        ):
            raise InputError(
                f"agop: {type(self._head).__name__}.agop_layers() does not compute what the head computes on the same "
                "rows; list every layer and activation in forward order, or remove the method"
            )


def _batches(inputs: Any) -> Iterable[Tensor]:
    try:
        iterator = iter(inputs)
    except TypeError:
        raise TypeError(
            f"agop: inputs are {type(inputs).__name__}; pass a tensor [N, d] or an iterable of such"
        ) from None
    for batch in iterator:
        if not isinstance(batch, Tensor):
            raise TypeError(
                f"agop: the iterable gave {type(batch).__name__}; it must give tensors [n, d] "
                "(for a DataLoader of tuples: (x for x, *_ in loader))"
            )
        yield batch
