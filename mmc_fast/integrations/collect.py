"""``Collector``: runs the heads inside of a foreign forward, all in one call where it can, and keeps what they give."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from mmc_fast._util.autocast import autocast_enabled
from mmc_fast._util.names import unknown
from mmc_fast.errors import InputError
from mmc_fast.functional import check_reversal, ebr_step
from mmc_fast.nn import EBRHead, by_modules
from mmc_fast.nn.ebr import plain_parameters, read_options

from .deferred import Context, Deferred, saving_hooks, unwrap
from .losses import EBRLosses, Record, sum_of_cross_entropy, sum_of_errors
from .passes import Pass, Settings, Waiting
from .site import Site


class SiteHead(EBRHead):
    """The head on a model: knows its sites, and runs any part of itself as a forward, for hooks such as those of FSDP."""

    sites: list[dict[str, Any]] | None = None
    applied: dict[str, Any] | None = None  # further arguments of apply_ebr

    def forward(self, *args: Any, run: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) if run is None else run()

    def set_extra_state(self, state: Any) -> None:
        """Called by loaders that set entries one by one, as ``from_pretrained`` does."""
        theirs = read_options(state)
        if theirs is not None:
            self.check_options(theirs, "from_pretrained")

    def options(self) -> dict[str, Any]:
        return {**super().options(), "sites": self.sites, "apply": self.applied}


_PASSES: ContextVar[dict[int, Pass]] = ContextVar("mmc_fast_passes")
_SETTINGS: ContextVar[dict[int, Settings]] = ContextVar("mmc_fast_settings")
_ALIVE: weakref.WeakValueDictionary[int, Collector] = weakref.WeakValueDictionary()
_TOKENS = itertools.count()


def _with(variable: ContextVar[dict[int, Any]], token: int, value: Any) -> dict[int, Any]:
    """The variable's mapping with one entry changed and those of collectors that are gone left out."""
    before = variable.get(None)
    if not before or (len(before) == 1 and token in before):
        return {token: value}
    return {k: v for k, v in before.items() if k in _ALIVE} | {token: value}


class Tap:
    """Forward hook of one module. An object, so that a deep copy of the model taps into its own handle."""

    def __init__(self, collector: Collector, module: str, entries: list[tuple[int, Site]]) -> None:
        self.collector, self.module, self.entries = collector, module, entries

    def put_on(self, module: nn.Module) -> Any:
        """Register on a module, once: what swaps modules (quantisation) may have brought the hooks of the old one along."""
        for key in [k for k, hook in module._forward_hooks.items() if hook is self]:
            del module._forward_hooks[key]
        return module.register_forward_hook(self)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.collector.tapped(self, module, args, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self.collector.model) not in memo:  # a submodule is copied by itself, without its head
            return _unchanged
        made = Tap.__new__(Tap)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


def _unchanged(module: nn.Module, args: Any, output: Any) -> None:
    return None


class Collector:
    """What the sites of a model give in a forward, by the call.

    State of a call lies in a :class:`Pass` that belongs to the thread or task, so that concurrent forwards do not meet. A
    pass begins with a forward of the model. Where submodules are called one by one instead, it begins with the first call
    after the losses were taken.
    """

    def __init__(
        self, model: nn.Module, head: SiteHead, sites: dict[str, Site], repeats: str, fusion: str | None, one_call: bool
    ) -> None:
        self.model, self.head, self.sites, self.repeats = model, head, sites, repeats
        self.fusion, self.one_call = fusion, one_call
        self.names = [f"modality '{name}' ({site})" for name, site in sites.items()]
        self.paths = [site.module.split(".") for site in sites.values()]
        self.reversal: float | Tensor = 1.0
        self.decisions: dict[int, str] = {}  # modality -> how its head ran last, and why
        self.latest: Pass | None = None  # for compiled code, which sees no context variables
        self.shared = Settings()  # the same of compiled code and of recomputation in other threads
        self.masked_recompute = False
        self._register()

    def _register(self) -> None:
        self.token = next(_TOKENS)
        _ALIVE[self.token] = self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without passes: those belong to a graph that cannot be copied."""
        return {**self.__dict__, "latest": None, "shared": Settings()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()

    # Passes

    def current(self) -> Pass:
        if torch.compiler.is_compiling() or (self.latest is not None and self.latest.compiled):
            found = self.latest
        else:
            found = _PASSES.get({}).get(self.token)
        return self._new() if found is None else found

    def _new(self, scope: bool = False) -> Pass:
        if torch.compiler.is_compiling():
            made = Pass(self.reversal, self.shared, torch.is_grad_enabled(), True, scope)
        else:
            reversal = check_reversal(self.reversal, "handle.reversal")
            if isinstance(reversal, Tensor):
                reversal = reversal.detach().clone()  # may be filled anew before backward
            settings = _SETTINGS.get({}).get(self.token, Settings())
            made = Pass(reversal, settings, torch.is_grad_enabled(), False, scope)
            _PASSES.set(_with(_PASSES, self.token, made))
        self.latest = made
        return made

    def reset(self) -> Pass:
        return self._new()

    def begin(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model."""
        if module is not self.model:
            raise InputError(
                f"apply_ebr: {type(module).__name__} is a replica or a shallow copy of the model with heads at "
                f"{', '.join(map(str, self.sites.values()))}; use DistributedDataParallel, or copy.deepcopy"
            )
        found = None if torch.compiler.is_compiling() else self.current()
        if found is None or not (found.scope or found.depth):
            found = self._new()
        if not found.depth:
            found.ran, found.called, found.at_fusion, found.grad = {}, {}, False, torch.is_grad_enabled()
        found.depth += 1

    def end(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the model, also called where the forward raised: then ``output`` is None."""
        found = self.current()
        found.depth = max(0, found.depth - 1)
        if found.compiled or found.depth or output is None:
            return None
        self.finish(found, "the end of the forward")
        if type(output) is Tensor:
            return None
        changed = unwrap(output, "the end of the forward")
        return None if changed is output else changed

    @contextmanager
    def scope(self) -> Iterator[None]:
        """All forwards and calls of sites within count as one pass."""
        found = self._new(scope=True)
        try:
            yield
        finally:
            found.depth = 0
        self.finish(found, "the end of the step")
        found.scope = False

    def watch_fusion(self, module: nn.Module) -> Any:
        return module.register_forward_pre_hook(self.at_fusion, prepend=True, with_kwargs=True)

    def at_fusion(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Forward pre-hook of the module that was named as fusion."""
        if torch.compiler.is_compiling():
            return None
        found = self.current()
        found.at_fusion = True
        self.finish(found, self.fusion or "")
        return unwrap((args, kwargs), self.fusion or "")

    @contextmanager
    def set(self, **changes: Any) -> Iterator[None]:
        """Within this context, forwards of this thread or task see these :class:`Settings`."""
        before = self.shared
        settings = _SETTINGS.get({}).get(self.token, Settings())._replace(**changes)
        token = _SETTINGS.set(_with(_SETTINGS, self.token, settings))
        self.shared = settings
        try:
            yield
        finally:
            _SETTINGS.reset(token)
            self.shared = before

    # Sites

    def resolve(self, name: str) -> nn.Module:
        """The submodule that a name means now."""
        try:
            return self.model.get_submodule(name)
        except AttributeError:
            raise InputError(
                f"apply_ebr: the model has no submodule {name!r} any more; handle.restore(), then apply_ebr with the new names"
            ) from None

    def name(self, i: int) -> str:
        return self.names[i]

    def tapped(self, tap: Tap, module: nn.Module, args: Any, output: Any) -> Any:
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        found = self.current()
        if not traced and not found.depth and self.resolve(tap.module) is not module:
            raise InputError(
                f"apply_ebr: {tap.module} was wrapped or replaced since apply_ebr; call handle.refresh() after the change, "
                "so that the head comes behind all of it"
            )
        if not again and not torch.compiler.is_exporting():
            found = self._next(found, tap)
        call = found.called.get(tap.module, 0)
        found.called[tap.module] = call + 1
        for i, site in tap.entries:
            if site.call is None or site.call == call or again:
                output = self._visit(found, i, site, args, output, traced, again)
        return output

    def _next(self, found: Pass, tap: Tap) -> Pass:
        """The pass that this call of a module belongs to; refuses what would leave rows out or count them twice."""
        training = self.model.training
        if found.taken and not found.depth and not found.scope:
            found = self._new()
        for i, site in tap.entries:
            if found.depth and training and found.grad and not torch.is_grad_enabled():
                raise RuntimeError(
                    f"apply_ebr: {self.name(i)} runs under torch.no_grad() in a training forward, so its head could not "
                    "learn; freeze it with requires_grad_(False) instead, or checkpoint with use_reentrant=False"
                )
            if self.repeats == "all" or site.call is not None or i not in found.ran:
                continue
            if found.depth or found.scope:
                raise RuntimeError(
                    f"apply_ebr: {self.name(i)} ran twice in one forward; apply_ebr(..., repeats='all') takes the rows "
                    "of every call, Site(..., call=0) names one of them"
                )
            if training and torch.is_grad_enabled():
                raise RuntimeError(
                    f"apply_ebr: {self.name(i)} ran again before handle.losses() was asked for; add the losses in each "
                    "step, or call handle.reset() to leave them out"
                )
            return self._new()  # evaluation by calling submodules: the latest call counts
        return found

    def _visit(self, found: Pass, i: int, site: Site, args: Any, output: Any, traced: bool, again: bool) -> Any:
        head = self.head
        features = site.read(output)
        rows = site.feature_rows(features)
        if rows.shape[-1] != head.dims[i]:
            raise InputError(
                f"apply_ebr: {self.name(i)} gave {list(rows.shape)} (samples first, features last) but its head was "
                f"built for width {head.dims[i]}; correct dims or the feature_dim of its Site"
            )
        settings = self.shared if again else found.settings
        if again and self.masked_recompute and settings.masks is None:
            raise RuntimeError(
                f"apply_ebr: {self.name(i)} is recomputed in backward without its mask; call backward inside of "
                "handle.present(), or checkpoint a part that does not hold the site"
            )
        present = self._mask(i, rows, settings)
        if settings.given is not None:
            return site.write(output, site.from_rows(self._given(i, rows, present, settings.given)))
        if not traced and (site.output is not None or features._is_view() or any(features is a for a in args)):
            features = features.clone()  # others hold it too, and may change it in place
            rows = site.to_rows(features)
        if not autocast_enabled(rows.device.type):
            rows = rows.to(_dtype(head, i, rows))
        found.ran[i] = found.ran.get(i, 0) + 1
        why = self._why_alone(found, i, traced, again)
        if why is None:
            version = None if features.is_inference() else features._version
            one = Waiting(site, features, rows, present, Context(rows.device.type), version)
            found.pending[i] = one
            found.contexts[i] = one.context
            grads = torch.is_grad_enabled() and (
                features.requires_grad or any(p.requires_grad for p in head.parameters())
            )
            made = Deferred(features, grads, lambda reader, keeps: self._read(found, i, reader, keeps), self.name(i))
            return site.write(output, made)
        if not traced:
            self.decisions[i] = f"a call of its own: {why}"
            self.masked_recompute |= present is not None and saving_hooks() is not None
        recording = not (again or torch.compiler.is_exporting())
        recovered = self._alone(found, i, rows, present, recording, again)
        return site.write(output, site.from_rows(recovered.to(features.dtype)))

    def _why_alone(self, found: Pass, i: int, traced: bool, again: bool) -> str | None:
        """Why the head of this site cannot wait for those of the others; None where it can."""
        if traced:
            return "compiled, exported or traced code holds no features back"
        if again or saving_hooks() is not None:
            return "the site runs under activation checkpointing or offloading"
        if not (found.depth or found.scope):
            return "the site was called outside of a forward of the model"
        if found.alone is None:
            found.alone = self._why_all_alone() or ""
        if found.alone:
            return found.alone
        if any(m._backward_hooks or m._backward_pre_hooks for m in self._around(i)):
            return "backward hooks on or around the site take tensors only"
        return None

    def _why_all_alone(self) -> str | None:
        """The same for all sites of a pass."""
        hooks = torch.nn.modules.module
        if not self.one_call:
            return "one_call=False"
        if len(self.sites) == 1:
            return "it is the only one"
        if self.repeats == "all":
            return "repeats='all' takes any number of calls"
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "torch.func transforms hold no features back"
        if "FSDP" in type(self.model).__name__:
            return "sharded modules take tensors only"
        if hooks._global_backward_hooks or hooks._global_backward_pre_hooks:
            return "backward hooks of all modules take tensors only"
        return None

    def _around(self, i: int) -> Iterator[nn.Module]:
        """The module of a site and those that contain it."""
        module = self.model
        for part in self.paths[i]:
            module = module._modules[part]  # type: ignore[assignment]
            yield module

    def _mask(self, i: int, z: Tensor, settings: Settings) -> Tensor | None:
        mask = None if settings.masks is None else settings.masks[i]
        if mask is None:
            return None
        if mask.dim() >= z.dim() or mask.shape != z.shape[: mask.dim()]:
            raise InputError(
                f"present: the mask of {self.name(i)} has shape {list(mask.shape)}; its rows are {list(z.shape[:-1])}"
            )
        return mask.to(z.device).reshape(*mask.shape, *[1] * (z.dim() - 1 - mask.dim())).expand(z.shape[:-1])

    def split_mask(self, mask: Tensor | Mapping[str, Tensor]) -> list[Tensor | None]:
        """One mask for each modality from bool ``[B, m]`` or a mapping.

        Raises:
            InputError: an unknown modality; another dtype or number of columns.
        """
        names = list(self.sites)
        if isinstance(mask, Tensor):
            if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[1] != len(names):
                raise InputError(
                    f"present: got {mask.dtype} {list(mask.shape)}; give torch.bool [B, {len(names)}] for {names}"
                )
            return list(mask.unbind(1))
        if not isinstance(mask, Mapping):
            raise InputError(f"present: got {type(mask).__name__}; give torch.bool [B, {len(names)}] or a mapping")
        for name, column in mask.items():
            if name not in self.sites:
                raise unknown("modality", name, names)
            if not isinstance(column, Tensor) or column.dtype != torch.bool or column.dim() == 0:
                raise InputError(f"present: the mask of '{name}' must be a torch.bool tensor [B] or [B, tokens]")
        return [mask.get(name) for name in names]

    # Heads

    def _read(self, found: Pass, i: int, reader: str, keeps: bool) -> Tensor:
        found.contexts[i].check_reader(self.name(i))
        if i in found.pending:
            missing = [n for j, n in enumerate(self.sites) if j not in found.ran]
            if missing and self.fusion is not None and not found.at_fusion:
                raise InputError(
                    f"apply_ebr: {self.name(i)} is read by {reader} before {', '.join(missing)} ran, so the heads cannot be "
                    f"one call at fusion={self.fusion!r}; leave fusion out, or name as site what comes after {reader}"
                )
            if missing:
                self._resolve_alone(found, i, f"{reader} reads it before {', '.join(missing)} ran")
            else:
                self.finish(found, reader)
        if keeps and i not in found.lent:  # a copy: whoever keeps it may change it in place
            found.lent.add(i)
            with found.contexts[i].entered():
                found.values[i] = found.values[i].clone()
        return found.values[i]

    def finish(self, found: Pass, reader: str) -> None:
        """Run the heads that wait: all in one call where all sites have run and gave equal rows."""
        if not found.pending:
            return
        why = self._why_not_one(found)
        if why is None:
            self._together(found)
            self.decisions = dict.fromkeys(range(len(self.sites)), f"one call for all heads: first read by {reader}")
            return
        for i in list(found.pending):
            self._resolve_alone(found, i, why)

    def _why_not_one(self, found: Pass) -> str | None:
        waiting = [found.pending.get(i) for i in range(len(self.sites))]
        absent = [(i, name) for i, name in enumerate(self.sites) if i not in found.pending]
        if absent:
            return ", ".join(f"{name} {'ran alone' if i in found.ran else 'did not run'}" for i, name in absent)
        rows = {name: one.rows for name, one in zip(self.sites, waiting, strict=True) if one is not None}
        if len({x.shape[:-1] for x in rows.values()}) > 1:
            return "rows differ: " + ", ".join(f"{name} {list(x.shape[:-1])}" for name, x in rows.items())
        autocast = autocast_enabled(next(iter(rows.values())).device.type)
        if len({(x.device, None if autocast else x.dtype) for x in rows.values()}) > 1:
            return "devices or dtypes differ: " + ", ".join(f"{n} {x.dtype} {x.device}" for n, x in rows.items())
        if any(s is not None and s.present is not None and not _by_sample(s.present) for s in waiting):
            return "a mask of tokens gives rows weights of their own"
        return None

    def _unchanged(self, i: int, one: Waiting) -> None:
        if one.version is not None and one.features._version != one.version:
            raise RuntimeError(
                f"apply_ebr: the output of {self.name(i)} was changed in place after its module returned it, before the heads "
                "ran; change a clone, or give one_call=False to run each head at its site"
            )

    def _together(self, found: Pass) -> None:
        waiting = [found.pending[i] for i in range(len(self.sites))]
        for i, one in enumerate(waiting):
            self._unchanged(i, one)
        flat = waiting[0].rows.dim() == 2
        x = [one.rows if flat else one.rows.flatten(0, -2) for one in waiting]
        masks = [one.present for one in waiting]
        like, shape = x[0], waiting[0].rows.shape[:-1]
        present = None
        if any(mask is not None for mask in masks):
            all_present = torch.ones(len(like), dtype=torch.bool, device=like.device)
            present = torch.stack([all_present if m is None else m.flatten() for m in masks], 1)
        with waiting[0].context.entered():
            out = self.head(x, present, found.settings.source, found.reversal)
            recovered = out.recovered if flat else [r.reshape(*shape, r.shape[-1]) for r in out.recovered]
            if found.counts():
                mine = [Record(i, recovered[i], out.latents, s.present, True, shape) for i, s in enumerate(waiting)]
                found.records += mine
                found.means.append((EBRLosses(out.discrimination_loss, out.reconstruction_loss), mine))
            for i, one in enumerate(waiting):
                self._hand_out(found, i, one, recovered[i])
        found.pending, found.together = {}, True

    def _resolve_alone(self, found: Pass, i: int, why: str) -> None:
        one = found.pending.pop(i)
        self._unchanged(i, one)
        self.decisions[i] = f"a call of its own: {why}"
        with one.context.entered():
            self._hand_out(found, i, one, self._alone(found, i, one.rows, one.present, True))

    def _hand_out(self, found: Pass, i: int, one: Waiting, recovered: Tensor) -> None:
        found.values[i] = one.site.from_rows(recovered.to(one.features.dtype))

    def _alone(
        self, found: Pass, i: int, z: Tensor, present: Tensor | None, recording: bool, again: bool = False
    ) -> Tensor:
        """Recovered rows of one modality, by the op with one head and psi behind it; ``again``: recomputed in backward."""
        recording = recording and found.counts()

        def run() -> list[Tensor]:
            head, shape = self.head, z.shape[:-1]
            x, where = z.flatten(0, -2), None if present is None else present.flatten()
            params, m = plain_parameters(head), len(head.dims)
            alike = present is None or _by_sample(present)  # rows of a sample weigh the same
            errors = None
            if params is None or torch.jit.is_tracing():
                latents = by_modules.encode(head, i, by_modules.keep(x, where), where)
                decoded = by_modules.decode(head, i, latents, where)
            else:
                no_psi = [params[i][2].new_zeros(1, head.latent_dim), params[i][3].new_zeros(1)]
                out = ebr_step(
                    [x], [params[i]], [params[m + i]], no_psi,
                    present=None if where is None else where[:, None],
                    reversal=0.0,
                    normalizer=x.new_ones((), dtype=torch.float32),
                    normalize=head.normalize, backend=head.backend, recompute=head.recompute,
                )  # fmt: skip
                decoded, latents = out.recovered[0], out.latents[0]
                errors = out.reconstruction_loss / max(1, shape[1:].numel()) if alike else None
            decoded, latents = decoded.reshape(*shape, head.dims[i]), latents.reshape(*shape, head.latent_dim)
            if not (recording or again):
                return [decoded]
            if errors is None:
                errors = sum_of_errors(decoded, by_modules.keep(z, present), present)
            judged = sum_of_cross_entropy(latents, i, present, head.discriminator, found.reversal)
            return [decoded, latents, judged, errors]

        decoded, *rest = self.head(run=run)
        recovered = by_modules.keep(z, present) + decoded if self.head.residual else decoded
        if recording:
            latents, judged, errors = rest
            found.records.append(Record(i, recovered, latents, present, False, z.shape[:-1]))
            found.discrimination.append(judged)
            found.reconstruction.append(errors)
            recovered = recovered.clone()
        return recovered

    def _given(self, i: int, rows: Tensor, present: Tensor | None, given: list[Tensor]) -> Tensor:
        decoded = given[i].reshape(rows.shape)
        x = by_modules.keep(rows.to(decoded.dtype), present)
        return (x + decoded if self.head.residual else decoded).to(rows.dtype)


def _dtype(head: EBRHead, i: int, x: Tensor) -> torch.dtype:
    first = next(iter(head.encoders[i]._modules.values()))
    weight = getattr(first, "weight", None)
    return weight.dtype if isinstance(weight, Tensor) else x.dtype  # a quantised layer has a method of that name


def _by_sample(present: Tensor) -> bool:
    """Whether a mask was given by sample and only expanded over rows."""
    return present.dim() == 1 or all(stride == 0 for stride in present.stride()[1:])
