"""What averaging models gives: a model for every present subset (how much any handling can win), and five of a kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmc_fast._util.seeds import derive_seed

from .base import Fitted, Method, Task, prior, with_val_score
from .standard import LEARNING_RATES, STANDARD, fit_standard


def _mean(members: Sequence[Fitted]) -> Callable[[Sequence[Tensor], Tensor], Tensor]:
    return lambda features, present: torch.stack([m.answer(features, present) for m in members]).mean(0)


def fit_ensemble(task: Task) -> Fitted:
    """``options["members"]`` models of :func:`fit_standard` with seeds of their own; mean of their probabilities."""
    seeds = [derive_seed(task.seed, "member", n) % 2**31 for n in range(task.options["members"])]
    members = [fit_standard(replace(task, seed=seed)) for seed in seeds]
    fitted = Fitted(_mean(members), prior(task.dataset), None, {"members": [m.record for m in members]})
    return with_val_score(fitted, task.dataset)


def fit_subset_oracle(task: Task) -> Fitted:
    """For each set of present modalities a model that was trained on these alone, when a row asks for it first.

    With "members" above 1 an ensemble for each set. A model depends on train and validation rows, settings and seed only, so
    it does not matter which rows ask. Up to 2^m - 1 trainings.
    """
    dataset = task.dataset
    models: dict[tuple[bool, ...], Fitted] = {}

    def of(pattern: tuple[bool, ...]) -> Fitted:
        if pattern not in models:
            names = [name for name, there in zip(dataset.modalities, pattern, strict=True) if there]
            seed = derive_seed(task.seed, "subset", *names) % 2**31
            models[pattern] = fit_ensemble(replace(task, dataset=dataset.keep(names), seed=seed, progress=None))
        return models[pattern]

    def answer(features: Sequence[Tensor], present: Tensor) -> Tensor:
        result = dataset.task.answers(torch.zeros(len(present), dataset.task.outputs))
        for row in present.unique(dim=0):
            rows = (present == row).all(1)
            chosen = [x[rows] for x, there in zip(features, row.tolist(), strict=True) if there]
            every = torch.ones(int(rows.sum()), len(chosen), dtype=torch.bool)
            result[rows] = of(tuple(row.tolist())).answer(chosen, every)
        return result

    return with_val_score(Fitted(answer, prior(dataset), None, {}), dataset)


def _of(name: str) -> Method:
    method = next(m for m in STANDARD if m.name == name)
    fixed = {**method.fixed, "options": {"members": 5}}
    return replace(method, name=f"{name}-x5", title=f"five of: {method.title}", fitter=fit_ensemble, fixed=fixed)


ENSEMBLES = (_of("consistency"), _of("transformer"), _of("ebr-robust"))
ORACLES = tuple(
    Method(
        f"subset-oracle{name}",
        title,
        "retrained on each set of present modalities: how much any handling can win",
        fit_subset_oracle,
        LEARNING_RATES,
        {"selection": "complete", "options": {"members": members}},  # a model that meets no masked row
    )
    for name, title, members in (("", "subset oracle", 1), ("-x5", "subset oracle, five each", 5))
)
