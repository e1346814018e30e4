"""``ModelAdapter``: any model as encode and fuse, by the names of its modules."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from mmc_fast.errors import InputError

from .site import Site, tensors_in

__all__ = ["ModelAdapter"]

_COMPILED = "_orig_mod."  # in the names of a model that torch.compile returned


class ModelAdapter:
    """A model for :func:`mmc_fast.diagnose` without a change of its code: forward hooks on named submodules.

    ``encode`` runs the model and reads the output of each module in ``features``; ``fuse`` runs it again with these outputs
    replaced (the modules themselves do not run then) and reads the logits.

    Args:
        model: in evaluation mode; it is not changed.
        features: modality name -> module name, or :class:`Site` where the module returns more than one tensor. Each module
            must run exactly once in a forward, and everything that the fusion knows of a modality must pass through it.
        head: name of the module whose output is the logits; None: what the model returns (``.logits`` is understood).
            If it is a chain of Linear layers and activations whose input is the features side by side, in the order of
            ``features``, it gets exact numbers for each layer and neuron.
        fused: name (or Site) of the module whose output is the fused representation; None: what ``head`` receives.
        call: ``call(model, batch)`` runs a forward. Default: a mapping gives keywords (without ``"labels"``), a tuple or list
            its entries but the last one, anything else is the one argument.
        labels: ``labels(batch) -> Tensor [B]``. Default: the key ``"labels"`` of a mapping, the last entry of a tuple or list
            of two or more.

    Raises:
        InputError: names that the model does not have (with the nearest ones), modules that did not run once, outputs that
            are no features. TypeError: a model that is no ``nn.Module``.
    """

    def __init__(
        self,
        model: nn.Module,
        features: Mapping[str, str | Site],
        head: str | None = None,
        *,
        fused: str | Site | None = None,
        call: Callable[[nn.Module, Any], Any] | None = None,
        labels: Callable[[Any], Tensor | None] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"ModelAdapter: model is {type(model).__name__}; give an nn.Module")
        if not isinstance(features, Mapping) or not features:
            raise InputError("ModelAdapter: features is empty; give modality name -> module name")
        # Compiled code is left out: it would not see that outputs are replaced.
        self.model = model = getattr(model, "_orig_mod", model)
        sites = {name: s if isinstance(s, Site) else Site(s) for name, s in features.items()}
        self.sites = {n: dataclasses.replace(s, module=s.module.removeprefix(_COMPILED)) for n, s in sites.items()}
        self._modules = {name: _find(model, site.module) for name, site in self.sites.items()}
        used = [site.module for site in self.sites.values()]
        if len(set(used)) < len(used):
            raise InputError(f"ModelAdapter: two modalities name one module ({used}); each needs a module of its own")
        self._head = None if head is None else _find(model, head.removeprefix(_COMPILED))
        self._fused = None if fused is None else (fused if isinstance(fused, Site) else Site(fused))
        if self._fused is not None:
            self._fused_module = _find(model, self._fused.module.removeprefix(_COMPILED))
        self._call, self._labels = call or _call, labels or _labels
        self._batch: Any = None
        self._outputs: dict[str, Any] = {}

    @property
    def head(self) -> nn.Module | None:
        """The module of the logits."""
        return self._head

    @torch.no_grad()
    def encode(self, batch: Any) -> dict[str, Tensor]:
        """The features of a batch by modality, as the named modules return them."""
        self._batch, seen = batch, {name: list[Any]() for name in self.sites}
        hooks = [module.register_forward_hook(_keep(seen[name])) for name, module in self._modules.items()]
        try:
            self._run()
        finally:
            for hook in hooks:
                hook.remove()
        for name, outputs in seen.items():
            if len(outputs) != 1:
                raise InputError(
                    f"ModelAdapter: {self.sites[name].module!r} ran {len(outputs)} times in one forward; the module of a "
                    "modality must run exactly once"
                )
        self._outputs = {name: outputs[0] for name, outputs in seen.items()}
        return {name: self._read(self.sites[name], self._outputs[name]).clone() for name in self.sites}

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[B, C]`` of the last encoded batch with these features in place of its own."""
        return self._fused_run(features)[0]

    def represent(self, features: Mapping[str, Tensor]) -> Tensor:
        """The fused representation ``[B, ...]``: output of ``fused``, or what ``head`` receives, or the logits."""
        return self._fused_run(features)[1]

    def labels(self, batch: Any) -> Tensor | None:
        """Labels of a batch, or None."""
        return self._labels(batch)

    def _fused_run(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        if list(features) != list(self.sites):
            raise InputError(f"ModelAdapter: got features {list(features)}; give those of encode(), {list(self.sites)}")
        logits: list[Any] = []
        fused: list[Any] = []
        hooks = []
        if self._head is not None:
            hooks.append(self._head.register_forward_hook(_keep(logits)))
        if self._fused is not None:
            hooks.append(self._fused_module.register_forward_hook(_keep(fused)))
        elif self._head is not None:
            hooks.append(
                self._head.register_forward_pre_hook(lambda module, args: fused.append(args[0]) if args else None)
            )
        try:
            with self._replaced(features):
                returned = self._run()
        finally:
            for hook in hooks:
                hook.remove()
        if self._head is not None and len(logits) != 1:
            raise InputError(f"ModelAdapter: the head ran {len(logits)} times in one forward; it must run exactly once")
        y = logits[0] if self._head is not None else getattr(returned, "logits", returned)
        if not isinstance(y, Tensor) or y.dim() != 2:
            got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise InputError(
                f"ModelAdapter: the logits are {got}; name the module that returns [samples, classes] as head"
            )
        if not fused:
            return y, y
        return y, (self._read(self._fused, fused[0]) if self._fused is not None else fused[0]).flatten(1)

    def _run(self) -> Any:
        try:
            return self._call(self.model, self._batch)
        except InputError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise InputError(
                f"ModelAdapter: the forward failed ({type(error).__name__}: {first}); give call=lambda model, batch: ... "
                "if batches are not the arguments of the model"
            ) from error

    @contextmanager
    def _replaced(self, features: Mapping[str, Tensor]) -> Iterator[None]:
        """While this lasts, the named modules return recorded outputs with other features inside."""
        if not self._outputs:
            raise RuntimeError("ModelAdapter: encode() a batch before fuse()")
        hooks: list[Any] = []
        before = {name: module.__dict__.get("forward") for name, module in self._modules.items()}
        try:
            for name, module in self._modules.items():
                site, recorded = self.sites[name], self._outputs[name]
                # The hook comes after hooks of others, such as those of EBR heads: what it returns is what goes on.
                module.__dict__["forward"] = _returning(recorded)
                hooks.append(module.register_forward_hook(_replacing(site, recorded, features[name])))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for name, module in self._modules.items():
                if before[name] is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = before[name]

    def _read(self, site: Site, output: Any) -> Tensor:
        try:
            return site.to_rows(site.read(output))
        except InputError as error:
            places = ", ".join(f"{path} {list(t.shape)}" for path, t in tensors_in(output) if path)
            hint = f"; tensors are at {places}" if places and "tensors are at" not in str(error) else ""
            raise InputError(
                str(error).replace("apply_ebr:", "ModelAdapter:").replace("a head needs", "need") + hint
            ) from None


def _find(model: nn.Module, name: str) -> nn.Module:
    known = dict(model.named_modules())
    if name not in known or not name:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or [n for n in known if n][:5]
        raise InputError(
            f"ModelAdapter: the model has no module {name!r}; the nearest are {', '.join(near)} "
            "(all: [n for n, _ in model.named_modules()])"
        )
    return known[name]


def _keep(seen: list[Any]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        # a copy: the model may change what it got in place
        seen.append(tree_map_only(Tensor, lambda t: t.clone(), output))

    return hook


def _returning(output: Any) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t.clone(), output)

    return forward


def _replacing(site: Site, recorded: Any, features: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return site.write(tree_map_only(Tensor, lambda t: t.clone(), recorded), site.from_rows(features).clone())

    return hook


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key != "labels"})
    if isinstance(batch, (tuple, list)):
        return model(*(batch[:-1] if len(batch) > 1 else batch))
    return model(batch)


def _labels(batch: Any) -> Tensor | None:
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
