"""Read a head: which part of it is Linear layers and elementwise activations, and where the requested layer is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmc_fast._util.numbers import plain
from mmc_fast.errors import InputError

_ELEMENTWISE = (
    nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.Softplus,
    nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.Softsign, nn.LogSigmoid, nn.SELU, nn.CELU,
    nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.PReLU,
)  # fmt: skip
_DROPOUT = (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class Activation:
    """An elementwise function between two affine maps.

    ``kind`` is "relu", "leaky_relu", the name of a smooth function with its own kernel, or "elementwise" for the rest;
    ``alpha`` is the negative slope of leaky ReLU, the scale of ELU, the beta of softplus, and ``beta`` its threshold.
    """

    kind: str
    function: Callable[[Tensor], Tensor]
    alpha: float = 0.0
    beta: float = 0.0


@dataclass(frozen=True)
class Affine:
    """``z = x Wᵀ + b``, then the activation that follows it (None: the next affine map follows at once)."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]
    activation: Activation | None


@dataclass(frozen=True)
class ParsedHead:
    """A head split at the requested layer: ``prefix`` makes the layer's input u, the rest makes the output of u.

    The rest is ``chain``, or where that is empty the module ``tail``, which autograd differentiates. Where ``inner``
    is set, ``tail`` is the whole head and u is what the module ``inner`` receives.
    """

    layer: int | str
    dtype: torch.dtype | None  # None: no parameters, take that of the inputs
    device: torch.device | None
    prefix: list[nn.Module | Affine] = field(default_factory=list)
    chain: list[Affine] = field(default_factory=list)
    tail: nn.Module = field(default_factory=nn.Identity)
    inner: nn.Module | None = None


def parse_head(head: nn.Module, layer: int | str, compute_dtype: Callable[[torch.dtype], torch.dtype]) -> ParsedHead:
    """Split ``head`` at the requested layer; raises InputError for a head or a layer that has no meaning."""
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"agop: head is {type(head).__name__}; pass a torch.nn.Module (wrap a function in one, "
            "or a model in the part that follows its fusion)"
        )
    if any(t.is_complex() for t in head.parameters()):
        raise InputError("agop: the head has complex parameters; real ones are supported")
    layer = plain(layer)
    if isinstance(layer, bool) or not isinstance(layer, (int, str)):
        raise TypeError(
            f"agop: layer is {type(layer).__name__}; pass an index over the Linear layers or a module's name"
        )
    floating = next((t for t in [*head.parameters(), *head.buffers()] if t.is_floating_point()), None)
    dtype, device = (None, None) if floating is None else (floating.dtype, floating.device)
    modules: list[Any] = flatten(head)
    positions = [i for i, module in enumerate(modules) if is_linear(module)]
    if isinstance(layer, str):
        inner = None if layer == "input" else _find(head, layer)
        named = [k for k, i in enumerate(positions) if modules[i] is inner or (inner is None and i == 0)]
        if not named:
            return ParsedHead(layer, dtype, device, tail=head, inner=inner)
        layer = named[0]
    if len(modules) == 1 and not positions:
        if layer != 0:
            raise InputError(
                f"agop: layer={layer} has no meaning for {type(head).__name__}, whose order of layers is not known; "
                "pass layer=0 (its input), the name of an nn.Linear inside it (layer='mlp.0'), or give it agop_layers()"
            )
        return ParsedHead(0, dtype, device, tail=head)
    if not positions:
        raise InputError("agop: the head has no nn.Linear; there is no layer whose input G could belong to")
    if not -len(positions) <= layer < len(positions):
        raise InputError(
            f"agop: layer={layer} but the head has {len(positions)} Linear layer(s); "
            f"allowed are {-len(positions)}..{len(positions) - 1}"
        )
    layer %= len(positions)
    start = positions[layer]
    weight = modules[start].weight
    compute = compute_dtype(weight.dtype)
    prefix, tail = _prefix(modules[:start], compute), modules[start:]
    if not all(is_chain_member(module) for module in tail):
        return ParsedHead(layer, dtype, device, prefix, tail=nn.Sequential(*tail))
    _check_widths(modules)
    return ParsedHead(layer, weight.dtype, weight.device, prefix, _affine_chain(tail, compute))


def linear_chain(head: nn.Module | None) -> list[nn.Module] | None:
    """The modules of a head that begins with a Linear layer and is a chain of such and activations; None for any other."""
    modules = [] if head is None else flatten(head)
    if not modules or not is_linear(modules[0]) or not all(map(is_chain_member, modules)):
        return None
    return modules


def refuse_training_mode(head: nn.Module) -> None:
    """Raise where batch normalisation or dropout would make the rows of a batch depend on each other or on chance."""
    for name, module in head.named_modules():
        where = f"head.{name}" if name else "the head"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise InputError(
                f"agop: {where} ({type(module).__name__}) normalises with the statistics of the batch, so the rows "
                "depend on each other and there is no Jacobian per sample; call head.eval() first"
            )
        if isinstance(module, _DROPOUT) and module.training and module.p > 0:
            raise InputError(
                f"agop: {where} ({type(module).__name__}, p={module.p}) is in training mode, so Jacobians are random; "
                "call head.eval() first"
            )


def flatten(head: nn.Module) -> list[nn.Module]:
    """The modules that run one after the other, through nesting and ``agop_layers()``; a head of its own is one."""
    layers: Any = getattr(head, "agop_layers", None)
    if callable(layers):
        return [leaf for module in layers() for leaf in flatten(module)]
    if isinstance(head, nn.Sequential) and type(head).forward is nn.Sequential.forward and not _has_hooks(head):
        return [leaf for child in head for leaf in flatten(child)]
    return [head]


def is_linear(module: nn.Module) -> bool:
    """Whether the module is an ``nn.Linear`` whose forward is the stock one."""
    return _is_plain(module, (nn.Linear,))


def is_chain_member(module: nn.Module) -> bool:
    """Whether the closed forms know the module: Linear, a known elementwise activation, or something that does nothing."""
    return is_linear(module) or _is_identity(module) or _is_plain(module, _ELEMENTWISE)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether the module runs the stock forward of one of ``kinds`` (a subclass or a hook may compute anything)."""
    return not _has_hooks(module) and any(
        isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds
    )


def _is_identity(module: nn.Module) -> bool:
    if _is_plain(module, (nn.Identity,)):
        return True
    return _is_plain(module, _DROPOUT) and (not module.training or getattr(module, "p", 1) == 0)


def _check_widths(modules: Sequence[Any]) -> None:
    rows, index = None, -1
    for module in modules:
        if is_linear(module):
            index += 1
            columns = module.weight.shape[1]
            if rows is not None and columns != rows:
                raise InputError(
                    f"agop: weight[{index}] has {columns} columns but weight[{index - 1}] has {rows} rows; "
                    "did you pass Linear.weight.T?"
                )
            rows = module.weight.shape[0]
        elif not is_chain_member(module):
            rows = None  # an unknown module may change the width


def _prefix(modules: Sequence[Any], dtype: torch.dtype) -> list[nn.Module | Affine]:
    return [
        _affine(module, [], dtype) if is_linear(module) else _cast(module, dtype)
        for module in modules
        if not _is_identity(module)
    ]


def _affine_chain(modules: Sequence[Any], dtype: torch.dtype) -> list[Affine]:
    """The modules as affine maps; the first is Linear."""
    modules = [module for module in modules if not _is_identity(module)]
    starts = [i for i, module in enumerate(modules) if is_linear(module)]
    stops = [*starts[1:], len(modules)]
    return [_affine(modules[i], modules[i + 1 : j], dtype) for i, j in zip(starts, stops, strict=True)]


def _affine(linear: Any, activations: Sequence[nn.Module], dtype: torch.dtype) -> Affine:
    weight = linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach().to(device=weight.device, dtype=dtype)
    return Affine(weight.to(dtype).contiguous(), bias, _activation(activations, dtype))


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module itself, or a copy where its parameters have another dtype or where it would overwrite its input."""
    tensors = [*module.parameters(), *module.buffers()]
    inplace = any(getattr(m, "inplace", False) for m in module.modules())
    if inplace or any(t.is_floating_point() and t.dtype != dtype for t in tensors):
        module = copy.deepcopy(module).to(dtype)
        for inner in module.modules():
            if getattr(inner, "inplace", False):
                inner.inplace = False  # type: ignore[assignment]
    return module


def _activation(modules: Sequence[nn.Module], dtype: torch.dtype) -> Activation | None:
    if not modules:
        return None
    if len(modules) > 1:
        return Activation("elementwise", nn.Sequential(*(_cast(module, dtype) for module in modules)))
    match modules[0]:
        case nn.ReLU():
            return Activation("relu", torch.relu)
        case nn.LeakyReLU(negative_slope=slope):
            return Activation("leaky_relu", partial(F.leaky_relu, negative_slope=slope), slope)
        case nn.GELU(approximate=form):
            return Activation("gelu_tanh" if form == "tanh" else "gelu", partial(F.gelu, approximate=form))
        case nn.ELU(alpha=alpha):
            return Activation("elu", partial(F.elu, alpha=alpha), alpha)
        case nn.Softplus(beta=beta, threshold=end):
            return Activation("softplus", partial(F.softplus, beta=beta, threshold=end), beta, end)
        case nn.SiLU():
            return Activation("silu", F.silu)
        case nn.Tanh():
            return Activation("tanh", torch.tanh)
        case nn.Sigmoid():
            return Activation("sigmoid", torch.sigmoid)
        case module:
            return Activation("elementwise", _cast(module, dtype))


def _find(head: nn.Module, name: str) -> nn.Module:
    found = dict(head.named_modules()).get(name)
    if found is None:
        raise InputError(f"agop: the head has no module named {name!r}; see [n for n, _ in head.named_modules()]")
    return found
