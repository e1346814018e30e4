"""Product of experts: unimodal models, and where asked for the fused one, combined by weights fitted on validation rows.

Source: Hinton, "Products of experts", ICANN 1999; weights as in the log-linear pool (Genest and Zidek, 1986).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc_fast._util.seeds import generator

from ..data import mcar
from ..training.interrupt import Stage
from ..training.parts import fingerprint
from ..training.progress import Silent
from ..training.unimodal import train_unimodal
from .base import Fitted, Method, Task, check_classes, prior
from .standard import fit_standard

__all__ = ["PRODUCT", "ExpertProduct", "fit_product"]

_DRAWS = 4  # masks of every rate that the weights are fitted on
_STEPS = 200  # of L-BFGS


class ExpertProduct(nn.Module):
    """``log p(y | S) = log π_y + Σ_{i in S} w_i s_|S| (log p_i(y) - log π_y) + f_|S| (log p(y) - log π_y) - log Z``.

    ``p_i``: expert of modality i, ``p``: the fused model (left out where there is none), π: class shares. All weights are
    positive; m experts with w = s = 1 and no fused model are naive Bayes.
    """

    log_prior: Tensor

    def __init__(self, modalities: int, prior: Tensor, fused: bool) -> None:
        super().__init__()
        self.register_buffer("log_prior", prior.double().clamp(min=1e-12).log())
        self.weight = nn.Parameter(torch.zeros(modalities, dtype=torch.float64))  # log w
        self.size = nn.Parameter(-torch.arange(1.0, modalities + 1).double().log())  # log s: the mean, to begin with
        self.fused = nn.Parameter(torch.full((modalities,), 0.0 if fused else -torch.inf, dtype=torch.float64))  # log f
        self.start = {n: p.detach().clone() for n, p in self.named_parameters()}

    def forward(self, experts: Tensor, fused: Tensor | None, present: Tensor) -> Tensor:
        """Log-probabilities ``[N, C]`` from those of the experts ``[m, N, C]``, which are read where ``present [N, m]``."""
        prior = self.log_prior
        size = present.sum(1) - 1
        weight = present * self.weight.exp() * self.size[size].exp()[:, None]  # [N, m]
        evidence = torch.where(present.t()[:, :, None], experts - prior, 0.0)
        total = prior + torch.einsum("nm,mnc->nc", weight, evidence)
        if fused is not None:
            total = total + self.fused[size].exp()[:, None] * (fused - prior)
        return total.log_softmax(-1)

    def penalty(self) -> Tensor:
        """Squared distance of the logarithms of the weights from where they began."""
        return torch.stack([
            (p - self.start[n]).square().sum() for n, p in self.named_parameters() if torch.isfinite(p).all()
        ]).sum()  # fmt: skip

    def fit(self, experts: Tensor, fused: Tensor | None, present: Tensor, labels: Tensor, penalty: float) -> None:
        """Minimise mean cross-entropy + ``penalty`` x :meth:`penalty`."""
        if fused is None:
            self.fused.requires_grad_(False)
        moving = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.LBFGS(moving, max_iter=_STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.nll_loss(self(experts, fused, present), labels) + penalty * self.penalty()
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[arg-type]


def fit_product(task: Task) -> Fitted:
    """Train unimodal models (and with the option "fused" the model of the settings), then fit the weights."""
    dataset, config = task.dataset, task.config
    check_classes(dataset)
    progress = task.progress or Silent()
    progress.on_start(config.unimodal_epochs, "unimodal")
    stage = Stage("unimodal", progress.on_epoch)
    models = train_unimodal(dataset, config, seed=task.seed, fingerprint=fingerprint(dataset), stage=stage)
    whole = fit_standard(task) if task.options.get("fused", False) else None
    product = ExpertProduct(len(dataset.modalities), prior(dataset), whole is not None)

    def votes(features: Sequence[Tensor], present: Tensor) -> tuple[Tensor, Tensor | None]:
        experts = torch.zeros(len(features), len(present), dataset.num_classes, dtype=torch.float64)
        for i, name in enumerate(dataset.modalities):
            here = present[:, i]
            if bool(here.any()):
                experts[i, here] = models.predict(name, features[i][here]).double().clamp(min=1e-12).log()
        fused = None if whole is None else whole.answer(features, present).double().clamp(min=1e-12).log()
        return experts, fused

    @torch.no_grad()
    def answer(features: Sequence[Tensor], present: Tensor) -> Tensor:
        return product(*votes(features, present), present).exp().float()

    held = dataset.part("validation")
    masks = [held.present] * _DRAWS
    for rate in config.rates:
        draw = generator(task.seed, "product", repr(float(rate)))
        masks += [mcar(held.present, rate, draw).present for _ in range(_DRAWS)]
    rows = [present.any(1) for present in masks]
    found = [votes([x[r] for x in held.features], p[r]) for p, r in zip(masks, rows, strict=True)]
    fused = None if whole is None else torch.cat([f for _, f in found if f is not None])
    labels = torch.cat([held.labels[r] for r in rows])
    present = torch.cat([p[r] for p, r in zip(masks, rows, strict=True)])
    product.fit(torch.cat([e for e, _ in found], 1), fused, present, labels, task.options["penalty"])
    fitted = Fitted(answer, prior(dataset), None, {"unimodal": models.scores})
    fitted.record |= {name: p.detach().exp().tolist() for name, p in product.named_parameters()}
    fitted.record["val_score"] = dataset.task.score(fitted.predict(held.features, held.present), held.labels)
    return fitted


PRODUCT = Method(
    "product",
    "product of experts",
    "independent unimodal models, weights fitted on masked validation rows",
    fit_product,
    tuple({"lr": lr, "options": {"penalty": p}} for lr in (1e-3, 3e-4) for p in (0.001, 0.1)),
    {"unimodal_share": 1.0, "options": {"fused": False}},
)
