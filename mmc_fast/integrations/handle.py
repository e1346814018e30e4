"""``EBRHandle``: the heads on a model, the losses of its latest forward, and the way back."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from mmc_fast.errors import InputError
from mmc_fast.functional import check_reversal
from mmc_fast.nn import by_modules
from mmc_fast.ops.ebr.reference import source_weights

from . import store
from .adversarial import adversarial_figures
from .collect import Collector, SiteHead, Tap
from .losses import EBRLosses, counts, divide
from .passes import Pass
from .report import ApplyReport
from .site import Site
from .watch import Watch


class CollectedOutput(NamedTuple):
    """What the heads did in the latest forward, by modality: recovered ``[B, ..., d_i]``, latents ``[B, ..., k]``."""

    recovered: dict[str, Tensor]
    latents: dict[str, Tensor]
    discrimination_loss: Tensor
    reconstruction_loss: Tensor


class EBRHandle:
    """Returned by :func:`mmc_fast.apply_ebr`; ``str(handle)`` says what was done and why not elsewhere.

    "The latest forward" is that of the same thread or task.

    Attributes:
        head: the :class:`mmc_fast.nn.EBRHead`, registered as a submodule of the model; None in a dry run and after
            :meth:`restore`.
        sites: modality -> :class:`Site`; the order is that of psi's classes and of the columns of a mask.
        report: :class:`ApplyReport`.
    """

    def __init__(self, model: nn.Module, sites: dict[str, Site], report: ApplyReport, reversal: float | Tensor) -> None:
        self.model, self.sites, self.report = model, sites, report
        self.head: SiteHead | None = None
        self._collector: Collector | None = None
        self._hooks: dict[str, Any] = {}
        self._taps: dict[str, Any] = {}
        self._warned: set[int] = set()
        self._watch: Watch | None = None
        self.reversal = reversal

    def __str__(self) -> str:
        return str(self.report)

    def __repr__(self) -> str:
        return f"<EBRHandle on {self.report.model}: {', '.join(self.sites)}; {self.report.status}>"

    @property
    def reversal(self) -> float | Tensor:
        """λ, a number or a 0-d tensor; may be changed between steps. A forward takes the one at its begin."""
        return self._reversal

    @reversal.setter
    def reversal(self, value: float | Tensor) -> None:
        self._reversal = check_reversal(value, "handle.reversal")
        if self._collector is not None:
            self._collector.reversal = self._reversal

    def _attach(self, head: SiteHead, repeats: str, fusion: str | None, one_call: bool) -> None:
        self.head = head
        self._collector = collector = Collector(self.model, head, self.sites, repeats, fusion, one_call)
        collector.reversal = self._reversal
        self._watch = Watch(self.model, head)
        self._plan_taps(collector)
        self.model.add_module(self.report.name, head)
        self._hooks["begin"] = self.model.register_forward_pre_hook(self._begin)
        self.refresh()
        self._hooks["end"] = self.model.register_forward_hook(collector.end, always_call=True)

    def refresh(self) -> None:
        """Move the heads behind what the names of the sites mean now: after a submodule was wrapped (LoRA) or replaced.

        Every forward of the whole model does this by itself.

        Raises:
            InputError: a name is gone.
        """
        collector = self._alive()[1]
        for name, make in self._taps.items():
            module = collector.resolve(name)
            if self._hooks.get(name, (None,))[0] is not module:
                if name in self._hooks:
                    self._hooks[name][1].remove()
                self._hooks[name] = module, make(module)

    def _plan_taps(self, collector: Collector) -> None:
        """By the name of a module, the function that puts our hook on it."""
        entries: dict[str, list[tuple[int, Site]]] = {}
        for i, site in enumerate(self.sites.values()):
            entries.setdefault(site.module, []).append((i, site))
        self._taps = {name: Tap(collector, name, sites).put_on for name, sites in entries.items()}
        if collector.fusion is not None:
            self._taps[collector.fusion] = collector.watch_fusion

    def _begin(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model."""
        collector = self._alive()[1]
        if not torch.compiler.is_compiling():
            self.refresh()
            self._look()
        collector.begin(module, args)

    def _look(self) -> None:
        watch, grad = self._watch, torch.is_grad_enabled()
        if watch is None or _get_current_dispatch_mode() is not None:  # fake tensors have no values to look at
            return
        if not watch.done and self.model.training and grad:
            watch.look(", ".join(map(str, self.sites.values())))
        elif watch.initial is not None and not self.model.training and not grad:
            watch.evaluated(", ".join(map(str, self.sites.values())))

    def unwatch(self, initial_only: bool = False) -> None:
        """Leave out the warnings that heads do not learn, or have initial weights in evaluation; or the second alone."""
        if initial_only and self._watch is not None:
            self._watch.initial = None
        else:
            self._watch = None

    def restore(self) -> None:
        """Take heads and hooks off: state dict and outputs are those of the model before. Safe to repeat.

        An optimiser that knows the parameters of the heads keeps them; build a new one.

        Raises:
            RuntimeError: the submodule was replaced by another object meanwhile; nothing is changed then.
        """
        if self.head is None:
            return
        if getattr(self.model, self.report.name, None) is not self.head:
            raise RuntimeError(
                f"restore: model.{self.report.name} is no longer the head that apply_ebr put there; put it back first"
            )
        for hook in self._hooks.values():
            (hook[1] if isinstance(hook, tuple) else hook).remove()
        delattr(self.model, self.report.name)
        self._hooks, self._taps = {}, {}
        self.head = self._collector = self._watch = None
        self.report = dataclasses.replace(self.report, status="restored")

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the heads, for an optimiser that was built earlier: ``add_param_group``."""
        return self._alive()[0].parameters()

    def _alive(self) -> tuple[SiteHead, Collector]:
        if self.head is None or self._collector is None:
            raise RuntimeError(f"this EBR handle has no heads ({self.report.status}); call apply_ebr on the model")
        return self.head, self._collector

    def save(self, path: str | Path) -> None:
        """Write the heads, with their sites, order, widths and options; ``.safetensors``, else by ``torch.save``."""
        store.save(self._alive()[0], Path(path))

    def load(self, path: str | Path) -> None:
        """Read heads from a file of :meth:`save`, or from a checkpoint of the whole model.

        Raises:
            InputError: the file holds no heads, or heads of other sites, order, widths or options; it says what differs.
        """
        store.load(self._alive()[0], Path(path), self.report.name)

    def explain(self) -> str:
        """How each head ran in the latest forward: in one call of the op for all, or in one of its own, and why."""
        collector = self._alive()[1]
        lines = [f"EBR on {self.report.model}"]
        ran = {} if collector.latest is None else collector.latest.ran
        for i, name in enumerate(self.sites):
            unseen = "a call of its own: compiled code holds no features back" if i in ran else "has not run yet"
            lines.append(f"  {name} ({self.sites[name]}): {collector.decisions.get(i, unseen)}")
        return "\n".join(lines)

    def reset(self) -> None:
        """Forget the latents of the latest forward; each forward of the whole model does this first."""
        self._alive()[1].reset()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within this context, all forwards count together: ``losses()`` afterwards are means over the rows of all.

        For steps that run the model more than once, or its submodules one by one. Forwards without gradients in a step
        with gradients do not count.
        """
        self.refresh()
        self._look()
        with self._alive()[1].scope():
            yield

    @contextmanager
    def present(self, mask: Tensor | Mapping[str, Tensor]) -> Iterator[None]:
        """Within this context, rows that are absent are never read, are recovered as zeros, and count in no loss.

        Args:
            mask: bool ``[B, m]`` in the order of ``sites``; or modality -> bool ``[B]`` or ``[B, T]`` (tokens).

        Raises:
            InputError: an unknown modality, or (in the forward) a mask that does not fit the features.
        """
        collector = self._alive()[1]
        with collector.set(masks=collector.split_mask(mask)):
            yield

    def losses(self, normalizer: Tensor | None = None) -> EBRLosses:
        """L_md (reversal inside) and L_rec of the latest forward: add them to your loss, the second with a weight.

        A modality that did not run counts as absent. Asking twice gives the same tensors.

        Args:
            normalizer: replaces both denominators (one element), or #present and #rows (two), counted in samples:
                exact means over processes and accumulation steps.

        Raises:
            RuntimeError: no site ran since the latest forward began, or the heads are gone.
        """
        if normalizer is not None and (not isinstance(normalizer, Tensor) or normalizer.numel() not in (1, 2)):
            raise InputError("losses: normalizer must be a tensor of one element, or of two (#present, #rows)")
        found = self._ran()
        if normalizer is None and found.losses is not None and found.losses[0] == len(found.records):
            return found.losses[1]
        if normalizer is None and len(found.means) == 1 and not found.discrimination:
            losses = found.means[0][0]
        else:
            n = [counts(r) for r in found.records]
            wholes = [(means, sum(counts(r) for r in records)) for means, records in found.means]
            md = [means.discrimination * count for means, count in wholes] + found.discrimination
            rec = [means.reconstruction * count for means, count in wholes] + found.reconstruction
            losses = EBRLosses(divide(md, n, normalizer, 0), divide(rec, n, normalizer, 1))
        if normalizer is None:
            found.losses = len(found.records), losses
        return losses

    def _ran(self) -> Pass:
        """The latest pass, with all heads run."""
        collector = self._alive()[1]
        found = collector.current()
        if not found.compiled:
            collector.finish(found, "losses()")
        if not found.records:
            raise RuntimeError(
                "losses: no site has run in this thread since the latest reset; run the model first, and the modules of the "
                "sites as module(x), not as module.forward(x), which skips hooks"
            )
        found.taken = True
        ran = {r.modality for r in found.records}
        for i in range(len(self.sites)):
            if i not in ran and i not in self._warned and self.model.training:
                self._warned.add(i)
                warnings.warn(f"{collector.name(i)} did not run in this forward; it counts as absent", stacklevel=4)
        return found

    @property
    def output(self) -> CollectedOutput:
        """Recovered features, latents and losses of the latest forward; several calls of a site are concatenated."""
        losses, records = self.losses(), self._ran().records
        recovered: dict[str, Tensor] = {}
        latents: dict[str, Tensor] = {}
        for i, name in enumerate(self.sites):
            mine = [r for r in records if r.modality == i]
            if mine:
                recovered[name] = torch.cat([r.recovered for r in mine])
                latents[name] = torch.cat([r.latents for r in mine])
        return CollectedOutput(recovered, latents, *losses)

    def adversarial(self) -> dict[str, float]:
        """Adversarial training in the latest forward: call it before backward, and not in every step (it waits).

        "loss_md"; "loss_md_over_entropy" (1 where psi knows nothing; NaN for one modality); "psi_accuracy"; and with
        gradients enabled "grad_norm_psi" and "grad_norm_encoders": norms of the gradient of L_md on psi, and on the
        sites and head encoders together (there times -λ).
        """
        head, collector = self._alive()
        loss = self.losses().discrimination
        sites = [collector.resolve(module) for module in {site.module: None for site in self.sites.values()}]
        return adversarial_figures(self._ran().records, head, sites, loss)

    @torch.no_grad()
    def predict(self, *args: Any, present: Tensor, source: Tensor, **kwargs: Any) -> Any:
        """``model(*args, **kwargs)`` with latents of present modalities decoded in the place of absent ones.

        Where the heads do not run in one call (:meth:`explain`), the model runs twice: for the latents of all modalities,
        then with the substitutes. Pass any placeholder (zeros) where an input is absent: its features are not read.

        Args:
            present: bool ``[B, m]`` in the order of ``sites``.
            source: int64 ``[B, m]`` or float ``[B, m, m]`` as in :func:`mmc_fast.functional.ebr_step`; made by
                :mod:`mmc_fast.nn.substitution`.

        Raises:
            InputError: shapes that do not fit; features whose rows differ between modalities (sequence lengths).
            RuntimeError: the model is in training mode; a site does not run, or runs twice.
        """
        head, collector = self._alive()
        m = len(self.sites)
        if self.model.training:
            raise RuntimeError("predict: the model is in training mode; call model.eval() first")
        masks = collector.split_mask(present)
        expected = [len(present), m, m] if source.is_floating_point() else [len(present), m]
        if list(source.shape) != expected or not (source.is_floating_point() or source.dtype == torch.int64):
            raise InputError(
                f"predict: source is {source.dtype} {list(source.shape)}; give torch.int64 [B, {m}] or float "
                f"[B, {m}, {m}] with B = {len(present)}"
            )
        with collector.set(masks=masks, source=source):
            found = collector.reset()
            out = self.model(*args, **kwargs)
            found = collector.current()
            if found.together:
                collector.reset()
                return out
            latents = self._one_latent_each(found)
            weights = source_weights(source.to(present.device), present, latents[0].dtype)
            with collector.set(given=[_substitute(head, i, latents, weights) for i in range(m)]):
                out = self.model(*args, **kwargs)
            collector.reset()
            return out

    def _one_latent_each(self, found: Pass) -> list[Tensor]:
        names, latents = list(self.sites), {r.modality: r.latents for r in found.records}
        if len(latents) < len(names) or len(found.records) > len(names):
            ran = [names[r.modality] for r in found.records]
            raise RuntimeError(f"predict: every site must run once in a forward; here ran {ran} of {names}")
        if len({t.shape for t in latents.values()}) > 1:
            shapes = {name: list(latents[i].shape[:-1]) for i, name in enumerate(names)}
            raise InputError(f"predict: rows differ between modalities, {shapes}; substitution needs equal rows")
        return [latents[i] for i in range(len(names))]


def _substitute(head: SiteHead, i: int, latents: list[Tensor], weights: Tensor) -> Tensor:
    """``decoder_i(sum_j weights[:, i, j] * latents[j])``: ``[B, ..., d_i]``; zeros where all weights are zero."""
    own = latents[i]
    rows = [1] * (own.dim() - 2)
    mixed = torch.zeros_like(own)
    for j, latent in enumerate(latents):
        w = weights[:, i, j].to(own.device).reshape(-1, *rows, 1)
        # A latent of weight zero contributes nothing, not even a NaN.
        mixed = mixed + torch.where(w != 0, w * latent.to(own.device), w.new_zeros(()))
    valid = (weights[:, i] != 0).any(-1).to(own.device).reshape(-1, *rows).expand(own.shape[:-1])
    return by_modules.decode(head, i, mixed, valid)


def find_handles(model: nn.Module) -> list[EBRHandle]:
    """The handles of the heads on ``model`` and its submodules, for example after ``copy.deepcopy`` or unpickling."""
    hooks = [getattr(hook, "__self__", None) for m in model.modules() for hook in m._forward_pre_hooks.values()]
    return list({id(handle): handle for handle in hooks if isinstance(handle, EBRHandle)}.values())
