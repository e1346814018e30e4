"""A step whose rows are spread over processes, over pieces one after another, or both: equal to the step of all rows.

Every mean of a step is a sum over rows divided by a count. The counts are those of all rows of the step, which each
process knows because it draws the masks of all rows; so sums of losses and gradients need no further weights, however
uneven the shares are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mmc_fast.errors import InputError
from mmc_fast.nn.substitution import foreign_source

from .config import TrainConfig
from .steps import Phase, Share, Stepper
from .world import World

__all__ = ["Outcome", "SplitStep"]


@dataclass
class Outcome:
    """Loss and parts ``[3]`` of all rows (NaN where the phase has none); whether a process asked to stop."""

    total: Tensor
    parts: Tensor
    stop: bool


class SplitStep:
    """Takes the steps of ``stepper`` in ``pieces`` pieces per process.

    Raises:
        InputError: losses that compare the rows of a batch with each other, which pieces cannot see.
    """

    def __init__(self, stepper: Stepper, world: World, config: TrainConfig) -> None:
        if config.ebr is not None and config.ebr.alignment == "contrastive":
            raise InputError(
                "ebr.alignment 'contrastive' compares all rows of a batch with each other, so a step cannot be split; "
                "use one process and accumulate=1, or alignment 'distance'"
            )
        self.stepper, self.world, self.config = stepper, world, config
        self._latents: list[tuple[Tensor, Tensor | None]] = []
        self._pairs = 0

    def backward(
        self,
        phase: Phase,
        labels: Tensor,
        load: Callable[[slice], Sequence[Tensor]],
        present: Tensor | None,
        source: Tensor | None,
        natural: Tensor | None,
        stop: bool,
    ) -> Outcome:
        """Gradients of all rows in every process. ``labels [B]`` and masks are those of all rows of the step;
        ``load(rows)`` gives the features of some of them."""
        stepper, world = self.stepper, self.world
        stepper.optimizer.zero_grad(set_to_none=True)
        share = self._share(len(labels), present)
        if phase == "joint" and stepper.balanced:
            norms = self._norms(share, labels, load, present, source)
            share = replace(share, strength=stepper.strength(present, *norms))
        if phase == "adversarial":
            stepper.pull = share.strength
        extras = torch.zeros(5, device=labels.device)
        self._latents = []
        for rows in _pieces(world.rows(len(labels)), self.config.accumulate):
            total, parts, latents = stepper.losses(
                phase,
                load(rows),
                _cut(present, rows),
                labels[rows],
                _cut(source, rows),
                _cut(natural, rows),
                replace(share, foreign=_cut(share.foreign, rows)),
            )
            total.backward()
            extras[0] += total.detach()
            extras[1:4] += parts
            if latents is not None:
                self._latents.append((latents.detach(), _cut(present, rows)))
        extras[4] = float(stop)
        stepper.rest(phase)
        extras = world.reduce_gradients(stepper.moving(phase), extras)
        if self.config.ebr is not None:
            stepper.loss_md = extras[2].clone()
        parts = torch.where(stepper.computed(phase).to(extras.device), extras[1:4], float("nan"))
        return Outcome(extras[0], parts, bool(extras[4] > 0))

    def finish(self, phase: Phase) -> bool:
        """Take the step; then the extra ones of psi. True where the gradient could not be used."""
        if self.stepper.take(phase):
            return True
        if "discriminator" in self.stepper.names(phase):
            self._extra_discriminator_steps()
        return False

    def _share(self, rows: int, present: Tensor | None) -> Share:
        stepper, model, device = self.stepper, self.stepper.model, self.stepper.reversal.device
        share = Share(rows=rows, strength=stepper.strength(present))
        if self.config.ebr is None:
            return share
        m = len(model.columns)
        here = torch.ones(rows, m, dtype=torch.bool, device=device) if present is None else model.head_present(present)
        pairs = here.sum()
        self._pairs = int(pairs)
        # Substitution leaves a present slot to its own latent, so rows of L_rec and of L_md are the same ones.
        share = replace(share, counts=pairs.float(), aligned=(here & (here.sum(1, keepdim=True) > 1)).sum().float())
        if self.config.ebr.cross_recovery > 0:
            foreign = foreign_source(None if present is None else here, rows, m, stepper.random)
            counts = torch.stack([pairs, (here & (foreign >= 0)).sum()]).float()
            share = replace(share, foreign=foreign, foreign_counts=counts)
        return share

    def _norms(
        self,
        share: Share,
        labels: Tensor,
        load: Callable[[slice], Sequence[Tensor]],
        present: Tensor | None,
        source: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Norms of ∂L_sem and ∂L_md of all rows at the encoders."""
        encoders = self.stepper.groups["encoders"]
        flat = torch.zeros(2, sum(p.numel() for p in encoders), device=labels.device)
        for rows in _pieces(self.world.rows(len(labels)), self.config.accumulate):
            found = self.stepper.player_gradients(
                load(rows), _cut(present, rows), _cut(source, rows), labels[rows], share
            )
            for line, gradients in zip(flat, found, strict=True):
                parts = [torch.zeros_like(p) if g is None else g for p, g in zip(encoders, gradients, strict=True)]
                line += torch.cat([part.reshape(-1) for part in parts])
        task, game = self.world.sum(flat).norm(dim=1)
        return task, game

    def _extra_discriminator_steps(self) -> None:
        """As :meth:`Stepper.update` takes them, with the mean over the latents of all rows."""
        stepper, head = self.stepper, self.stepper.model.head
        if self.config.ebr is None or head is None or self.config.ebr.psi_steps == 1 or not self._pairs:
            return
        psi = stepper.groups["discriminator"]
        for _ in range(self.config.ebr.psi_steps - 1):
            stepper.optimizer.zero_grad(set_to_none=True)
            for latents, present in self._latents:
                x, y = stepper.labelled(latents, present)
                (F.cross_entropy(head.discriminator(x), y, reduction="sum") / self._pairs).backward()
            self.world.reduce_gradients(psi, torch.zeros(1, device=stepper.reversal.device))
            if not stepper.limit(psi):
                stepper.optimizer.step()


def _cut(t: Tensor | None, rows: slice) -> Tensor | None:
    return None if t is None else t[rows]


def _pieces(rows: slice, count: int) -> list[slice]:
    """``rows`` in at most ``count`` pieces, none empty."""
    n = rows.stop - rows.start
    edges = [rows.start + n * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(edges) if b > a]
