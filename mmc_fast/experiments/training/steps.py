"""One optimisation step: which losses are taken, over which rows, and which parameters are updated.

The rows of a step may be spread over processes, over pieces one after another, or both. Every mean of a step is a sum
over rows divided by a count of all its rows, which each process knows because it draws the masks of all rows; so sums
of losses and gradients need no further weights, however uneven the shares are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn, optim

from mmc_fast.errors import InputError
from mmc_fast.nn.substitution import foreign_source

from .config import TrainConfig
from .model import MultimodalModel
from .processes import Processes
from .substitution import source_for

Phase = Literal["joint", "semantic", "adversarial"]

_UPDATED: dict[str, tuple[str, ...]] = {
    "joint": ("encoders", "task", "discriminator"),
    "semantic": ("encoders", "task"),
    "adversarial": ("encoders", "discriminator"),
}


def phase_of(config: TrainConfig, epoch: int, stopped: bool) -> Phase:
    """The phase of an epoch (from 0).

    "joint": all losses at once. "semantic": L_sem and L_rec, psi frozen. "adversarial": L_md alone, decoders and fusion
    frozen. Without EBR, or once the adversarial part has stopped, every epoch is semantic.
    """
    if config.ebr is None or stopped:
        return "semantic"
    if config.ebr.schedule == "joint":
        return "joint"
    return "adversarial" if (epoch // config.ebr.interleave_epochs) % 2 else "semantic"


@dataclass(frozen=True)
class Counts:
    """The denominators of a step, and what is drawn once for all of its rows.

    ``pairs``: present (row, head) pairs, None where the head may count them itself. ``source``: whose latent each
    modality is rebuilt from in cross-modal reconstruction, with ``source_pairs`` = (pairs, pairs that have a source).
    """

    rows: int
    pairs: Tensor | None = None
    source: Tensor | None = None
    source_pairs: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """Rows of a step: features ``[b, d_i]``, labels ``[b]``, and presence, substitutes and natural presence ``[b, m]``.

    ``present`` None: everything is there. ``natural``: presence before anything was hidden.
    """

    features: Sequence[Tensor]
    labels: Tensor
    present: Tensor | None = None
    source: Tensor | None = None
    natural: Tensor | None = None


class Stepper:
    """Computes losses and updates the parameters of one model.

    ``reversal``: λ as a 0-d tensor, so that a schedule can change it without anything being rebuilt.

    Raises:
        InputError: dropout in the encoders, where a step is split.
    """

    def __init__(
        self,
        model: MultimodalModel,
        optimizer: optim.Optimizer,
        config: TrainConfig,
        processes: Processes | None = None,
    ) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config
        self.processes = processes or Processes()
        self.split = self.processes.size > 1 or config.accumulate > 1
        if self.split and config.encoder_dropout > 0:
            raise InputError(
                "encoder_dropout takes all rows of a step at once, so a step cannot be split; use one process and "
                "accumulate=1, or leave encoder_dropout out"
            )
        self.groups = model.groups()
        self.reversal = torch.zeros((), device=model.prior.device)
        self.random = torch.Generator(device=self.reversal.device)  # of the sources of cross-modal reconstruction
        self.clipped = 0  # gradients that clip_grad_norm has scaled down

    def backward(
        self,
        phase: Phase,
        labels: Tensor,
        load: Callable[[slice], Sequence[Tensor]],
        present: Tensor | None = None,
        source: Tensor | None = None,
        natural: Tensor | None = None,
        stop: bool = False,
    ) -> tuple[Tensor, Tensor, bool]:
        """Gradients of all rows in every process; returns the loss, its parts ``[3]``, and whether a process asks to stop.

        ``labels [B]`` and the masks are those of all rows of the step; ``load(rows)`` gives the features of some.
        """
        self.optimizer.zero_grad(set_to_none=True)
        counts = self.count(len(labels), present)
        extras = torch.zeros(5, device=labels.device)
        for rows in pieces(self.processes.rows(len(labels)), self.config.accumulate):
            masks = [None if t is None else t[rows] for t in (present, source, natural)]
            some = replace(counts, source=None if counts.source is None else counts.source[rows])
            total, parts = self.losses(phase, Rows(load(rows), labels[rows], *masks), some)
            total.backward()
            extras[0] += total.detach()
            extras[1:4] += parts
        extras[4] = float(stop)
        self.freeze(phase)
        extras = self.processes.reduce_gradients(self.updated(phase), extras)
        return extras[0], extras[1:4], bool(extras[4] > 0) if self.processes.size > 1 else stop

    def count(self, rows: int, present: Tensor | None) -> Counts:
        """The counts of a step of so many rows; draws the sources of cross-modal reconstruction."""
        ebr = self.config.ebr
        if ebr is None or not (self.split or ebr.cross_recovery > 0):
            return Counts(rows)
        m, device = len(self.model.columns), self.reversal.device
        here = (
            torch.ones(rows, m, dtype=torch.bool, device=device)
            if present is None
            else self.model.head_present(present)
        )
        # Substitution leaves a present modality its own latent, so rows of L_rec and of L_md are the same ones.
        pairs = here.sum().float()
        counts = Counts(rows, pairs if self.split else None)
        if ebr.cross_recovery == 0:
            return counts
        source = foreign_source(None if present is None else here, rows, m, self.random)
        return replace(counts, source=source, source_pairs=torch.stack([pairs, (here & (source >= 0)).sum().float()]))

    def losses(self, phase: Phase, rows: Rows, counts: Counts | None = None) -> tuple[Tensor, Tensor]:
        """Total to descend, and the parts ``[3]`` = (L_sem, L_md, L_rec) without graph; 0 for what is not computed.

        With ``counts`` these are some rows of a larger step: sums divided by its counts, which add up to its losses.
        """
        counts = counts or self.count(len(rows.labels), rows.present)
        none = rows.labels.new_zeros((), dtype=torch.float32)
        if phase == "adversarial":
            encoded = self.model.encode(rows.features, rows.present)
            out = self.model.apply_head(encoded, rows.present, rows.source, self.reversal, counts.pairs)
            md, rec = out.discrimination_loss, out.reconstruction_loss
            return md, torch.stack([none, md.detach(), rec.detach()])
        result = self.model(rows.features, rows.present, rows.source, self.reversal, counts.pairs)
        semantic = self._semantic(result.logits, rows, counts)
        total = self._reweighted(result.own, rows, counts)
        if self.config.consistency:
            complete, divergence = self._consistency(result.logits, rows, counts)
            semantic = (semantic + complete) / 2
            total = total + (semantic + divergence)
        else:
            total = total + semantic
        if result.ebr is None or self.config.ebr is None:
            return total, torch.stack([semantic.detach(), none, none])
        md, rec = result.ebr.discrimination_loss, result.ebr.reconstruction_loss
        if self.config.ebr.cross_recovery > 0:
            encoded = self.model.encode(rows.features, rows.present)
            out = self.model.apply_head(encoded, rows.present, counts.source, normalizer=counts.source_pairs)
            total = total + self.config.ebr.cross_recovery * out.reconstruction_loss
        if phase == "joint":
            total = total + md
        if self.config.ebr.reconstruction > 0:
            total = total + self.config.ebr.reconstruction * rec
        return total, torch.stack([semantic.detach(), md.detach(), rec.detach()])

    def _consistency(self, masked: Tensor, rows: Rows, counts: Counts) -> tuple[Tensor, Tensor]:
        """L_sem on complete data, and the weighted divergence of the masked prediction from it."""
        natural = rows.natural
        source = None if natural is None or self.model.head is None else source_for(self.model, natural)
        complete = self.model(rows.features, natural, source).logits
        divergence = self.model.task.divergence(masked, complete.detach()) / counts.rows
        return self._semantic(complete, rows, counts), self.config.consistency * divergence

    def _semantic(self, outputs: Tensor, rows: Rows, counts: Counts) -> Tensor:
        """The loss of the task, mean over the rows of the step."""
        return self.model.task.loss(outputs, rows.labels) / counts.rows

    def _reweighted(self, logits: Tensor | None, rows: Rows, counts: Counts) -> Tensor | float:
        """β times the unimodal loss of the re-weighted modality: over rows that have it, divided by all of the step."""
        if logits is None or self.model.reweighted is None:
            return 0.0
        losses = self.model.task.loss(logits, rows.labels, "none")
        if rows.present is not None:
            losses = torch.where(rows.present[:, self.model.reweighted], losses, 0.0)
        return self.config.reweight * losses.sum() / counts.rows

    def update(self, phase: Phase) -> bool:
        """The step of the optimiser, with the norm of the gradient limited; True where it was not taken.

        The gradient is looked at only where the configuration clips it or skips what is not finite.
        """
        if self._limit(self.updated(phase)):
            return True
        self.optimizer.step()
        return False

    def updated(self, phase: Phase) -> list[nn.Parameter]:
        """Parameters that are updated in a phase."""
        names = self._names(phase)
        return [p for name, parameters in self.groups.items() if name in names for p in parameters]

    def _names(self, phase: Phase) -> tuple[str, ...]:
        # In a phase of L_md alone, encoders that receive no reversed gradient must not coast on their moments.
        still = phase == "adversarial" and float(self.reversal) == 0.0
        return tuple(name for name in _UPDATED[phase] if not (still and name == "encoders"))

    def freeze(self, phase: Phase) -> None:
        """Take the gradients of the other groups away."""
        for name, parameters in self.groups.items():
            if name not in self._names(phase):
                for p in parameters:
                    p.grad = None

    def _limit(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Scale the gradients down to ``clip_grad_norm`` together; True where their norm is NaN or infinite."""
        most = self.config.clip_grad_norm
        if most is None and self.config.nonfinite == "stop":
            return False
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        value = float(norm)
        if not math.isfinite(value):
            return True
        if most is not None and value > most:
            self.clipped += 1
            nn.utils.clip_grads_with_norm_(parameters, most, norm)
        return False


def pieces(rows: slice, count: int) -> list[slice]:
    """``rows`` in at most ``count`` pieces, none empty."""
    n = rows.stop - rows.start
    count = min(count, max(1, n))
    edges = [rows.start + n * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges) if b > a]
