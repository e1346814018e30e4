"""``ModelAdapter``: any model as encode and fuse, by the names of its modules."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmc_fast.errors import InputError

from .site import Site, is_compiled, replace_tensor, tensors_in

Place = str | Site | tuple[str | Site, int]


class ModelAdapter:
    """A model for :func:`mmc_fast.diagnose` without a change of its code: forward hooks on named submodules.

    ``encode`` runs the model and keeps a copy of the output of each module in ``features``; ``fuse`` runs it again with these
    outputs replaced and reads the logits. Hooks that are on the model, such as those of ``apply_ebr``, count as part of it: a
    feature is what leaves the module after all of them. Compiled models run uncompiled, wrapped ones (DDP) unwrapped.

    A modality that is absent for a whole batch (its module does not run) or for some rows (its output is NaN there) keeps the
    model's own treatment: ``fuse`` never replaces such rows, and ``encode`` shows the mean of the first rows in their place.

    Args:
        model: in evaluation mode; it is not changed.
        features: modality name -> module name, or :class:`Site` where the module returns more than one tensor; or
            ``(name or Site, k)``, the k-th run (from 0) of a module that runs more than once, such as one encoder for two
            modalities. Everything that the fusion knows of a modality must pass through it.
        head: name of the module whose output is the logits; None: what the model returns (``.logits`` is understood).
            If it is a chain of Linear layers and activations whose input is the features side by side, in the order of
            ``features``, it gets exact numbers for each layer and neuron.
        fused: name (or Site) of the module whose output is the fused representation; None: what ``head`` receives.
        call: ``call(model, batch)`` runs a forward. Default: a mapping gives keywords (without ``"labels"``), a tuple or list
            its entries but the last one, anything else is the one argument.
        labels: ``labels(batch) -> Tensor [B]``. Default: the key ``"labels"`` of a mapping, the last entry of a tuple or list
            of two or more.
        absent: ``absent(batch, present) -> batch`` with the modalities that are False in ``present`` (bool ``[B, m]``) taken away
            as the model expects it (a mask, None, NaN). With it ``fuse(features, present)`` is the model's own handling of absent
            modalities, and ``diagnose`` uses that.

    Raises:
        InputError: names that the model does not have (with the nearest ones), modules that did not run once, outputs that
            are no features. TypeError: a model that is no ``nn.Module``.

    Examples:
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b, self.classifier = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(16, 2)
        ...
        ...     def forward(self, a, b):
        ...         return self.classifier(torch.cat([self.a(a), self.b(b)], 1))
        >>> adapter = mmc_fast.ModelAdapter(Model().eval(), {"a": "a", "b": "b"}, head="classifier")
        >>> features = adapter.encode((torch.randn(5, 6), torch.randn(5, 4), torch.zeros(5)))
        >>> {name: list(x.shape) for name, x in features.items()}, list(adapter.fuse(features).shape)
        ({'a': [5, 8], 'b': [5, 8]}, [5, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        features: Mapping[str, Place],
        head: str | None = None,
        *,
        fused: str | Site | None = None,
        call: Callable[[nn.Module, Any], Any] | None = None,
        labels: Callable[[Any], Any] | None = None,
        absent: Callable[[Any, Tensor], Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"ModelAdapter: model is {type(model).__name__}; give an nn.Module")
        if not isinstance(features, Mapping) or not features:
            raise InputError("ModelAdapter: features is empty; give modality name -> module name")
        self.model = _unwrapped(model)
        self._compiled = any(map(is_compiled, (model, *model.modules())))
        self.sites = {name: _site(place) for name, place in features.items()}
        self._runs: dict[str, int | None] = {name: site.call for name, site in self.sites.items()}
        self._modules = {name: _find(self.model, site.module) for name, site in self.sites.items()}
        self._check_apart()
        self._head = None if head is None else _find(self.model, head)
        self._fused = None if fused is None else (fused if isinstance(fused, Site) else Site(fused))
        if self._fused is not None:
            self._fused_module = _find(self.model, self._fused.module)
        self._call, self._labels = call or _call, labels or _labels
        self._batch: Any = None
        self._outputs: dict[str, Any] = {}
        self._absent: dict[str, Tensor] = {}
        self._fill: dict[str, Tensor] = {}
        self._received: dict[str, Tensor | None] = {}
        self._rows = 0
        self._shapes: dict[str, torch.Size] | None = None
        if absent is not None:
            self._take_away = absent
            self.fuse = self._fuse_present  # type: ignore[method-assign]

    @property
    def head(self) -> nn.Module | None:
        """The module of the logits."""
        return self._head

    @torch.no_grad()
    def forward(self, batch: Any) -> Tensor:
        """Logits ``[B, C]`` of the untouched model: what ``fuse(encode(batch))`` has to give."""
        self._batch = batch
        return self._logits()[0].detach().clone()

    @torch.no_grad()
    def encode(self, batch: Any) -> dict[str, Tensor]:
        """The features of a batch by modality, as the named modules return them."""
        self._batch, self._outputs, self._absent, self._received, self._rows = batch, {}, {}, {}, 0
        seen: dict[nn.Module, list[Any]] = {module: [] for module in self._modules.values()}
        received: dict[nn.Module, list[Tensor | None]] = {module: [] for module in seen}
        with ExitStack() as stack:
            for module, outputs in seen.items():
                _hook(stack, module.register_forward_hook(_keep(outputs)))
                _hook(stack, module.register_forward_pre_hook(_keep_argument(received[module])))
            self._run()
        found: dict[str, Tensor | None] = {}
        for name, module in self._modules.items():
            output = self._chosen(name, seen[module])
            if output is None:
                found[name] = None
                continue
            self._outputs[name] = output
            self._received[name] = received[module][self._runs[name] or 0]
            # A copy outside of inference mode: recorded features are never those that the model works on.
            with torch.inference_mode(False):
                found[name] = self._filled(name, self._read(self.sites[name], output).clone())
        self._rows = max((len(x) for x in found.values() if x is not None), default=0)
        return {name: self._fill[name].expand(self._rows, *self._fill[name].shape) if x is None else x
                for name, x in found.items()}  # fmt: skip

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[B, C]`` of the last encoded batch with these features in place of its own."""
        return self._fused_run(features)[0]

    def _fuse_present(self, features: Mapping[str, Tensor], present: Tensor | None = None) -> Tensor:
        """:meth:`fuse`; with ``present`` (bool ``[B, m]``) absent modalities are taken away as the model expects it.

        The model runs on the changed batch, so the features of a modality that is present are its own there.
        """
        if present is None:
            return self._fused_run(features)[0]
        batch, self._batch = self._batch, self._take_away(self._batch, present)
        try:
            return self._logits()[0]
        finally:
            self._batch = batch

    def inputs(self, batch: Any) -> dict[str, Tensor]:
        """What the named modules receive, where that is a vector, a sequence or a picture of one size: ability is probed there too.

        A collapsed modality's own encoder may never have learned, so its features alone say too little. Zeros where absent, and
        where a sequence is shorter than those of the first batch; of longer ones the beginning.
        """
        if batch is not self._batch or not self._outputs:
            self.encode(batch)
        got = {n: x for n, x in self._received.items() if x is not None and len(x) == self._rows}
        if self._shapes is None:
            self._shapes = {n: x.shape[1:] for n, x in got.items()}
        found = {}
        for name, shape in self._shapes.items():
            x = got.get(name, torch.zeros(self._rows, *shape))
            if x.dim() == 3:
                x = F.pad(x, (0, 0, 0, shape[0] - x.shape[1]))
            found[name] = x.nan_to_num() if x.shape[1:] == shape else torch.zeros(self._rows, *shape)
        return found

    def represent(self, features: Mapping[str, Tensor]) -> Tensor:
        """The fused representation ``[B, ...]``: output of ``fused``, or what ``head`` receives, or the logits."""
        return self._fused_run(features)[1]

    def labels(self, batch: Any) -> Any:
        """Labels of a batch, or None."""
        return self._labels(batch)

    @torch.no_grad()
    def check_order(self, batch: Any) -> None:
        """InputError where the features of one modality change with those of another: replaced together, one would hide the other."""
        features = self.encode(batch)
        for name, x in features.items():
            if name not in self._outputs:
                continue
            seen: dict[nn.Module, list[Any]] = {module: [] for module in self._modules.values()}
            moved, mine = {**features, name: x.roll(1, 0)}, {self._runs[name] or 0: name}
            with ExitStack() as stack:
                replacement = _Replacement(self._modules[name], partial(self._run_of, mine, moved))
                stack.callback(replacement.remove)
                for module, outputs in seen.items():
                    _hook(stack, module.register_forward_hook(_keep(outputs)))
                self._run()
            for other, site in self.sites.items():
                if other == name or other not in self._outputs:
                    continue
                now, before = seen[self._modules[other]], self._read(site, self._outputs[other])
                run = self._runs[other] or 0
                apart = len(now) > run and _near(self._read(site, now[run]), before)
                if not apart:
                    raise InputError(
                        f"ModelAdapter: {str(site)!r} lies inside or behind {str(self.sites[name])!r}, so {other} changes with "
                        f"{name} and one would hide the other; name modules from before the two meet"
                    )

    @torch.no_grad()
    def difference(self, batch: Any) -> str:
        """Where ``fuse(encode(batch))`` and the model part: the first module in a forward with another output, or ""."""
        features = self.encode(batch)
        plain, again, replaced = self._traced(), self._traced(), {}
        with self._replaced(features):
            replaced = self._traced()
        for key, value in plain.items():
            if key in again and not torch.equal(value, again[key]):
                return f"{key[0]!r} gives another output for the same batch: it is random or keeps a state"
        for key, value in plain.items():
            if key in replaced and not torch.equal(value, replaced[key]):
                return f"{key[0]!r} is the first module whose output differs"
        return ""

    def _traced(self) -> dict[tuple[str, int], Tensor]:
        """Outputs of all modules outside of the sites: (name, which run) -> its first tensor."""
        inside = {id(m) for module in self._modules.values() for m in module.modules()}
        found: dict[tuple[str, int], Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                tensors = [t for _, t in tensors_in(output)]
                if tensors:
                    found[name, sum(n == name for n, _ in found)] = tensors[0].detach().nan_to_num().clone()

            return hook

        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if id(module) not in inside and name:
                    _hook(stack, module.register_forward_hook(keep(name)))
            self._run()
        return found

    def _check_apart(self) -> None:
        used = [(site.module, self._runs[name]) for name, site in self.sites.items()]
        shared = {m for m, _ in used if sum(m == other for other, _ in used) > 1}
        if len(set(used)) < len(used) or any(run is None for m, run in used if m in shared):
            raise InputError(
                f"ModelAdapter: two modalities name one module ({[m for m, _ in used]}); each needs a module of its own, or "
                "name the run as well: {'left': ('encoder', 0), 'right': ('encoder', 1)}"
            )

    def _chosen(self, name: str, outputs: list[Any]) -> Any:
        """The output of this modality in the forward that just ran; None where it is absent from the batch."""
        run, module = self._runs[name], self.sites[name].module
        if name in self._fill and not outputs:
            return None
        if run is None and len(outputs) != 1:
            hint = f"name one run of it: ({module!r}, 0)"
            if not outputs:
                hint = "a batch that has it must come first; of an exported model give the original"
            raise InputError(
                f"ModelAdapter: {module!r} ran {len(outputs)} times in one forward; the module of a modality must run "
                f"exactly once, or {hint}"
            )
        if run is not None and not 0 <= run < len(outputs):
            raise InputError(f"ModelAdapter: {module!r} ran {len(outputs)} times in one forward; there is no run {run}")
        return outputs[run or 0]

    def _filled(self, name: str, x: Tensor) -> Tensor:
        """Features with the mean of the first rows where a row is not finite, that is absent; such rows are kept in mind."""
        absent = ~torch.isfinite(x.flatten(1)).all(1)
        if name not in self._fill:
            self._fill[name] = torch.zeros_like(x[0]) if absent.all() else x[~absent].mean(0)
        if bool(absent.any()):
            self._absent[name] = absent
            x[absent] = self._fill[name].to(x)
        return x

    def _fused_run(self, features: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        if list(features) != list(self.sites):
            raise InputError(f"ModelAdapter: got features {list(features)}; give those of encode(), {list(self.sites)}")
        with self._replaced(features):
            return self._logits()

    def _logits(self) -> tuple[Tensor, Tensor]:
        """Logits and fused representation of one forward."""
        logits: list[Any] = []
        fused: list[Any] = []
        with ExitStack() as stack:
            if self._head is not None:
                _hook(stack, self._head.register_forward_hook(_keep(logits)))
            if self._fused is not None:
                _hook(stack, self._fused_module.register_forward_hook(_keep(fused)))
            elif self._head is not None:
                _hook(
                    stack,
                    self._head.register_forward_pre_hook(
                        lambda module, args: fused.append(args[0].clone()) if args else None
                    ),
                )
            returned = self._run()
        if self._head is not None and len(logits) != 1:
            raise InputError(
                f"ModelAdapter: the head ran {len(logits)} times in one forward; name a module that runs once and gives the "
                "logits, or none: then what the model returns counts"
            )
        if isinstance(returned, Mapping):
            returned = returned.get("logits", returned)
        y = logits[0] if self._head is not None else getattr(returned, "logits", returned)
        if isinstance(y, Tensor) and y.dim() == 1:
            y = y[:, None]  # one output, such as the similarity of a pair
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
            if self._compiled:
                with torch.compiler.set_stance("force_eager"):
                    return self._call(self.model, self._batch)
            return self._call(self.model, self._batch)
        except InputError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            hint = "give call=lambda model, batch: ... if batches are not the arguments of the model"
            if torch.is_grad_enabled():
                hint = "agop=False if it cannot run with gradients"
            raise InputError(f"ModelAdapter: the forward failed ({type(error).__name__}: {first}); {hint}") from error

    @contextmanager
    def _replaced(self, features: Mapping[str, Tensor]) -> Iterator[None]:
        """While this lasts, the named modules return recorded outputs with other features inside."""
        if not self._outputs:
            raise RuntimeError("ModelAdapter: encode() a batch before fuse()")
        with ExitStack() as stack:
            for module in dict.fromkeys(self._modules.values()):
                mine = {self._runs[n] or 0: n for n, m in self._modules.items() if m is module and n in self._outputs}
                replacement = _Replacement(module, partial(self._run_of, mine, features))
                stack.callback(replacement.remove)
            yield

    def _run_of(self, mine: Mapping[int, str], features: Mapping[str, Tensor], run: int) -> Any:
        return self._output(mine.get(run), features)

    def _output(self, name: str | None, features: Mapping[str, Tensor]) -> Any:
        """The recorded output of a modality with other features, made anew: the model may work in place on it."""
        if name is None:
            return None
        site, output = self.sites[name], _copied(self._outputs[name])
        rows = features[name].clone()
        if name in self._absent:
            recorded = site.to_rows(site.read(output))
            absent = self._absent[name].reshape(-1, *[1] * (recorded.dim() - 1))
            rows = torch.where(absent, recorded, rows.to(recorded.dtype))
        return site.write(output, site.from_rows(rows))

    def _read(self, site: Site, output: Any) -> Tensor:
        try:
            return site.to_rows(site.read(output))
        except InputError as error:
            places = ", ".join(f"{path} {list(t.shape)}" for path, t in tensors_in(output) if path)
            hint = f"; tensors are at {places}" if places and "tensors are at" not in str(error) else ""
            raise InputError(
                str(error).replace("apply_ebr:", "ModelAdapter:").replace("a head needs", "need") + hint
            ) from None


class _Replacement:
    """A module that returns ``output(run)`` in its run number ``run``, whatever its hooks do; None: it runs as it is."""

    def __init__(self, module: nn.Module, output: Callable[[int], Any]) -> None:
        self.module, self.output, self.run = module, output, -1
        self.before = module.__dict__.get("forward")
        self.own = module.forward
        module.__dict__["forward"] = self.forward
        self.last = module.register_forward_hook(self.override)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.run += 1
        found = self.output(self.run)
        return self.own(*args, **kwargs) if found is None else found

    def override(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The last hook: what others made of the replaced output is undone, since it was recorded behind them."""
        return self.output(self.run) if len(module._forward_hooks) > 1 else None

    def remove(self) -> None:
        self.last.remove()
        if self.before is None:
            self.module.__dict__.pop("forward", None)
        else:
            self.module.__dict__["forward"] = self.before


def _site(place: Place) -> Site:
    name, call = place if isinstance(place, tuple) else (place, None)
    site = name if isinstance(name, Site) else Site(name)
    return site if call is None else replace(site, call=call)


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def _find(model: nn.Module, name: str) -> nn.Module:
    """The module called ``name``, with or without what compiling and wrapping put into names."""
    known: dict[str, nn.Module] = {}
    for full, module in model.named_modules():
        known.setdefault(full.replace("_orig_mod.", "").removesuffix("._orig_mod"), module)
    plain = name.replace("_orig_mod.", "")
    if plain not in known:
        plain = plain.removeprefix("module.")
    if plain not in known or not plain:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or [n for n in known if n][:5]
        raise InputError(
            f"ModelAdapter: the model has no module {name!r}; the nearest are {', '.join(near)} "
            "(all: [n for n, _ in model.named_modules()])"
        )
    if isinstance(known[plain], torch.jit.ScriptModule):
        raise InputError(f"ModelAdapter: {name!r} is scripted or traced, which no hook sees; give the original model")
    return known[plain]


def _hook(stack: ExitStack, handle: Any) -> None:
    stack.callback(handle.remove)


def _near(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.allclose(
        x.nan_to_num(), y.nan_to_num(), rtol=1e-2, atol=1e-3 * float(y.nan_to_num().abs().amax())
    )


def _copied(output: Any) -> Any:
    """An output whose tensors are copies: what runs behind it may work in place."""
    for path, tensor in list(tensors_in(output)):
        output = replace_tensor(output, path, tensor.clone())
    return output


def _keep(seen: list[Any]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(_copied(output))

    return hook


def _keep_argument(seen: list[Tensor | None]) -> Callable[..., None]:
    """A hook that copies the first argument of a module, where it is ``[B, d]``, ``[B, T, d]`` or ``[B, C, H, W]`` of numbers."""

    def hook(module: nn.Module, args: Any) -> None:
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() in (2, 3, 4):
            seen.append(x.detach().clone())
        else:
            seen.append(None)

    return hook


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key != "labels"})
    if isinstance(batch, (tuple, list)):
        return model(*(batch[:-1] if len(batch) > 1 else batch))
    return model(batch)


def _labels(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return batch.get("labels")
    return batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
