"""Product of experts: unimodal models, and where asked for the fused one, combined by weights fitted on validation rows.

Source: Hinton, "Products of experts", ICANN 1999; weights as in the log-linear pool (Genest and Zidek, 1986).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..tasks import Classification, Task
from .config import TrainConfig
from .unimodal import UnimodalModel, UnimodalModels

_STEPS = 200  # of L-BFGS


class ExpertProduct(nn.Module):
    """``log p(y | S) = log π_y + Σ_{i in S} w_i s_|S| (log p_i(y) - log π_y) + f_|S| (log p(y) - log π_y) - log Z``.

    ``p_i``: expert of modality i, ``p``: the fused model (left out where there is none), π: class shares. All weights are
    positive; m experts with w = s = 1 and no fused model are naive Bayes. Of other tasks than classification the same with the
    outputs in place of log p: logits of labels and hazards, and standardised targets (normal densities of one variance).
    """

    log_prior: Tensor

    def __init__(self, modalities: int, prior: Tensor, fused: bool, task: Task | None = None) -> None:
        super().__init__()
        self.task = task or Classification.of(len(prior))
        self.register_buffer("log_prior", prior.double().clamp(min=1e-12).log())
        self.weight = nn.Parameter(torch.zeros(modalities, dtype=torch.float64))  # log w
        self.size = nn.Parameter(-torch.arange(1.0, modalities + 1).double().log())  # log s: the mean, to begin with
        self.fused = nn.Parameter(torch.full((modalities,), 0.0 if fused else -torch.inf, dtype=torch.float64))  # log f

    def forward(self, experts: Tensor, fused: Tensor | None, present: Tensor) -> Tensor:
        """Log-probabilities ``[N, C]`` from those of the experts ``[m, N, C]``, which are read where ``present [N, m]``."""
        prior = self.log_prior
        size = present.sum(1) - 1
        weight = present * self.weight.exp() * self.size[size].exp()[:, None]  # [N, m]
        evidence = torch.where(present.t()[:, :, None], experts - prior, 0.0)
        total = prior + torch.einsum("nm,mnc->nc", weight, evidence)
        if fused is not None:
            total = total + self.fused[size].exp()[:, None] * (fused - prior)
        return self.task.pooled(total)

    def penalty(self) -> Tensor:
        """Squared distance of the logarithms of the weights from where they began."""
        size = self.size + torch.arange(1.0, len(self.size) + 1).to(self.size).log()
        fused = self.fused.square().sum() if self.fused.requires_grad else 0.0
        return self.weight.square().sum() + size.square().sum() + fused

    def fit(self, experts: Tensor, fused: Tensor | None, present: Tensor, labels: Tensor, penalty: float) -> None:
        """Minimise the mean loss of the task + ``penalty`` x :meth:`penalty`."""
        if fused is None:
            self.fused.requires_grad_(False)
        moving = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.LBFGS(moving, max_iter=_STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = self.task.loss(self(experts, fused, present), labels, "mean") + penalty * self.penalty()
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[arg-type]


class Experts(nn.Module):
    """The unimodal models of a run beside its fused model; ``fitted`` once the weights are."""

    fitted: Tensor

    def __init__(self, widths: Sequence[int], num_classes: int, config: TrainConfig, task: Task) -> None:
        super().__init__()
        self.models = nn.ModuleList(UnimodalModel(d, num_classes, config) for d in widths).requires_grad_(False)
        self.product = ExpertProduct(len(widths), torch.full((num_classes,), 1 / num_classes), True, task)
        self.register_buffer("fitted", torch.tensor(False))

    def take(self, unimodal: UnimodalModels) -> None:
        """The weights of trained unimodal models."""
        for mine, theirs in zip(self.models, unimodal.models.values(), strict=True):
            mine.load_state_dict(theirs.state_dict())

    def votes(self, features: Sequence[Tensor], present: Tensor) -> Tensor:
        """Log-probabilities ``[m, B, C]`` of the experts in float64; those of absent modalities mean nothing."""
        rows = [torch.where(present[:, i, None], x, 0.0) for i, x in enumerate(features)]
        pooled = self.product.task.pooled
        return torch.stack([pooled(model(x).double()) for model, x in zip(self.models, rows, strict=True)])

    def forward(self, features: Sequence[Tensor], present: Tensor | None, logits: Tensor) -> Tensor:
        """Log-probabilities of the product with the fused model's ``logits [B, C]``."""
        if present is None:
            present = torch.ones(len(logits), len(features), dtype=torch.bool, device=logits.device)
        found = self.product(self.votes(features, present), self.product.task.pooled(logits.double()), present)
        return found.to(logits.dtype)
