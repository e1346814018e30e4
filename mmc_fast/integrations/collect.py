"""``Collector``: applies the head of one modality at a time, inside of a foreign forward, and keeps the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc_fast._util.names import unknown
from mmc_fast.errors import InputError
from mmc_fast.nn import EBRHead
from mmc_fast.ops.ebr.reference import LAYER_NORM_EPS

from .losses import Record
from .site import Site

__all__ = ["Collector", "Tap"]


class Tap:
    """Forward hook of one site. An object, not a closure, so that a deep copy of the model taps into its own handle."""

    def __init__(self, handle: object, collector: Collector, modality: int, site: Site) -> None:
        self.handle, self.collector, self.modality, self.site = handle, collector, modality, site

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        features = self.site.read(output)
        recovered = self.collector.visit(self.modality, self.site.to_rows(features))
        return self.site.write(output, self.site.from_rows(recovered.to(features.dtype)))


class Collector:
    """The rows of one pass, that is of the latest forward of the whole model.

    A pass begins with a forward of the model. Where submodules are called one by one instead, it begins with the first
    call after the losses were taken. ``records``: one entry for each call of a site.
    """

    def __init__(self, model: nn.Module, head: EBRHead, sites: dict[str, Site], repeats: str) -> None:
        self.model, self.head, self.sites, self.repeats = model, head, sites, repeats
        self.records: list[Record] = []
        self.taken = False  # the losses of these records were asked for
        self.masks: list[Tensor | None] | None = None
        self.substitutes: tuple[list[Tensor], Tensor] | None = None  # latents and weights [B, m, m]
        self._inside = False  # a forward of the whole model is running
        self._wants_grad = False  # gradients were enabled when it began

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without rows: those belong to a graph that cannot be copied."""
        return {**self.__dict__, "records": [], "taken": False, "masks": None, "substitutes": None, "_inside": False}

    def begin(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model."""
        self.reset()
        self._inside, self._wants_grad = True, torch.is_grad_enabled()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model, also called where the forward raised."""
        self._inside = False

    def reset(self) -> None:
        self.records, self.taken = [], False

    def visit(self, i: int, z: Tensor) -> Tensor:
        """Recovered rows for the features ``z`` ``[B, ..., d_i]`` of modality ``i``; the rows are recorded."""
        head = self.head
        if z.shape[-1] != head.dims[i]:
            raise InputError(
                f"apply_ebr: {self.name(i)} gave {list(z.shape)} (samples first, features last) but its head was "
                f"built for width {head.dims[i]}; correct dims or the feature_dim of its Site"
            )
        present = self._mask(i, z)
        x = _keep(z.to(next(head.encoders[i].parameters()).dtype), present)
        latent = head.encoders[i](x)
        if head.normalize:
            latent = F.layer_norm(latent, latent.shape[-1:], eps=LAYER_NORM_EPS)
        latent = _keep(latent, present)
        mixed, valid = (latent, present) if self.substitutes is None else _substituted(i, latent, *self.substitutes)
        decoded = _keep(head.decoders[i](mixed), valid)
        if not (_recomputing() or torch.compiler.is_exporting()):
            self._check_pass(i)
            self.records.append(Record(i, x, latent, decoded, present))
        return x + decoded if head.residual else decoded

    def _check_pass(self, i: int) -> None:
        if self.taken and not self._inside:
            self.reset()
        training = self.model.training
        if self._inside and training and self._wants_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                f"apply_ebr: {self.name(i)} runs under torch.no_grad() in a training forward, so its head could not "
                "learn; freeze it with requires_grad_(False) instead, or checkpoint with use_reentrant=False"
            )
        if self.repeats == "all" or all(r.modality != i for r in self.records):
            return
        if self._inside:
            raise RuntimeError(
                f"apply_ebr: {self.name(i)} ran twice in one forward; apply_ebr(..., repeats='all') takes the rows "
                "of every call, or name a module that runs once"
            )
        if training and torch.is_grad_enabled():
            raise RuntimeError(
                f"apply_ebr: {self.name(i)} ran again before handle.losses() was asked for; add the losses in each "
                "step, or call handle.reset() to leave them out"
            )
        self.reset()  # evaluation by calling submodules: the latest call counts

    def name(self, i: int) -> str:
        name, site = list(self.sites.items())[i]
        return f"modality '{name}' ({site})"

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

    def _mask(self, i: int, z: Tensor) -> Tensor | None:
        mask = None if self.masks is None else self.masks[i]
        if mask is None:
            return None
        if mask.dim() >= z.dim() or mask.shape != z.shape[: mask.dim()]:
            raise InputError(
                f"present: the mask of {self.name(i)} has shape {list(mask.shape)}; its rows are {list(z.shape[:-1])}"
            )
        return mask.to(z.device).reshape(*mask.shape, *[1] * (z.dim() - 1 - mask.dim())).expand(z.shape[:-1])


def _keep(rows: Tensor, present: Tensor | None) -> Tensor:
    """Rows where ``present``, zeros elsewhere; never multiplies, so that NaN in an absent row goes nowhere."""
    return rows if present is None else torch.where(present.unsqueeze(-1), rows, rows.new_zeros(()))


def _substituted(i: int, own: Tensor, latents: list[Tensor], weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed latent of slot ``i`` (shape of ``own``) and which rows have a source."""
    mixed = torch.zeros_like(own)
    for j, latent in enumerate(latents):
        w = weights[:, i, j].to(own.device).reshape(-1, *[1] * (own.dim() - 1))
        # A latent of weight zero contributes nothing, not even a NaN.
        mixed = mixed + torch.where(w != 0, w * latent.to(own.device), w.new_zeros(()))
    valid = (weights[:, i] != 0).any(-1).to(own.device)
    return mixed, valid.reshape(-1, *[1] * (own.dim() - 2)).expand(own.shape[:-1])


def _recomputing() -> bool:
    """Inside of a backward: activation checkpointing runs a module again, and its rows are recorded already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
