"""One optimisation step: which losses are taken, which player moves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from mmc_fast.nn.alignment import contrastive_alignment, distance_alignment
from mmc_fast.nn.substitution import foreign_source

from .config import TrainConfig
from .model import MultimodalModel
from .substitution import source_for

__all__ = ["Phase", "Share", "Stepper", "phase_of"]

Phase = Literal["joint", "semantic", "adversarial"]

_MOVING: dict[str, tuple[str, ...]] = {
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
class Share:
    """What the losses of some rows of a step need to know about all of its rows: the denominators, and λ.

    ``counts``: present (row, head) pairs. ``aligned``: those of rows with two or more. ``foreign``: the source of cross
    recovery for these rows, with ``foreign_counts`` = (pairs, pairs that have a foreign source).
    """

    rows: int
    strength: Tensor
    counts: Tensor | None = None
    aligned: Tensor | None = None
    foreign: Tensor | None = None
    foreign_counts: Tensor | None = None


class Stepper:
    """Computes losses and moves the players of one model.

    ``reversal`` is a 0-d tensor, so that a schedule can change it without anything being rebuilt.
    """

    def __init__(self, model: MultimodalModel, optimizer: optim.Optimizer, config: TrainConfig) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config
        self.groups = model.groups()
        device = model.class_prior.device
        self.reversal = torch.zeros((), device=device)
        self.loss_md = torch.zeros((), device=device)  # of the step before, for the bounded game
        self.pull = self.reversal  # strength of the last step of L_md alone
        self.random = torch.Generator(device=device)  # of the foreign sources
        self.clipped = 0  # gradients that clip_grad_norm has scaled down

    def losses(
        self,
        phase: Phase,
        features: Sequence[Tensor],
        present: Tensor | None,
        labels: Tensor,
        source: Tensor | None = None,
        natural: Tensor | None = None,
        share: Share | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Total to descend, the parts ``[3]`` = (L_sem, L_md, L_rec) without graph, and the latents.

        A part that the phase does not compute is NaN. ``natural`` is the presence before anything was hidden; with
        consistency the step takes both. With a ``share`` these are some rows of a larger step: losses are sums divided
        by its counts, parts that are not computed 0, so that those of all rows add up.
        """
        none = labels.new_full((), float("nan") if share is None else 0.0, dtype=torch.float32)
        if share is None:
            strength = self._strength(features, present, source, labels if phase == "joint" else None)
        else:
            strength = share.strength
        counts = None if share is None else share.counts
        if phase == "adversarial":
            encoded = self.model.encode(features, present)
            out = self.model.apply_head(encoded, present, source, strength, counts)
            if share is None:
                self.pull, self.loss_md = strength, out.discrimination_loss.detach()
            total, rec = out.discrimination_loss, out.reconstruction_loss
            return total, torch.stack([none, total.detach(), rec.detach()]), out.latents
        result = self.model(features, present, source, strength, counts)
        semantic = _cross_entropy(result.logits, labels, share)
        extra = self._consistency(result.logits, features, natural, labels, share) if self.config.consistency else None
        if extra is not None:
            semantic = (semantic + extra[0]) / 2
        own = self._own_loss(result.own, present, labels, share)
        if result.ebr is None:
            total = semantic if extra is None else semantic + extra[1]
            return total + own, torch.stack([semantic.detach(), none, none]), None
        md, rec = result.ebr.discrimination_loss, result.ebr.reconstruction_loss
        if share is None:
            self.loss_md = md.detach()
        total = own + (semantic if extra is None else semantic + extra[1])
        total = total + self._alignment(result.ebr.latents, features, present, share)
        if phase == "joint":
            total = total + md
        if self.config.ebr is not None and self.config.ebr.reconstruction > 0:
            total = total + self.config.ebr.reconstruction * rec
        return total, torch.stack([semantic.detach(), md.detach(), rec.detach()]), result.ebr.latents

    def computed(self, phase: Phase) -> Tensor:
        """bool ``[3]``: the parts that :meth:`losses` computes in a phase."""
        ebr = self.config.ebr is not None
        return torch.tensor([phase != "adversarial", ebr, ebr])

    def _strength(
        self, features: Sequence[Tensor], present: Tensor | None, source: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        """λ of this step: of the schedule, in units of the task's gradient ("balanced"), cut in the bounded game."""
        if labels is None or not self.balanced:
            return self.strength(present)
        task, game = (
            torch.stack([g.square().sum() for g in found if g is not None]).sum().sqrt()
            for found in self.player_gradients(features, present, source, labels)
        )
        return self.strength(present, task, game)

    @property
    def balanced(self) -> bool:
        """Whether λ of a joint step is in units of the task's gradient."""
        ebr = self.config.ebr
        return ebr is not None and ebr.reversal != 0 and self.config.reversal_schedule == "balanced"

    def strength(self, present: Tensor | None, task: Tensor | None = None, game: Tensor | None = None) -> Tensor:
        """λ of a step on rows of this presence; ``task`` and ``game`` are the norms that a balanced one is scaled by."""
        strength = self.reversal
        if self.config.ebr is None or self.config.ebr.reversal == 0:
            return strength
        if task is not None and game is not None:
            strength = strength * (task / game.clamp(min=1e-12))
        return self._cut(strength, present) if self.config.ebr.bounded else strength

    def _cut(self, strength: Tensor, present: Tensor | None) -> Tensor:
        """Zero where the discriminator of the step before knew nothing: L_md at or above H(π)."""
        m = len(self.model.columns)
        counts = torch.ones(m, device=strength.device) if present is None else self.model.head_present(present).sum(0)
        share = counts / counts.sum().clamp(min=1)
        return torch.where(self.loss_md < -torch.xlogy(share, share).sum(), strength, 0)

    def player_gradients(
        self,
        features: Sequence[Tensor],
        present: Tensor | None,
        source: Tensor | None,
        labels: Tensor,
        share: Share | None = None,
    ) -> tuple[Sequence[Tensor | None], ...]:
        """∂L_sem and ∂L_md at the encoders; takes a pass of its own and keeps no state."""
        result = self.model(features, present, source, 1.0, None if share is None else share.counts)
        if result.ebr is None:
            raise RuntimeError("this model has no EBR heads, so there is no game to balance")
        return tuple(
            torch.autograd.grad(loss, self.groups["encoders"], retain_graph=True, allow_unused=True)
            for loss in (_cross_entropy(result.logits, labels, share), result.ebr.discrimination_loss)
        )

    def _consistency(
        self,
        masked: Tensor,
        features: Sequence[Tensor],
        natural: Tensor | None,
        labels: Tensor,
        share: Share | None = None,
    ) -> tuple[Tensor, Tensor]:
        """L_sem on complete data, and the weighted divergence of the masked prediction from it."""
        source = None if natural is None or self.model.head is None else source_for(self.model, natural)
        complete = self.model(features, natural, source).logits
        target = complete.detach().log_softmax(-1)
        found = masked.log_softmax(-1)
        if share is None:
            divergence = F.kl_div(found, target, reduction="batchmean", log_target=True)
        else:
            divergence = F.kl_div(found, target, reduction="sum", log_target=True) / share.rows
        return _cross_entropy(complete, labels, share), self.config.consistency * divergence

    def _own_loss(
        self, logits: Tensor | None, present: Tensor | None, labels: Tensor, share: Share | None
    ) -> Tensor | float:
        """β times the loss of the emphasised modality alone: summed over rows that have it, divided by all of the step."""
        if logits is None or self.model.emphasised is None:
            return 0.0
        losses = F.cross_entropy(logits, labels, reduction="none")
        if present is not None:
            losses = torch.where(present[:, self.model.emphasised], losses, 0.0)
        return self.config.emphasis * losses.sum() / (len(labels) if share is None else share.rows)

    def _alignment(
        self, latents: Tensor, features: Sequence[Tensor], present: Tensor | None, share: Share | None
    ) -> Tensor | float:
        ebr = self.config.ebr
        if ebr is None:
            return 0.0
        here = None if present is None else self.model.head_present(present)
        total: Tensor | float = 0.0
        if ebr.alignment == "contrastive":
            total = ebr.alignment_weight * contrastive_alignment(latents, here)
        elif ebr.alignment == "distance":
            total = ebr.alignment_weight * distance_alignment(latents, here, None if share is None else share.aligned)
        if ebr.cross_recovery > 0:
            foreign = None if share is None else share.foreign
            counts = None if share is None else share.foreign_counts
            if share is None:
                foreign = foreign_source(here, latents.shape[1], latents.shape[0], self.random)
            encoded = self.model.encode(features, present)
            out = self.model.apply_head(encoded, present, foreign, normalizer=counts)
            total = total + ebr.cross_recovery * out.reconstruction_loss
        return total

    def update(self, phase: Phase, total: Tensor, latents: Tensor | None, present: Tensor | None) -> bool:
        """Backward and one step of the players that move in ``phase``; then the extra steps of psi.

        True where the gradient could not be used and nothing has moved; only looked at where the configuration clips
        gradients or skips what is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.rest(phase)
        if self.take(phase):
            return True
        if latents is not None and "discriminator" in self.names(phase):
            self._extra_discriminator_steps(latents.detach(), present)
        return False

    def names(self, phase: Phase) -> tuple[str, ...]:
        """Groups of parameters that move in a phase."""
        # In a phase of L_md alone, encoders that receive no reversed gradient must not coast on their moments.
        still = phase == "adversarial" and float(self.pull) == 0.0
        return tuple(name for name in _MOVING[phase] if not (still and name == "encoders"))

    def moving(self, phase: Phase) -> list[nn.Parameter]:
        """Parameters that move in a phase."""
        moving = self.names(phase)
        return [p for name, parameters in self.groups.items() if name in moving for p in parameters]

    def rest(self, phase: Phase) -> None:
        """Take the gradients of the other players away."""
        moving = self.names(phase)
        for name, parameters in self.groups.items():
            if name not in moving:
                _freeze(parameters)

    def take(self, phase: Phase) -> bool:
        """The step of the optimiser, with the norm of the gradient limited; True where it was not taken."""
        if self.limit(self.moving(phase)):
            return True
        self.optimizer.step()
        return False

    def limit(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Scale the gradients down to ``clip_grad_norm`` together; True where their norm is NaN or infinite.

        The norm costs a pass over the gradients and is not looked at where nothing depends on it.
        """
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

    def labelled(self, latents: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        """Present latents ``[R, k]`` of ``[h, B, k]`` and the modality ``[R]`` of each."""
        heads, batch, _ = latents.shape
        truth = torch.arange(heads, device=latents.device)[:, None].expand(heads, batch)
        if present is None:
            return latents.flatten(0, 1), truth.flatten()
        here = self.model.head_present(present).t()
        return latents[here], truth[here]

    def _extra_discriminator_steps(self, latents: Tensor, present: Tensor | None) -> None:
        """``psi_steps - 1`` more steps of psi alone, on the same detached latents ``[h, B, k]``."""
        if self.config.ebr is None or self.config.ebr.psi_steps == 1 or self.model.head is None:
            return
        x, y = self.labelled(latents, present)
        if len(y) == 0:
            return
        for _ in range(self.config.ebr.psi_steps - 1):
            self.optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(self.model.head.discriminator(x), y).backward()
            if not self.limit(self.groups["discriminator"]):
                self.optimizer.step()


def _cross_entropy(logits: Tensor, labels: Tensor, share: Share | None) -> Tensor:
    """Mean over the rows of the step."""
    if share is None:
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, reduction="sum") / share.rows


def _freeze(parameters: Sequence[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = None
