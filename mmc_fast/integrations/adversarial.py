"""The adversarial term in one forward: how well ψ tells modalities apart, and the gradients on both sides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmc_fast.nn import EBRHead

from .losses import Record, counts, psi_logits


def adversarial_figures(
    records: Sequence[Record], head: EBRHead, sites: Sequence[nn.Module], loss: Tensor
) -> dict[str, float]:
    """Figures of :meth:`mmc_fast.integrations.EBRHandle.adversarial` for the discrimination loss ``loss`` of ``records``."""
    entropy = _presence_entropy(records, len(head.dims))
    figures = {"loss_md": float(loss.detach())}
    figures["loss_md_over_entropy"] = figures["loss_md"] / entropy if entropy > 0 else float("nan")
    figures["psi_accuracy"] = _psi_accuracy(records, head.discriminator)
    if not loss.requires_grad:
        return figures
    psi = [p for p in head.discriminator.parameters() if p.requires_grad]
    encoders = [p for module in (head.encoders, *sites) for p in module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, psi + encoders, retain_graph=True, allow_unused=True)
    figures["grad_norm_psi"] = _norm(gradients[: len(psi)])
    figures["grad_norm_encoders"] = _norm(gradients[len(psi) :])
    return figures


def _presence_entropy(records: Sequence[Record], m: int) -> float:
    """H(pi) in nats of the modality frequencies among present (sample, modality) pairs."""
    n = torch.zeros(m, dtype=torch.float64)
    for record in records:
        n[record.modality] += int(counts(record))
    return float(torch.special.entr(n / n.sum().clamp(min=1)).sum())


@torch.no_grad()
def _psi_accuracy(records: Sequence[Record], psi: nn.Module) -> float:
    """Share of rows that psi assigns to their modality, every present (sample, modality) weighing the same."""
    hits = samples = 0.0
    for record in records:
        logits = psi_logits(record.latents, psi)
        right = (logits.argmax(-1) == record.modality).unsqueeze(-1).flatten(1).cpu()
        here = torch.ones_like(right) if record.present is None else record.present.unsqueeze(-1).flatten(1).cpu()
        rows = here.sum(1)
        hits += float(((right & here).sum(1) / rows.clamp(min=1)).sum())
        samples += float((rows > 0).sum())
    return hits / samples if samples else float("nan")


def _norm(gradients: Sequence[Tensor | None]) -> float:
    norms = [
        torch.linalg.vector_norm(g if g.dtype == torch.float64 else g.float()).cpu().double()
        for g in gradients
        if g is not None
    ]
    return float(torch.stack(norms).norm()) if norms else 0.0
