"""Read a head: which part of it is Linear layers and elementwise activations, and where the requested layer is."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mmc_fast._util.numbers import plain
from mmc_fast.errors import InputError

__all__ = [
    "Activation",
    "Affine",
    "OpaqueHead",
    "ParsedHead",
    "fingerprint",
    "parse_head",
    "refuse_training_mode",
    "tensor_versions",
]

_NAMED = (nn.SiLU, nn.Tanh, nn.Sigmoid)
_ELEMENTWISE = (
    nn.ReLU, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.Softplus,
    nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Mish, nn.Softsign, nn.LogSigmoid, nn.SELU, nn.CELU,
    nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.PReLU,
)  # fmt: skip
_DROPOUT = (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_BATCH_NORM = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True)
class Activation:
    """An elementwise function between two affine maps.

    ``kind`` is "relu", "leaky_relu", the name of a smooth function with its own kernel, or "elementwise" for the rest;
    ``alpha`` is the negative slope of leaky ReLU, the scale of ELU, the beta of softplus.
    """

    kind: str
    function: Callable[[Tensor], Tensor]
    alpha: float = 1.0


@dataclass(frozen=True)
class Affine:
    """``z = x Wᵀ + b``, then the activation that follows it (None: the next affine map follows at once)."""

    weight: Tensor  # [out, in]
    bias: Tensor | None  # [out]
    activation: Activation | None


@dataclass(frozen=True)
class ParsedHead:
    """Modules before the requested layer, then a chain of affine maps and activations from that layer to the output."""

    prefix: list[nn.Module | Affine]
    chain: list[Affine]
    layer: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class OpaqueHead:
    """A head that is differentiated by autograd: ``tail`` maps the layer's input to the output.

    Where ``inner`` is set, ``tail`` is the whole head and the layer's input is what the module ``inner`` receives.
    """

    prefix: list[nn.Module | Affine]
    tail: nn.Module
    inner: nn.Module | None
    layer: int | str
    dtype: torch.dtype | None  # None: no parameters, take that of the inputs
    device: torch.device | None
    reason: str


def parse_head(
    head: nn.Module, layer: int | str, compute_dtype: Callable[[torch.dtype], torch.dtype]
) -> ParsedHead | OpaqueHead:
    """Split ``head`` at the requested layer; raises InputError for a head or a layer that has no meaning."""
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"agop: head is {type(head).__name__}; pass a torch.nn.Module (wrap a function in one, "
            "or a model in the part that follows its fusion)"
        )
    floating: list[Tensor] = [t for t in head.parameters() if t.is_floating_point()]
    floating += [t for t in head.buffers() if t.is_floating_point()]
    if any(t.is_complex() for t in head.parameters()):
        raise InputError("agop: the head has complex parameters; real ones are supported")
    dtype = floating[0].dtype if floating else None
    device = floating[0].device if floating else None
    modules: list[Any] = _flatten(head)
    layer = plain(layer)
    if isinstance(layer, bool) or not isinstance(layer, (int, str)):
        raise TypeError(
            f"agop: layer is {type(layer).__name__}; pass an index over the Linear layers or a module's name"
        )
    positions = [i for i, module in enumerate(modules) if _is_linear(module)]
    if isinstance(layer, str):
        inner = None if layer == "input" else _find(head, layer)
        named = [k for k, i in enumerate(positions) if modules[i] is inner or (inner is None and i == 0)]
        if not named:
            reason = f"layer={layer!r} is not one of the chain's Linear layers"
            return OpaqueHead([], head, inner, layer, dtype, device, reason)
        layer = named[0]
    if len(modules) == 1 and not positions:
        if layer != 0:
            raise InputError(
                f"agop: layer={layer} has no meaning for {type(head).__name__}, whose order of layers is not known; "
                "pass layer=0 (its input), the name of an nn.Linear inside it (layer='mlp.0'), or give it agop_layers()"
            )
        return OpaqueHead([], head, None, 0, dtype, device, f"{type(head).__name__} is not a chain of Linear layers")
    if not positions:
        raise InputError("agop: the head has no nn.Linear; there is no layer whose input G could belong to")
    if not -len(positions) <= layer < len(positions):
        raise InputError(
            f"agop: layer={layer} but the head has {len(positions)} Linear layer(s); "
            f"allowed are {-len(positions)}..{len(positions) - 1}"
        )
    layer %= len(positions)
    start = positions[layer]
    head_dtype = modules[start].weight.dtype
    compute = compute_dtype(head_dtype)
    prefix = _prefix(modules[:start], compute)
    tail = modules[start:]
    strange = next((module for module in tail if not _is_chain_member(module)), None)
    if strange is not None:
        reason = f"{type(strange).__name__} is neither Linear nor a known elementwise activation"
        return OpaqueHead(prefix, nn.Sequential(*tail), None, layer, dtype, device, reason)
    _check_widths(modules)
    chain = _affine_chain(tail, compute)
    return ParsedHead(prefix, chain, layer, head_dtype, chain[0].weight.device)


def refuse_training_mode(head: nn.Module) -> None:
    """Raise where batch normalisation or dropout would make the rows of a batch depend on each other or on chance."""
    for name, module in head.named_modules():
        where = f"head.{name}" if name else "the head"
        if isinstance(module, _BATCH_NORM) and (module.training or module.running_mean is None):
            raise InputError(
                f"agop: {where} ({type(module).__name__}) normalises with the statistics of the batch, so the rows "
                "depend on each other and there is no Jacobian per sample; call head.eval() first"
            )
        if isinstance(module, _DROPOUT) and module.training and module.p > 0:
            raise InputError(
                f"agop: {where} ({type(module).__name__}, p={module.p}) is in training mode, so Jacobians are random; "
                "call head.eval() first"
            )


def fingerprint(head: nn.Module, options: Sequence[object]) -> str:
    """SHA-256 of the head's structure, of its weights and of the options that give the sums their meaning."""
    digest = hashlib.sha256(repr((str(head), *options)).encode())
    for name, tensor in sorted(head.state_dict().items()):
        if isinstance(tensor, Tensor):
            data = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(data.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tensor_versions(head: nn.Module) -> list[tuple[int, int]]:
    """Identity and in-place version of every weight and buffer: other values after an optimiser step or a load."""
    tensors = [*head.parameters(), *head.buffers()]
    return [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]


def _flatten(head: nn.Module) -> list[nn.Module]:
    layers: Any = getattr(head, "agop_layers", None)
    if callable(layers):
        return [leaf for module in layers() for leaf in _flatten(module)]
    if isinstance(head, nn.Sequential) and type(head).forward is nn.Sequential.forward and not _has_hooks(head):
        return [leaf for child in head for leaf in _flatten(child)]
    return [head]


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether the module runs the stock forward of one of ``kinds`` (a subclass or a hook may compute anything)."""
    return not _has_hooks(module) and any(
        isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds
    )


def _is_linear(module: nn.Module) -> bool:
    return _plain(module, (nn.Linear,))


def _is_identity(module: nn.Module) -> bool:
    if _plain(module, (nn.Identity,)):
        return True
    return _plain(module, _DROPOUT) and (not module.training or getattr(module, "p", 1) == 0)


def _is_chain_member(module: nn.Module) -> bool:
    return _is_linear(module) or _is_identity(module) or _plain(module, _ELEMENTWISE)


def _check_widths(modules: Sequence[Any]) -> None:
    previous, index = None, -1
    for module in modules:
        if _is_linear(module):
            index += 1
            columns = module.weight.shape[1]
            if previous is not None and columns != previous:
                raise InputError(
                    f"agop: weight[{index}] has {columns} columns but weight[{index - 1}] has {previous} rows; "
                    "did you pass Linear.weight.T?"
                )
            previous = module.weight.shape[0]
        elif not _is_chain_member(module):
            previous = None  # an unknown module may change the width


def _prefix(modules: Sequence[Any], dtype: torch.dtype) -> list[nn.Module | Affine]:
    steps: list[nn.Module | Affine] = []
    for module in modules:
        if _is_linear(module):
            steps.append(_affine(module, None, dtype))
        elif not _is_identity(module):
            steps.append(_cast(module, dtype))
    return steps


def _affine_chain(modules: Sequence[Any], dtype: torch.dtype) -> list[Affine]:
    chain: list[Affine] = []
    linear: Any = None
    between: list[nn.Module] = []
    for module in [*modules, None]:
        if module is not None and not _is_linear(module):
            if not _is_identity(module):
                between.append(module)
            continue
        if linear is not None:
            chain.append(_affine(linear, _activation(between, dtype), dtype))
        linear, between = module, []
    return chain


def _affine(module: Any, activation: Activation | None, dtype: torch.dtype) -> Affine:
    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach().to(device=weight.device, dtype=dtype)
    return Affine(weight.to(dtype).contiguous(), bias, activation)


def _cast(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module itself, or a copy where its parameters have another dtype or where it would overwrite its input."""
    tensors = [*module.parameters(), *module.buffers()]
    inplace = [m for m in module.modules() if getattr(m, "inplace", False)]
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
    module: Any = modules[0]
    if isinstance(module, nn.ReLU):
        return Activation("relu", torch.relu)
    if isinstance(module, nn.LeakyReLU):
        slope = module.negative_slope
        return Activation("leaky_relu", partial(nn.functional.leaky_relu, negative_slope=slope), slope)
    if isinstance(module, nn.GELU):
        name = "gelu_tanh" if module.approximate == "tanh" else "gelu"
        return Activation(name, partial(nn.functional.gelu, approximate=module.approximate))
    if isinstance(module, nn.ELU):
        return Activation("elu", partial(nn.functional.elu, alpha=module.alpha), module.alpha)
    if isinstance(module, nn.Softplus):
        kind = "softplus" if module.threshold == 20 else "elementwise"
        function = partial(nn.functional.softplus, beta=module.beta, threshold=module.threshold)
        return Activation(kind, function, module.beta)
    if isinstance(module, _NAMED):
        name = type(module).__name__.lower()
        functions: dict[str, Callable[[Tensor], Tensor]]
        functions = {"silu": nn.functional.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}
        return Activation(name, functions[name])
    return Activation("elementwise", _cast(module, dtype))


def _find(head: nn.Module, name: str) -> nn.Module:
    found = dict(head.named_modules()).get(name)
    if found is None:
        raise InputError(f"agop: the head has no module named {name!r}; see [n for n, _ in head.named_modules()]")
    return found
