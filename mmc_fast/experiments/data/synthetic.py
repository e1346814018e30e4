"""Data with known signal and noise features, for tests, documentation and studies with a planted answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from mmc_fast._util.numbers import check_seed, integer
from mmc_fast.errors import InputError
from mmc_fast.experiments.data.dataset import MultimodalDataset
from mmc_fast.experiments.data.missing import mcar
from mmc_fast.experiments.data.raw import RawDataset, build
from mmc_fast.experiments.data.splits import stratified_split
from mmc_fast.experiments.tasks import Classification


@dataclass(frozen=True)
class SyntheticModality:
    """One modality: the first ``predictive`` of its ``dim`` columns carry the class, the others are noise.

    ``x = s * strength * prototype[c] + e``, with ``e`` standard normal, unit prototypes (orthogonal where
    they fit), ``c`` the label with chance
    ``reliability`` and else a class drawn at random, ``s = 1``; or, where ``folded``, ``s`` = +1 or -1 at random, so
    that every class has mean zero and no linear model can tell the classes apart.
    """

    dim: int = 12
    predictive: int = 4
    strength: float = 3.0
    reliability: float = 1.0
    folded: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.predictive <= self.dim or self.dim < 1:
            raise InputError(
                f"synthetic: {self.predictive} predictive of {self.dim} columns; need 0 <= predictive <= dim."
            )
        if not 0 <= self.reliability <= 1 or not 0 <= self.strength < float("inf"):
            raise InputError(
                f"synthetic: strength {self.strength} and reliability {self.reliability}; need a finite strength >= 0 "
                "and a reliability in [0, 1]."
            )


PLANTED_COLLAPSE: Mapping[str, SyntheticModality] = MappingProxyType(
    {
        "easy": SyntheticModality(dim=16, predictive=8, strength=5.0, reliability=0.9),
        "hard": SyntheticModality(dim=64, predictive=8, strength=4.0, reliability=0.95, folded=True),
    }
)
"""A strong, linear, sometimes wrong modality beside one that is as good, harder to learn, and could correct it.

For 4 classes the best possible accuracy is .92 (easy), .95 (hard) and .96 (both). With 3,000 samples a network of one
hidden layer reaches about .93 on either alone and on both, but trained on both it scores only .4 to .6 with the hard
modality alone: it has not learned to use it.
"""


def synthetic(
    num_samples: int = 600,
    *,
    modalities: int | Mapping[str, SyntheticModality] = 3,
    num_classes: int = 3,
    planted_collapse: bool = False,
    missing_rate: float = 0.0,
    seed: int = 0,
) -> MultimodalDataset:
    """A balanced classification set whose predictive features are known; standardised, split 60/10/30.

    Args:
        num_samples: N.
        modalities: a number (equal ones, named ``a``, ``b``, ``c``, ...) or name -> :class:`SyntheticModality`.
        num_classes: C; the metric is ``"auroc"`` for 2 and ``"accuracy"`` for more.
        planted_collapse: use :data:`PLANTED_COLLAPSE` as modalities.
        missing_rate: natural absence, completely at random (:func:`~mmc_fast.experiments.data.mcar`).
        seed: of everything; the global generators are not touched.

    Returns:
        The data set; ``info["predictive"]`` lists the predictive columns of each modality.

    Examples:
        >>> mmc_fast.experiments.data.synthetic(600, modalities=2, seed=0).modalities
        ['a', 'b']
    """
    if planted_collapse:
        modalities = PLANTED_COLLAPSE
    if not isinstance(modalities, Mapping):
        count = integer(modalities)
        if count is None or not 1 <= count <= 26:
            raise InputError(f"synthetic: {modalities!r} modalities; allowed are 1 to 26, or a mapping.")
        modalities = {chr(ord("a") + i): SyntheticModality() for i in range(count)}
    seed = check_seed(seed)
    if num_classes < 2 or num_samples < 10 * num_classes:
        raise InputError(
            f"synthetic: {num_samples} samples of {num_classes} classes; need 2 classes and 10 samples of each."
        )
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randperm(num_samples, generator=generator) % num_classes
    views = {name: _draw(spec, labels, num_classes, generator) for name, spec in modalities.items()}
    everything = torch.ones(num_samples, len(views), dtype=torch.bool)
    present = mcar(everything, missing_rate, generator).present
    raw = RawDataset(
        name="synthetic",
        views={name: x.numpy() for name, x in views.items()},
        labels=labels.numpy(),
        split=stratified_split(labels.numpy(), seed=seed),
        task=Classification.of(num_classes),
        names={
            name: [f"signal_{j}" if j < spec.predictive else f"noise_{j}" for j in range(spec.dim)]
            for name, spec in modalities.items()
        },
        present={name: present[:, i].numpy() for i, name in enumerate(views)},
        info={
            "task": "class",
            "source": f"drawn with seed {seed}",
            "licence": "none needed",
            "variant": "planted_collapse" if planted_collapse else None,
            "predictive": {name: list(range(spec.predictive)) for name, spec in modalities.items()},
        },
    )
    return build(raw)


def planted_collapse(
    seed: int = 0, *, num_samples: int = 3000, num_classes: int = 4, missing_rate: float = 0.0
) -> MultimodalDataset:
    """A training set on which plain fusion collapses: modalities "easy" and "hard" of :data:`PLANTED_COLLAPSE`.

    Either alone suffices for about the same accuracy, so a model that ignores "hard" has lost it, not judged it.

    Args: those of :func:`synthetic`, with ``planted_collapse=True``.
    """
    return synthetic(num_samples, num_classes=num_classes, planted_collapse=True, missing_rate=missing_rate, seed=seed)


def _draw(spec: SyntheticModality, labels: Tensor, num_classes: int, generator: torch.Generator) -> Tensor:
    """float32 [N, dim]."""
    n = len(labels)
    width = max(spec.predictive, 1)
    prototypes = torch.randn(num_classes, width, generator=generator)
    if num_classes <= width:
        prototypes = torch.linalg.qr(prototypes.T)[0].T  # orthogonal: also ± them stay apart
    else:
        prototypes = prototypes / prototypes.norm(dim=1, keepdim=True)
    astray = torch.rand(n, generator=generator) >= spec.reliability
    shown = torch.where(astray, torch.randint(num_classes, (n,), generator=generator), labels)
    signs = torch.randint(2, (n, 1), generator=generator) * 2 - 1 if spec.folded else torch.ones(n, 1)
    x = torch.randn(n, spec.dim, generator=generator)
    x[:, : spec.predictive] += (signs * spec.strength * prototypes[shown])[:, : spec.predictive]
    return x
