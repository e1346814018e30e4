"""``EBRHandle``: the heads on a model, the losses of its latest forward, and the way back."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmc_fast.errors import InputError
from mmc_fast.nn import EBRHead
from mmc_fast.ops.ebr.reference import source_weights

from .collect import Collector, Tap
from .game import game_figures
from .losses import EBRLosses, Record, discrimination_loss, reconstruction_loss
from .report import ApplyReport
from .site import Site

__all__ = ["CollectedOutput", "EBRHandle", "find_handles"]


class CollectedOutput(NamedTuple):
    """What the heads did in the latest forward, by modality: recovered ``[B, ..., d_i]``, latents ``[B, ..., k]``."""

    recovered: dict[str, Tensor]
    latents: dict[str, Tensor]
    discrimination_loss: Tensor
    reconstruction_loss: Tensor


class EBRHandle:
    """Returned by :func:`mmc_fast.apply_ebr`; ``str(handle)`` says what was done and why not elsewhere.

    Attributes:
        head: the :class:`mmc_fast.nn.EBRHead`, registered as a submodule of the model; None in a dry run and after
            :meth:`restore`.
        sites: modality -> :class:`Site`; the order is that of psi's classes and of the columns of a mask.
        reversal: λ, a float or a 0-d tensor; may be changed between steps.
        report: :class:`ApplyReport`.
    """

    def __init__(self, model: nn.Module, sites: dict[str, Site], report: ApplyReport, reversal: float | Tensor) -> None:
        self.model, self.sites, self.report, self.reversal = model, sites, report, reversal
        self.head: EBRHead | None = None
        self._collector: Collector | None = None
        self._hooks: list[Any] = []
        self._losses: tuple[list[Record], int, EBRLosses] | None = None  # of which records, and how many they were
        self._warned: set[int] = set()

    def __str__(self) -> str:
        return str(self.report)

    def __repr__(self) -> str:
        return f"<EBRHandle on {self.report.model}: {', '.join(self.sites)}; {self.report.status}>"

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without losses: those belong to a graph that cannot be copied."""
        return {**self.__dict__, "_losses": None}

    def _attach(self, head: EBRHead, repeats: str) -> None:
        self.head, self._collector = head, Collector(self.model, head, self.sites, repeats)
        self.model.add_module(self.report.name, head)
        self._hooks.append(self.model.register_forward_pre_hook(self._collector.begin))
        for i, site in enumerate(self.sites.values()):
            tap = Tap(self, self._collector, i, site)
            self._hooks.append(self.model.get_submodule(site.module).register_forward_hook(tap))
        self._hooks.append(self.model.register_forward_hook(self._collector.end, always_call=True))

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
        for hook in self._hooks:
            hook.remove()
        delattr(self.model, self.report.name)
        self._hooks, self._losses = [], None
        self.head = self._collector = None
        self.report = dataclasses.replace(self.report, status="restored")

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the heads, for an optimiser that was built earlier: ``add_param_group``."""
        return self._alive()[0].parameters()

    def _alive(self) -> tuple[EBRHead, Collector]:
        if self.head is None or self._collector is None:
            raise RuntimeError(f"this EBR handle has no heads ({self.report.status}); call apply_ebr on the model")
        return self.head, self._collector

    def reset(self) -> None:
        """Forget the latents of the latest forward; each forward of the whole model does this first."""
        self._alive()[1].reset()

    @contextmanager
    def present(self, mask: Tensor | Mapping[str, Tensor]) -> Iterator[None]:
        """Within this context, rows that are absent are never read, are recovered as zeros, and count in no loss.

        Args:
            mask: bool ``[B, m]`` in the order of ``sites``; or modality -> bool ``[B]`` or ``[B, T]`` (tokens).

        Raises:
            InputError: an unknown modality, or (in the forward) a mask that does not fit the features.
        """
        collector = self._alive()[1]
        before, collector.masks = collector.masks, collector.split_mask(mask)
        try:
            yield
        finally:
            collector.masks = before

    def losses(self, normalizer: Tensor | None = None) -> EBRLosses:
        """L_md (reversal inside) and L_rec of the latest forward: add them to your loss, the second with a weight.

        A modality that did not run counts as absent. Asking twice gives the same tensors.

        Args:
            normalizer: replaces both denominators (one element), or #present and #rows (two), counted in samples:
                exact means over processes and accumulation steps.

        Raises:
            RuntimeError: no site ran since the latest forward began, or the heads are gone.
        """
        head, collector = self._alive()
        if normalizer is not None and (not isinstance(normalizer, Tensor) or normalizer.numel() not in (1, 2)):
            raise InputError("losses: normalizer must be a tensor of one element, or of two (#present, #rows)")
        self._check_ran()
        collector.taken = True
        records = collector.records
        if normalizer is None and self._losses is not None:
            known, n, losses = self._losses
            if known is records and n == len(records):
                return losses
        losses = EBRLosses(
            discrimination_loss(records, head.discriminator, self.reversal, normalizer),
            reconstruction_loss(records, normalizer),
        )
        if normalizer is None:
            self._losses = (records, len(records), losses)
        return losses

    def _check_ran(self) -> None:
        collector = self._alive()[1]
        ran = {r.modality for r in collector.records}
        if not ran:
            raise RuntimeError(
                "losses: no site has run since the latest reset; run the model first, and the modules of the sites as "
                "module(x), not as module.forward(x), which skips hooks"
            )
        for i in range(len(self.sites)):
            if i not in ran and i not in self._warned and self.model.training:
                self._warned.add(i)
                warnings.warn(f"{collector.name(i)} did not run in this forward; it counts as absent", stacklevel=3)

    @property
    def output(self) -> CollectedOutput:
        """Recovered features, latents and losses of the latest forward; several calls of a site are concatenated."""
        head, collector = self._alive()
        losses = self.losses()
        recovered: dict[str, Tensor] = {}
        latents: dict[str, Tensor] = {}
        for i, name in enumerate(self.sites):
            mine = [r for r in collector.records if r.modality == i]
            if mine:
                recovered[name] = torch.cat([r.features + r.decoded if head.residual else r.decoded for r in mine])
                latents[name] = torch.cat([r.latents for r in mine])
        return CollectedOutput(recovered, latents, *losses)

    def game(self) -> dict[str, float]:
        """The two-player game in the latest forward: call it before backward, and not in every step (it waits).

        "loss_md"; "loss_md_over_entropy" (1 where psi knows nothing; NaN for one modality); "psi_accuracy"; and with
        gradients enabled "grad_norm_psi" and "grad_norm_encoders": norms of the gradient of L_md on psi, and on the
        sites and head encoders together (there times -λ).
        """
        head, collector = self._alive()
        loss = self.losses().discrimination
        sites = [self.model.get_submodule(site.module) for site in self.sites.values()]
        return game_figures(collector.records, head, sites, loss)

    @torch.no_grad()
    def predict(self, *args: Any, present: Tensor, source: Tensor, **kwargs: Any) -> Any:
        """``model(*args, **kwargs)`` with latents of present modalities decoded into the slots of absent ones.

        The model runs twice: for the latents of all modalities, then with the substitutes. Pass any placeholder
        (zeros) where an input is absent: its features are not read.

        Args:
            present: bool ``[B, m]`` in the order of ``sites``.
            source: int64 ``[B, m]`` or float ``[B, m, m]`` as in :func:`mmc_fast.functional.ebr_step`; made by
                :mod:`mmc_fast.nn.substitution`.

        Raises:
            InputError: shapes that do not fit; features whose rows differ between modalities (sequence lengths).
            RuntimeError: the model is in training mode; a site does not run, or runs twice.
        """
        collector, m = self._alive()[1], len(self.sites)
        if self.model.training:
            raise RuntimeError("predict: the model is in training mode; call model.eval() first")
        with self.present(present):
            expected = [len(present), m, m] if source.is_floating_point() else [len(present), m]
            if list(source.shape) != expected or not (source.is_floating_point() or source.dtype == torch.int64):
                raise InputError(
                    f"predict: source is {source.dtype} {list(source.shape)}; give torch.int64 [B, {m}] or float "
                    f"[B, {m}, {m}] with B = {len(present)}"
                )
            self.model(*args, **kwargs)
            latents = self._one_latent_each(collector)
            weights = source_weights(source.to(present.device), present, latents[0].dtype)
            collector.substitutes = (latents, weights)
            try:
                return self.model(*args, **kwargs)
            finally:
                collector.substitutes = None
                collector.reset()

    def _one_latent_each(self, collector: Collector) -> list[Tensor]:
        names, found = list(self.sites), {r.modality: r.latents for r in collector.records}
        if len(found) < len(names) or len(collector.records) > len(names):
            ran = [names[r.modality] for r in collector.records]
            raise RuntimeError(f"predict: every site must run once in a forward; here ran {ran} of {names}")
        latents = [found[i] for i in range(len(names))]
        if len({t.shape for t in latents}) > 1:
            shapes = {name: list(t.shape[:-1]) for name, t in zip(names, latents, strict=True)}
            raise InputError(f"predict: rows differ between modalities, {shapes}; substitution needs equal rows")
        return latents


def find_handles(model: nn.Module) -> list[EBRHandle]:
    """The handles of the heads on ``model`` and its submodules, for example after ``copy.deepcopy`` or unpickling."""
    taps = [hook for module in model.modules() for hook in module._forward_hooks.values() if isinstance(hook, Tap)]
    handles = {id(tap.handle): tap.handle for tap in taps}
    return [handle for handle in handles.values() if isinstance(handle, EBRHandle)]
