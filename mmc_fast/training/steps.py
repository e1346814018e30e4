"""One optimisation step: which losses are taken, which player moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from ..nn.alignment import contrastive_alignment, distance_alignment
from ..nn.substitution import foreign_source
from .config import TrainConfig
from .model import MultimodalModel
from .substitution import source_for

__all__ = ["Phase", "Stepper", "phase_of"]

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

    def losses(
        self,
        phase: Phase,
        features: Sequence[Tensor],
        present: Tensor | None,
        labels: Tensor,
        source: Tensor | None = None,
        natural: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Total to descend, the parts ``[3]`` = (L_sem, L_md, L_rec) without graph, and the latents.

        A part that the phase does not compute is NaN. ``natural`` is the presence before anything was hidden; with
        consistency the step takes both.
        """
        nan = labels.new_full((), float("nan"), dtype=torch.float32)
        if phase == "adversarial":
            encoded = self.model.encode(features, present)
            self.pull = self._strength(features, present, source, None)
            out = self.model.apply_head(encoded, present, source, self.pull)
            self.loss_md = out.discrimination_loss.detach()
            total, rec = out.discrimination_loss, out.reconstruction_loss
            return total, torch.stack([nan, total.detach(), rec.detach()]), out.latents
        strength = self._strength(features, present, source, labels if phase == "joint" else None)
        result = self.model(features, present, source, strength)
        semantic = F.cross_entropy(result.logits, labels)
        extra = self._consistency(result.logits, features, natural, labels) if self.config.consistency else None
        if extra is not None:
            semantic = (semantic + extra[0]) / 2
        if result.ebr is None:
            total = semantic if extra is None else semantic + extra[1]
            return total, torch.stack([semantic.detach(), nan, nan]), None
        md, rec = result.ebr.discrimination_loss, result.ebr.reconstruction_loss
        self.loss_md = md.detach()
        total = semantic if extra is None else semantic + extra[1]
        total = total + self._alignment(result.ebr.latents, features, present)
        if phase == "joint":
            total = total + md
        if self.config.ebr is not None and self.config.ebr.reconstruction > 0:
            total = total + self.config.ebr.reconstruction * rec
        return total, torch.stack([semantic.detach(), md.detach(), rec.detach()]), result.ebr.latents

    def _strength(
        self, features: Sequence[Tensor], present: Tensor | None, source: Tensor | None, labels: Tensor | None
    ) -> Tensor:
        """λ of this step: of the schedule, in units of the task's gradient ("balanced"), cut in the bounded game."""
        strength = self.reversal
        if self.config.ebr is None or self.config.ebr.reversal == 0:
            return strength
        if self.config.reversal_schedule == "balanced" and labels is not None:
            strength = strength * self._gradient_ratio(features, present, source, labels)
        return self._cut(strength, present) if self.config.ebr.bounded else strength

    def _cut(self, strength: Tensor, present: Tensor | None) -> Tensor:
        """Zero where the discriminator of the step before knew nothing: L_md at or above H(π)."""
        m = len(self.model.columns)
        counts = torch.ones(m, device=strength.device) if present is None else self.model.head_present(present).sum(0)
        share = counts / counts.sum().clamp(min=1)
        return torch.where(self.loss_md < -torch.xlogy(share, share).sum(), strength, 0)

    def _gradient_ratio(
        self, features: Sequence[Tensor], present: Tensor | None, source: Tensor | None, labels: Tensor
    ) -> Tensor:
        """Norm of ∂L_sem over that of ∂L_md, both at the encoders; takes a pass of its own and keeps no state."""
        result = self.model(features, present, source, 1.0)
        if result.ebr is None:
            return torch.ones_like(self.reversal)
        of_losses = (
            torch.autograd.grad(loss, self.groups["encoders"], retain_graph=True, allow_unused=True)
            for loss in (F.cross_entropy(result.logits, labels), result.ebr.discrimination_loss)
        )
        task, game = (
            torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt() for gradients in of_losses
        )
        return task / game.clamp(min=1e-12)

    def _consistency(
        self, masked: Tensor, features: Sequence[Tensor], natural: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """L_sem on complete data, and the weighted divergence of the masked prediction from it."""
        source = None if natural is None or self.model.head is None else source_for(self.model, natural)
        complete = self.model(features, natural, source).logits
        target = complete.detach().log_softmax(-1)
        divergence = F.kl_div(masked.log_softmax(-1), target, reduction="batchmean", log_target=True)
        return F.cross_entropy(complete, labels), self.config.consistency * divergence

    def _alignment(self, latents: Tensor, features: Sequence[Tensor], present: Tensor | None) -> Tensor | float:
        ebr = self.config.ebr
        if ebr is None:
            return 0.0
        here = None if present is None else self.model.head_present(present)
        total: Tensor | float = 0.0
        if ebr.alignment != "none":
            measure = distance_alignment if ebr.alignment == "distance" else contrastive_alignment
            total = ebr.alignment_weight * measure(latents, here)
        if ebr.cross_recovery > 0:
            foreign = foreign_source(here, latents.shape[1], latents.shape[0], self.random)
            encoded = self.model.encode(features, present)
            total = total + ebr.cross_recovery * self.model.apply_head(encoded, present, foreign).reconstruction_loss
        return total

    def update(self, phase: Phase, total: Tensor, latents: Tensor | None, present: Tensor | None) -> None:
        """Backward and one step of the players that move in ``phase``; then the extra steps of psi."""
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        moving = _MOVING[phase]
        # In a phase of L_md alone, encoders that receive no reversed gradient must not coast on their moments.
        still = phase == "adversarial" and float(self.pull) == 0.0
        for name, parameters in self.groups.items():
            if name not in moving or (still and name == "encoders"):
                _freeze(parameters)
        self.optimizer.step()
        if latents is not None and "discriminator" in moving:
            self._extra_discriminator_steps(latents.detach(), present)

    def _extra_discriminator_steps(self, latents: Tensor, present: Tensor | None) -> None:
        """``psi_steps - 1`` more steps of psi alone, on the same detached latents ``[h, B, k]``."""
        if self.config.ebr is None or self.config.ebr.psi_steps == 1 or self.model.head is None:
            return
        heads, batch, _ = latents.shape
        truth = torch.arange(heads, device=latents.device)[:, None].expand(heads, batch)
        if present is None:
            x, y = latents.flatten(0, 1), truth.flatten()
        else:
            here = self.model.head_present(present).t()
            x, y = latents[here], truth[here]
        if len(y) == 0:
            return
        for _ in range(self.config.ebr.psi_steps - 1):
            self.optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(self.model.head.discriminator(x), y).backward()
            self.optimizer.step()


def _freeze(parameters: Sequence[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = None
