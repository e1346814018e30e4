"""Fusion heads and features whose diagnosis is known: planted shared neurons, a planted ignored modality."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmc_fast._util.numbers import check_seed
from mmc_fast.errors import InputError

__all__ = ["PlantedHead", "planted_head"]


@dataclass(frozen=True)
class PlantedHead:
    """An adapter for :func:`mmc_fast.diagnose` with a known answer.

    ``head``: Linear, ReLU, Linear. ``features``: name -> ``[N, d]``. ``classes [N]``. ``sharing``: the share of neurons that read
    the predictive features of one modality and the noisy ones of another with equal strength; the mean modality entropy
    of neurons is this number times ``ln 2 / ln m``, up to the planted jitter. ``shared``: bool ``[h]``. ``predictive``: how many
    of each modality's first directions are predictive. ``dictionary``: ``[m d, m d]`` the unit directions of all features.
    """

    head: nn.Sequential
    features: dict[str, Tensor]
    classes: Tensor
    sharing: float
    shared: Tensor
    predictive: int
    dictionary: Tensor

    def encode(self, batch: Tensor) -> dict[str, Tensor]:
        """Features of the given rows."""
        return {name: x[batch] for name, x in self.features.items()}

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        """Logits."""
        return self.head(torch.cat(list(features.values()), 1))

    def labels(self, batch: Tensor) -> Tensor:
        """Labels of the given rows."""
        return self.classes[batch]

    def batches(self, size: int = 512) -> list[Tensor]:
        """Row numbers in batches: the loader."""
        return list(torch.arange(len(self.classes)).split(size))


def planted_head(
    seed: int = 0,
    *,
    sharing: float = 0.5,
    ignored: int | None = None,
    modalities: int = 2,
    width: int = 8,
    predictive: int = 4,
    neurons: int = 80,
    num_classes: int = 3,
    num_samples: int = 2000,
    jitter: float = 0.0,
    rotate: bool = False,
    scales: tuple[float, ...] | None = None,
) -> PlantedHead:
    """Draw features, plant the neurons, solve for the output layer.

    Each modality has ``width`` independent features of variance one, the first ``predictive`` of which carry the class. A neuron
    reads one predictive feature of its home modality with weight ±1; a shared one also reads one noisy feature of the next
    modality with weight ±1. The output layer is the ridge solution for one-hot labels.

    Args:
        seed: of everything. sharing: share of neurons that are shared, rounded to whole neurons.
        ignored: index of a modality that no neuron reads. modalities, width, predictive, neurons, num_classes, num_samples:
            sizes. jitter: s.d. of noise on every weight of the first layer, relative to the planted ones.
        rotate: turn each modality's features by a random rotation, undone by the weights.
        scales: multiply modality i's features by ``scales[i]``, undone by the weights.

    Raises InputError for sizes that cannot hold what is planted.
    """
    m = modalities
    if m < 2 or not 0 < predictive < width or not 0 <= sharing <= 1 or neurons < m:
        raise InputError(
            f"planted_head: {m} modalities, {predictive} of {width} features predictive, sharing {sharing}, {neurons} neurons; "
            "need two modalities, 0 < predictive < width, sharing in [0, 1], and a neuron for each modality"
        )
    random = torch.Generator().manual_seed(check_seed(seed))
    labels = torch.randint(num_classes, (num_samples,), generator=random)
    draws = _features(labels, num_classes, m, width, predictive, random)
    weight = torch.zeros(neurons, m * width, dtype=torch.float64)
    shared = torch.zeros(neurons, dtype=torch.bool)
    shared[torch.randperm(neurons, generator=random)[: round(sharing * neurons)]] = True
    signs = torch.randint(2, (neurons, 2), generator=random) * 2.0 - 1
    homes = [i for i in range(m) if i != ignored]
    for k in range(neurons):
        home = homes[k % len(homes)]
        weight[k, home * width + int(torch.randint(predictive, (1,), generator=random))] = signs[k, 0]
        if shared[k] and len(homes) > 1:
            other = homes[(homes.index(home) + 1) % len(homes)]
            noisy = int(torch.randint(predictive, width, (1,), generator=random))
            weight[k, other * width + noisy] = signs[k, 1]
    noise = jitter * torch.randn(weight.shape, generator=random, dtype=torch.float64)
    if ignored is not None:
        noise[:, ignored * width : (ignored + 1) * width] = 0
    weight += noise
    bias = 0.3 * torch.randn(neurons, generator=random, dtype=torch.float64)
    x = torch.cat(draws, 1)
    hidden = torch.relu(x @ weight.t() + bias)
    target = nn.functional.one_hot(labels, num_classes).double()
    centred = hidden - hidden.mean(0)
    gram = centred.t() @ centred + 1e-1 * num_samples * torch.eye(neurons, dtype=torch.float64)
    out = 4 * torch.linalg.solve(gram, centred.t() @ (target - target.mean(0))).t()
    changes = list(_changes(m, width, rotate, scales, random))
    change = torch.block_diag(*changes)
    first, last = nn.Linear(m * width, neurons), nn.Linear(neurons, num_classes)
    head = nn.Sequential(first, nn.ReLU(), last).requires_grad_(False)
    first.weight.copy_(weight @ torch.linalg.inv(change))
    first.bias.copy_(bias)
    last.weight.copy_(out)
    last.bias.copy_(target.mean(0) - out @ hidden.mean(0))
    features = {chr(ord("a") + i): (z @ c.t()).float() for i, (z, c) in enumerate(zip(draws, changes, strict=True))}
    # A neuron reads feature j through the row j of the inverse.
    directions = torch.linalg.inv(change).t()
    return PlantedHead(
        head.eval(),
        features,
        labels,
        int(shared.sum()) / neurons,
        shared,
        predictive,
        directions / directions.norm(dim=0),
    )


def _features(
    labels: Tensor, num_classes: int, m: int, width: int, predictive: int, random: torch.Generator
) -> list[Tensor]:
    """float64 ``[N, width]`` per modality, columns of mean zero and variance one."""
    found = []
    for _ in range(m):
        x = torch.randn(len(labels), width, generator=random, dtype=torch.float64)
        x[:, :predictive] += 1.2 * torch.randn(num_classes, predictive, generator=random, dtype=torch.float64)[labels]
        found.append((x - x.mean(0)) / x.std(0))
    return found


def _changes(
    m: int, width: int, rotate: bool, scales: tuple[float, ...] | None, random: torch.Generator
) -> Iterator[Tensor]:
    """The linear map of each modality."""
    for i in range(m):
        change = torch.eye(width, dtype=torch.float64)
        if rotate:
            change = torch.linalg.qr(torch.randn(width, width, generator=random, dtype=torch.float64))[0]
        yield change * (scales[i] if scales is not None else 1.0)
