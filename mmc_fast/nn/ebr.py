"""``EBRHead``: the encode-reconstruct-discriminate head, a drop-in layer behind unimodal encoders."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmc_fast._util.autocast import autocast_enabled
from mmc_fast.errors import InputError
from mmc_fast.functional import EBROutput, ebr_step

from . import by_modules

_OPTIONS = "_extra_state"  # the key that torch keeps for what is no tensor
_FORMAT = "mmc_fast.ebr"


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Linear(fan_in, fan_out)] if n == 0 else [nn.ReLU(), nn.Linear(fan_in, fan_out)]
    return nn.Sequential(*layers)


class _ByModality(nn.ModuleList):
    """A list of modules whose keys in the state dict are the names of the modalities."""

    def __init__(self, names: Iterable[str], modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self._modules.update(zip(names, modules, strict=True))

    def __getitem__(self, key: Any) -> Any:
        return self._modules[key] if isinstance(key, str) else list(self._modules.values())[key]


class EBRHead(nn.Module):
    """Explicit basis reallocation for m modalities of widths ``dims``.

    ``recovered, latents, L_md, L_rec = head(features)``: feed ``recovered`` to your fusion in place of ``features``
    and add ``L_md`` (its reversal is already inside) to your loss. Formulas: :func:`mmc_fast.functional.ebr_step`.

    Args:
        dims: widths ``d_i`` of the features, a sequence or an ordered mapping name -> width.
        latent_dim: width k of the latents.
        hidden_dim: width h of the hidden layers of encoders and decoders.
        psi_dims: hidden widths of the discriminator ψ.
        residual, normalize, backend, recompute: see :func:`mmc_fast.functional.ebr_step`.

    Parameters are plain layers, and the state dict is theirs: ``encoders[i]`` = Linear(d_i, h), ReLU, Linear(h, k);
    ``decoders[i]`` = Linear(k, h), ReLU, Linear(h, d_i); ``discriminator`` = Linear(k, p_1), ReLU, ..., Linear(p, m).
    With a mapping the keys are the names (``encoders.image.0.weight``), and the state dict also tells names, order, widths
    and options (``_extra_state``, JSON as uint8): it loads into an equal head only.

    Layers that are no plain linear layers any more (adapters, quantised layers, hooks) and calls under ``torch.func``
    run one by one instead of through the fused op, to the same values.

    Raises:
        ValueError: no modality, a width below 1, a name with a dot, or (in the call) names, shapes or dtypes that do not
            fit, features that are no tensors.

    Source: Chaudhuri et al., ICML 2025, section 3.3; sizes from its appendix (h 1024, k 512, ψ 512-256).

    Examples:
        >>> head = mmc_fast.nn.EBRHead({"image": 64, "audio": 48}, latent_dim=32, hidden_dim=64, psi_dims=(16,))
        >>> out = head({"image": torch.randn(8, 64), "audio": torch.randn(8, 48)}, reversal=0.1)
        >>> {name: list(r.shape) for name, r in out.recovered.items()}
        {'image': [8, 64], 'audio': [8, 48]}
        >>> (out.discrimination_loss + 0.1 * out.reconstruction_loss).backward()
    """

    def __init__(
        self,
        dims: Sequence[int] | Mapping[str, int],
        latent_dim: int = 512,
        hidden_dim: int = 1024,
        psi_dims: Sequence[int] = (512, 256),
        residual: bool = False,
        normalize: bool = False,
        backend: str = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.names = list(dims) if isinstance(dims, Mapping) else None
        self.dims = [int(d) for d in (dims.values() if isinstance(dims, Mapping) else dims)]
        sizes = {"latent_dim": latent_dim, "hidden_dim": hidden_dim}
        sizes |= {f"dims[{i}]": d for i, d in enumerate(self.dims)} | {
            f"psi_dims[{i}]": p for i, p in enumerate(psi_dims)
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"EBRHead: {name} is {value}; widths must be at least 1")
        if not self.dims:
            raise ValueError("EBRHead: dims is empty; give the width of at least one modality")
        for name in self.names or ():
            if not isinstance(name, str) or not name or "." in name:
                raise InputError(f"EBRHead: a modality is named {name!r}; give a word without dots, it becomes a key")
        self.latent_dim, self.hidden_dim = int(latent_dim), int(hidden_dim)
        self.psi_dims = tuple(int(p) for p in psi_dims)
        self.residual, self.normalize = residual, normalize
        self.backend, self.recompute = backend, recompute
        encoders = [_mlp(d, hidden_dim, latent_dim) for d in self.dims]
        decoders = [_mlp(latent_dim, hidden_dim, d) for d in self.dims]
        self.encoders = nn.ModuleList(encoders) if self.names is None else _ByModality(self.names, encoders)
        self.decoders = nn.ModuleList(decoders) if self.names is None else _ByModality(self.names, decoders)
        self.discriminator = _mlp(latent_dim, *self.psi_dims, len(self.dims))

    def forward(
        self,
        features: Sequence[Tensor | None] | Mapping[str, Tensor | None],
        present: Tensor | None = None,
        source: Tensor | None = None,
        reversal: float | Tensor = 1.0,
        normalizer: Tensor | None = None,
    ) -> EBROutput:
        """Apply the head; a mapping in gives a mapping out. Arguments: :func:`mmc_fast.functional.ebr_step`."""
        named = isinstance(features, Mapping)
        listed = self._ordered(features) if isinstance(features, Mapping) else list(features)
        listed = _one_dtype(self._tensors_only(listed))
        params = plain_parameters(self)
        if params is None:
            out = by_modules.step(self, listed, present, source, reversal, normalizer)
        else:
            m = len(self.dims)
            out = ebr_step(
                listed,
                params[:m],
                params[m : 2 * m],
                params[-1],
                present=present,
                source=source,
                reversal=reversal,
                normalizer=normalizer,
                residual=self.residual,
                normalize=self.normalize,
                backend=self.backend,
                recompute=self.recompute,
            )
        if named:
            out = out._replace(recovered={name: out.recovered[i] for i, name in enumerate(self.names or [])})
        return out

    def _ordered(self, features: Mapping[str, Tensor | None]) -> list[Tensor | None]:
        if self.names is None:
            raise ValueError(
                "EBRHead: features is a mapping but dims was a sequence; build the head with {name: width}"
            )
        if set(features) != set(self.names):
            raise ValueError(
                f"EBRHead: features has {sorted(features)}; expected {self.names} (None for an absent modality)"
            )
        return [features[name] for name in self.names]

    def _tensors_only(self, features: list[Tensor | None]) -> list[Tensor | None]:
        for i, f in enumerate(features):
            if f is not None and not isinstance(f, Tensor):
                name = self.names[i] if self.names else i
                raise InputError(
                    f"EBRHead: features of {name!r} are {type(f).__name__}; give a tensor, for example torch.as_tensor(x)"
                )
        return features

    def options(self) -> dict[str, Any]:
        """What identifies the head beside its weights: modalities in order, widths, sizes, options of the step."""
        return {
            "format": _FORMAT,
            "modalities": self.names,
            "dims": self.dims,
            "latent_dim": self.latent_dim,
            "hidden_dim": self.hidden_dim,
            "psi_dims": list(self.psi_dims),
            "residual": self.residual,
            "normalize": self.normalize,
        }

    def check_options(self, theirs: Mapping[str, Any], what: str = "EBRHead") -> None:
        """Refuse the options of weights that belong to another head, in one line with what differs."""
        mine = self.options()
        differing = [key for key in mine if key != "apply" and key in theirs and theirs[key] != mine[key]]
        if differing:
            told = "; ".join(f"{key} of the weights is {theirs[key]}, of the model {mine[key]}" for key in differing)
            raise InputError(f"{what}: {told}; build the same heads, or use mmc_fast.load_ebr, which does")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.names is not None:
            told = json.dumps(self.options()).encode()
            destination[prefix + _OPTIONS] = torch.tensor(list(told), dtype=torch.uint8, device="cpu")

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *args: Any
    ) -> None:
        theirs = read_options(state_dict.pop(prefix + _OPTIONS, None))
        if theirs is not None:
            if self.names is None:  # a head without names takes the weights of a named one by order
                for part, (i, name) in itertools.product(
                    ("encoders", "decoders"), enumerate(theirs.pop("modalities") or ())
                ):
                    start = f"{prefix}{part}.{name}."
                    for key in [k for k in state_dict if k.startswith(start)]:
                        state_dict[f"{prefix}{part}.{i}.{key.removeprefix(start)}"] = state_dict.pop(key)
            self.check_options(theirs, f"load_state_dict: {prefix.rstrip('.') or 'EBRHead'}")
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *args)
        if prefix + _OPTIONS in missing:  # checked above, or weights from elsewhere
            missing.remove(prefix + _OPTIONS)

    def extra_repr(self) -> str:
        return f"dims={self.dims}, latent_dim={self.latent_dim}, residual={self.residual}, normalize={self.normalize}"


def read_options(value: Any) -> dict[str, Any] | None:
    """The options of a head from the entry ``_extra_state`` of a state dict; None where it is not one of ours."""
    if not isinstance(value, Tensor) or value.dtype != torch.uint8:
        return None
    try:
        told = json.loads(bytes(value.tolist()))
    except ValueError:
        return None
    return told if isinstance(told, dict) and told.get("format") == _FORMAT else None


def _one_dtype(features: list[Tensor | None]) -> list[Tensor | None]:
    """Under autocast, features of several dtypes (a table beside an image tower) in the widest of them."""
    dtypes = {f.dtype for f in features if f is not None}
    device = next((f.device.type for f in features if f is not None), "cpu")
    if len(dtypes) < 2 or not autocast_enabled(device):
        return features
    widest = dtypes.pop()
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return [None if f is None else f.to(widest) for f in features]


def plain_parameters(head: EBRHead) -> list[list[Tensor]] | None:
    """Parameters of encoders, decoders and ψ; None where a layer is no plain linear layer or ``torch.func`` is at work."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    found = []
    for layers in (*head.encoders, *head.decoders, head.discriminator):
        tensors = _tensors(layers)
        if tensors is None:
            return None
        found.append(tensors)
    return found


def _tensors(layers: nn.Module) -> list[Tensor] | None:
    if _hooked(layers):
        return None
    out: list[Tensor] = []
    for layer in layers._modules.values():
        if layer is None or _hooked(layer):
            return None
        kind = type(layer)
        if kind is nn.Linear and "weight" in layer._parameters and layer._parameters.get("bias") is not None:
            out += layer._parameters.values()  # type: ignore[arg-type]  # several times faster than the attributes
        elif isinstance(layer, nn.Linear) and kind.forward is nn.Linear.forward and layer.bias is not None:
            out += (layer.weight, layer.bias)
        elif kind is not nn.ReLU:
            return None
    return out


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks) or (
        "forward" in module.__dict__
    )
