"""Average gradient outer product of a fusion head: one call, or an accumulator for streams and several processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmc_fast.errors import InputError
from mmc_fast.ops.agop import op as primitives

from .head import Affine, parse_head, refuse_training_mode
from .methods import AutogradMethod, Method, Options, choose_method
from .result import AGOPResult, resolve_blocks
from .rows import AutogradRows, check_independent_rows, forward_chain, run_prefix
from .state import MomentState, all_reduce_sums

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
    s'(0) = 0 for ReLU. Counts take the sign of the exact real number ``w·x + b`` of the floats that enter the Linear layer
    before the activation: equal on every processor where that is the head's first layer; the outputs of layers before
    it are rounded as the processor rounds them.

    Raises:
        InputError: options, shapes or heads without a meaning here, among them heads in training mode with dropout
            or batch normalisation and heads whose rows depend on each other.
        RuntimeError: an explicit backend that cannot run.

    Time for one hidden ReLU layer: ``N h d`` multiply-adds and ``N h² / 2`` bit operations; memory ``O(h² + d²)`` and
    a chunk.
    Source: lemma 2, theorems 2 and 3 of *A Closer Look at Multimodal Representation Collapse* (ICML 2025);
    Radhakrishnan et al., Science 2024. The mathematics: ``docs/guides/agop.md``.

    Examples:
        >>> head = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> list(mmc_fast.agop(head, torch.randn(1000, 6), center=True).shape)
        [6, 6]
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

    Raises:
        InputError: as :func:`mmc_fast.agop`; blocks that do not partition the layer's input, a batch of other width.

    Examples:
        >>> head = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> accumulator = mmc_fast.AGOPAccumulator(head, blocks={"image": 4, "audio": 2})
        >>> for batch in torch.randn(1000, 6).split(250):
        ...     accumulator = accumulator.update(batch)
        >>> accumulator.n, list(accumulator.compute().block_traces().shape)
        (1000, [2])
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
        self._head, self._blocks = head, blocks
        self._parsed = parse_head(head, layer, self.options.compute_dtype)
        refuse_training_mode(head)
        self._versions = _tensor_versions(head)
        self._fingerprint: str | None = None
        self._method: Method | None = None
        self._covariance: MomentState | None = None
        self._n, self._shared, self._synced, self._checked = 0, False, False, False
        if self._parsed.chain:
            with torch.inference_mode(False), torch.no_grad():
                self._start(choose_method(self._parsed.chain, self.options))
        else:
            self.options.refuse_backend("heads other than Linear layers and elementwise activations")
            if self.options.bf16:
                raise InputError(
                    "agop: precision='bf16' is for chains of Linear layers; give this head in bfloat16 instead"
                )

    @property
    def n(self) -> int:
        """Samples so far."""
        return self._n

    @property
    def method(self) -> Method | None:
        """How this head is summed (``name``, ``primitive``, ``backend``); None for one that is set up by its first data."""
        return self._method

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
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast((self._parsed.device or inputs.device).type, enabled=False),
        ):
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
        theirs = other._method
        if theirs is None:
            return self
        with torch.inference_mode(False), torch.no_grad():
            mine = self._method or self._start_autograd(*self._shape(theirs))
            self._unshare(mine)
            for state, further in zip(self._states(mine), other._states(theirs), strict=True):
                state.merge(further)
            mine.nonfinite += theirs.nonfinite.to(mine.device)
        mine.backend = mine.backend or theirs.backend
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
        method = self._method
        if method is None:
            raise RuntimeError(
                "agop: this process has seen no batch, and the widths of this head are known only from one; "
                "update() with an empty batch of the right width first"
            )
        seed = self.options.seed if self.options.probes else None
        with torch.inference_mode(False), torch.no_grad():
            self._unshare(method)
            self._n = all_reduce_sums(self._states(method), method.nonfinite, self._n, self.fingerprint, seed, group)
        self._synced = True
        return self

    def compute(self) -> AGOPResult:
        """The AGOP of everything added so far; later updates do not change a result."""
        method, options, parsed = self._method, self.options, self._parsed
        if method is None:
            raise InputError(
                "agop: no data yet, and the widths of this head are known only from data; call update() first"
            )
        self._check_head()
        if options.reduction == "mean" and not self._n:
            raise InputError("agop: reduction='mean' over 0 samples has no value; pass data, or reduction='sum'")
        self._shared = True
        covariance, mean = self._input_moments(method.nonfinite)
        factored, *halves = method.factored(self._n, 1.0 / self._n if options.reduction == "mean" else 1.0)
        return AGOPResult(
            n=self._n, layer=parsed.layer, output=options.output, centered=options.center,
            reduction=options.reduction, blocks=resolve_blocks(self._blocks, method.inputs), probes=options.probes,
            method=method.name, backend=method.backend if self._n else None, input_cov=covariance, input_mean=mean,
            _factored=factored, _halves=halves, _dtype=parsed.dtype or method.dtype, _nonfinite=method.nonfinite,
        )  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the head and of the options that give the sums their meaning."""
        if self._fingerprint is None:
            self._check_head()
            self._fingerprint = _fingerprint(self._head, self.options.meaning())
        return self._fingerprint

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on later: tensors, numbers, strings; ``torch.load(weights_only=True)`` reads it."""
        method = self._method
        state: dict[str, Any] = {
            "version": STATE_VERSION, "fingerprint": self.fingerprint, "n": self._n, "synced": self._synced,
            "started": method is not None, "seed": self.options.seed,
        }  # fmt: skip
        if method is not None:
            state["nonfinite"] = int(method.nonfinite)
            state["shape"] = list(self._shape(method))
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
            with torch.inference_mode(False), torch.no_grad():
                method = self._method or self._start_autograd(*state["shape"])
                self._unshare(method)
                for part, tensors in zip(self._states(method), state["sums"], strict=True):
                    part.load_tensors(dict(tensors))
                method.nonfinite.fill_(state["nonfinite"])
            method.backend = state["backend"]
        self._n, self._synced = int(state["n"]), bool(state["synced"])
        self.options = replace(self.options, seed=state["seed"])  # of the probes that were drawn

    def _update(self, x: Tensor) -> None:
        prefix = self._parsed.prefix
        dtype = self.options.compute_dtype(self._parsed.dtype or x.dtype)
        device = self._parsed.device or x.device

        def ready(part: Tensor) -> Tensor:
            part = part.to(device=device, dtype=dtype)
            return part.clone() if part.is_inference() else part

        method = self._method or self._set_up(ready(x[:4]))
        if not self._checked:
            self._check_rows(ready(x[:4]), method)
        self._unshare(method)
        rows = self._chunk_rows(method, x.shape[1])
        as_it_is = x.dtype == dtype and x.device == device and not prefix and self._covariance is None
        if as_it_is and method.whole_batches:
            method.update(x, rows if self.options.chunk_size else 0)
            self._n += len(x)
            return
        for part in x.split(rows):
            u = run_prefix(ready(part), prefix, method.nonfinite)
            method.update(u, 0)
            if self._covariance is not None:
                self._covariance.add(u[:, None, :])
                self._covariance.advance(len(u))
            self._n += len(part)

    def _chunk_rows(self, method: Method, columns: int) -> int:
        if self.options.chunk_size is not None:
            return -(-self.options.chunk_size // 64) * 64
        per_sample = torch.finfo(method.dtype).bits // 8 * (method.floats_per_sample + columns)
        rows = min(_CACHE_BYTES, self.options.memory_budget) // per_sample // 64 * 64
        return rows or max(1, min(64, self.options.memory_budget // per_sample))

    def _start(self, method: Method) -> Method:
        resolve_blocks(self._blocks, method.inputs)
        if self.options.input_cov:
            self._covariance = MomentState(1, method.inputs, True, method.device)
        self._method = method
        return method

    def _set_up(self, x: Tensor) -> Method:
        """Learn the widths of a head that is no chain from a few rows (made up where there are none)."""
        x = x if len(x) else x.new_zeros(1, x.shape[1])
        unused = torch.zeros(1, dtype=torch.int64, device=x.device)
        u, y = AutogradRows(self._parsed, x.dtype).forward(run_prefix(x, self._parsed.prefix, unused))
        return self._start_autograd(u.shape[1], y.shape[1], str(x.dtype).removeprefix("torch."), x.device)

    def _start_autograd(self, inputs: int, outputs: int, dtype: str, device: torch.device | None = None) -> Method:
        if self._parsed.chain:
            raise InputError("agop: the state does not fit a chain of Linear layers")
        device = self._parsed.device or device or torch.device("cpu")
        rows = AutogradRows(self._parsed, getattr(torch, dtype))
        return self._start(AutogradMethod(rows, inputs, outputs, device, self.options))

    def _shape(self, method: Method) -> tuple[int, int, str]:
        """What ``_start_autograd`` makes such a method from."""
        return method.inputs, method.outputs, str(method.dtype).removeprefix("torch.")

    def _states(self, method: Method) -> list[Any]:
        return [state for state in (method.state, self._covariance) if state is not None]

    def _unshare(self, method: Method) -> None:
        """A result keeps the sums it was made from, so copy them before they change."""
        if self._shared:
            method.unshare()
            self._shared = False

    def _input_moments(self, nonfinite: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self._covariance is None or self._covariance.mean is None or not self._n:
            return None, None
        upper = self._covariance.gram.triu()
        covariance = (upper + upper.triu(1).t()) / self._n
        return primitives.nan_where(nonfinite, covariance), self._covariance.mean[0].clone()

    def _check_head(self) -> None:
        if _tensor_versions(self._head) != self._versions:
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
        first = next(iter([*self._parsed.prefix, *self._parsed.chain]), None)
        if isinstance(first, Affine) and first.weight.shape[1] != x.shape[1]:
            raise InputError(
                f"agop: inputs have {x.shape[1]} columns but the head's first Linear takes {first.weight.shape[1]}"
            )

    def _check_rows(self, x: Tensor, method: Method) -> None:
        """Perturb one row, for heads with parts of unknown make; check the promise of ``agop_layers()`` as well."""
        self._checked = True
        prefix, name = self._parsed.prefix, type(self._head).__name__
        if not prefix and not isinstance(method, AutogradMethod) and not hasattr(self._head, "agop_layers"):
            return
        unused = torch.zeros_like(method.nonfinite)
        if isinstance(method, AutogradMethod):
            check_independent_rows(
                lambda x: method.rows.forward(run_prefix(x, prefix, unused))[1], x, f"the head ({name})"
            )
        elif any(isinstance(module, nn.Module) for module in prefix):
            check_independent_rows(lambda x: run_prefix(x, prefix, unused), x, "the part before the layer")
        if not hasattr(self._head, "agop_layers") or not len(x) or not self._parsed.chain:
            return
        listed, _ = forward_chain(run_prefix(x, prefix, unused), self._parsed.chain, unused)
        real = self._head(x.to(self._parsed.dtype)).to(listed.dtype)
        tolerance = 1e3 * torch.finfo(self._parsed.dtype or x.dtype).eps
        if real.shape != listed.shape or not torch.allclose(
            real, listed, rtol=tolerance, atol=tolerance * float(real.abs().max()), equal_nan=True
        ):
            raise InputError(
                f"agop: {name}.agop_layers() does not compute what the head computes on the same "
                "rows; list every layer and activation in forward order, or remove the method"
            )


def _fingerprint(head: nn.Module, options: Sequence[object]) -> str:
    """SHA-256 of the head's structure, of its weights and of the options that give the sums their meaning."""
    digest = hashlib.sha256(repr((str(head), *options)).encode())
    for name, tensor in sorted(head.state_dict().items()):
        if isinstance(tensor, Tensor):
            data = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(data.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensor_versions(head: nn.Module) -> list[tuple[int, int]]:
    """Identity and in-place version of every weight and buffer: other values after an optimiser step or a load."""
    tensors = [*head.parameters(), *head.buffers()]
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


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
