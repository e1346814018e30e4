"""``mmc_fast.graphed``: forward and backward of a head or a step as two CUDA graphs, so that the host launches twice."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mmc_fast.errors import InputError

from .ebr import EBRHead

_DEVICE = "cuda"


def graphed(
    step: Callable[..., Any], /, *args: Any, modules: Iterable[nn.Module] | None = None, **kwargs: Any
) -> Callable[..., Any]:
    """Capture forward and backward of ``step(*args, **kwargs)`` in CUDA graphs; returns what is called in its place.

    A call copies its tensors into those of the capture and launches one graph, its backward another
    (``torch.cuda.make_graphed_callables``): the host's cost no longer depends on the number of kernels. No graph has run on
    hardware so far.

    Fixed by the capture: every shape and dtype, which tensors and parameters take gradients; which arguments are tensors (``present`` given or None);
    the values of all other arguments (λ as a float; a 0-d tensor on the device may change from call to call);
    training or evaluation mode, autocast, PyTorch's precision switches and the addresses of the parameters, which
    optimizers keep. The step must not read numbers on the host.

    Results and gradients are the graph's own memory, which the next call overwrites: clone what is to stay, run each
    backward before the next call, and call ``optimizer.zero_grad(set_to_none=True)`` between steps. Gradients cannot be
    accumulated over calls.

    Args:
        step: an :class:`mmc_fast.nn.EBRHead`, another module, or a function of tensors.
        args, kwargs: an example call, on one CUDA device; sequences and mappings of tensors are allowed.
        modules: those whose parameters a function trains (``[]``: none). A module brings its own.

    Raises:
        InputError: CUDA is missing, a tensor or parameter is elsewhere, a function comes without ``modules``, a modality
            of a head is None (give zeros and ``present``); in a call: something fixed has changed, gradients of the last
            step are still there, or a backward comes after the next call.
        RuntimeError: from torch, where the step cannot be captured.

    Examples:
        >>> head = mmc_fast.nn.EBRHead([64, 48], latent_dim=32, hidden_dim=64, psi_dims=(16,))
        >>> if torch.cuda.is_available():
        ...     features, lambda_ = [torch.randn(8, d, device="cuda") for d in head.dims], torch.ones((), device="cuda")
        ...     fast = mmc_fast.graphed(head.cuda(), features, reversal=lambda_)
        ...     fast(features, reversal=lambda_ / 2).discrimination_loss.backward()
    """
    if not torch.cuda.is_available():
        raise InputError("graphed: torch sees no CUDA device, and only CUDA has graphs; call the step itself")
    if modules is None and not isinstance(step, nn.Module):
        raise InputError("graphed: a function does not tell what it trains; give modules=[...] ([] for no parameters)")
    return _Graphed(step, [step] if isinstance(step, nn.Module) else list(modules or ()), args, kwargs)


class _Flat(nn.Module):
    """The step as a module of tensors alone, which is what torch captures; everything else is as in the example call."""

    def __init__(self, step: Callable[..., Any], modules: list[nn.Module], leaves: list[Any], spec: Any) -> None:
        super().__init__()
        self.modules_trained = nn.ModuleList(modules)
        self.step, self.leaves, self.spec = [step], leaves, spec  # a list, so that a module is not registered twice

    def forward(self, *tensors: Tensor) -> Any:
        given = iter(tensors)
        args, kwargs = pytree.tree_unflatten(
            [next(given) if isinstance(t, Tensor) else t for t in self.leaves], self.spec
        )
        return self.step[0](*args, **kwargs)


class _Graphed:
    def __init__(self, step: Callable[..., Any], modules: list[nn.Module], args: Any, kwargs: Any) -> None:
        named, self._spec = pytree.tree_flatten_with_path((args, dict(sorted(kwargs.items()))))
        self._names = [_name(path) for path, _ in named]
        self._leaves = [_sample(leaf) for _, leaf in named]
        self._parameters = list(dict.fromkeys(itertools.chain.from_iterable(m.parameters() for m in modules)))
        features = args[0] if args else kwargs.get("features")
        if isinstance(step, EBRHead) and any(f is None for f in pytree.tree_leaves(features)):
            raise InputError("graphed: a modality is None; give zeros, and present with its column False")
        tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        places = [*zip(self._names, self._leaves, strict=True), *(("a parameter", p) for p in self._parameters)]
        device = tensors[0].device if tensors else None
        for name, t in places:
            if isinstance(t, Tensor) and (t.device.type != _DEVICE or t.device != device):
                raise InputError(
                    f"graphed: {name} is on {t.device}; all must be on one CUDA device, move it with .to()"
                )
        if device is None:
            raise InputError("graphed: no tensor in the example call; give it as you would call the step")
        self._trained, self._modes = modules, [m.training for m in modules]
        self._addresses = self._places()
        self._calls = 0
        flat = _Flat(step, modules, self._leaves, self._spec)
        # torch captures no casts that autocast keeps for later calls
        dtype, enabled = torch.get_autocast_dtype(_DEVICE), torch.is_autocast_enabled(_DEVICE)
        with torch.cuda.device(device), torch.autocast(_DEVICE, dtype=dtype, enabled=enabled, cache_enabled=False):
            self._replay = torch.cuda.make_graphed_callables(flat, tuple(tensors), allow_unused_input=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, dict(sorted(kwargs.items()))))
        if spec != self._spec:
            raise InputError(
                "graphed: the arguments are not those of the capture; give as many, by the same names, in the same order"
            )
        for name, mine, theirs in zip(self._names, self._leaves, leaves, strict=True):
            _same(name, mine, theirs)
        if [m.training for m in self._trained] != self._modes:
            raise InputError(
                "graphed: training or evaluation mode has changed since the capture; capture once for each"
            )
        if self._places() != self._addresses:
            raise InputError(
                "graphed: parameters were moved (.to(), new .data) or (un)frozen since the capture; capture again"
            )
        training = torch.is_grad_enabled()
        if training and any(p.grad is not None for p in self._parameters):
            raise InputError(
                "graphed: gradients of the last step are still there and would be overwritten; call "
                "optimizer.zero_grad(set_to_none=True) first"
            )
        self._calls += 1
        out = self._replay(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        if training:
            self._watch(out, self._calls)
        return out

    def _places(self) -> list[tuple[int, bool]]:
        return [(p.data_ptr(), p.requires_grad) for p in self._parameters]

    def _watch(self, out: Any, call: int) -> None:
        def before_backward(_: Any) -> None:
            if call != self._calls:
                raise InputError(
                    "graphed: a later call has overwritten what this backward needs; run it before that call"
                )

        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.grad_fn is not None:  # one node for all results
                leaf.grad_fn.register_prehook(before_backward)
                return


def _sample(leaf: Any) -> Any:
    """Memory of the graph's own: the caller's tensor may change, and must not be what every call writes to."""
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _same(name: str, mine: Any, theirs: Any) -> None:
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        for what in ("shape", "dtype", "device"):
            was, now = getattr(mine, what), getattr(theirs, what)
            if was != now:
                raise InputError(
                    f"graphed: {what} of {name} was {was} in the capture and is {now}; capture again for it"
                )
        if torch.is_grad_enabled() and theirs.requires_grad and not mine.requires_grad:
            raise InputError(f"graphed: {name} asks for a gradient and did not in the capture; capture again with it")
    elif isinstance(mine, Tensor) or isinstance(theirs, Tensor) or mine != theirs:
        told = ["a tensor" if isinstance(t, Tensor) else repr(t) for t in (mine, theirs)]
        raise InputError(
            f"graphed: {name} was {told[0]} in the capture and is {told[1]}; what may change is a tensor (λ: 0-d, on the device)"
        )


def _name(path: Any) -> str:
    """``features[0]``-like name of an argument; positional ones count from 0."""
    which, *rest = path
    name = f"argument {rest[0].idx}" if which.idx == 0 else str(rest[0].key)
    return name + pytree.keystr(tuple(rest[1:]))
