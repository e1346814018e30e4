"""Questions that need a small model trained on representations: what is in them, and what was lost in fusion."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc_fast._util.extras import require
from mmc_fast._util.seeds import generator, seeded_init
from mmc_fast.errors import InputError

EPOCHS, _PATIENCE = 200, 8
_STEPS = 16  # at least so many in an epoch, so that small data sets do not stop it too early
# Nats by which the stopping loss must fall to count: a perfect probe would otherwise sharpen for ever.
_PROGRESS = 1e-3


@dataclass(frozen=True)
class ProbeScore:
    """Held-out accuracy of a probe, its binomial standard error, and the share of the largest class."""

    accuracy: float
    standard_error: float
    chance: float
    rows: int


def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, c: float = 1.0) -> ProbeScore:
    """Held-out accuracy of a logistic regression on standardised features ``[N, p]`` with labels ``[N]``.

    ``c``: inverse strength of the L2 penalty (scikit-learn's C). Raises InputError for one class or shapes that do not
    fit. Limits: linear, so it says what can be read off, not all that is there.
    """
    model = fitted_logistic(train_x, train_y, c)
    correct = model.predict(_array(test_x)) == np.asarray(test_y)
    return _probe_score(correct, np.asarray(test_y))


@dataclass(frozen=True)
class PrefixGap:
    """``gap = own − fused`` with the standard error of the paired difference."""

    fused: ProbeScore
    own: ProbeScore
    gap: float
    standard_error: float


def prefix_gap(
    fused_train: Tensor,
    fused_test: Tensor,
    own_train: Tensor,
    own_test: Tensor,
    train_y: Tensor,
    test_y: Tensor,
    *,
    c: float = 1.0,
) -> PrefixGap:
    """What an encoder failed to learn through fusion: linear probe on two encoders of one modality, same rows.

    ``fused_*``: features ``[N, p]`` of the encoder trained only through the fused loss; ``own_*``: of the same encoder
    trained also on its own loss. A positive gap: fusion starved it. Source: figure 4 of the collapse paper.
    """
    truth = np.asarray(test_y)
    hits = []
    for train, test in ((fused_train, fused_test), (own_train, own_test)):
        hits.append(fitted_logistic(train, train_y, c).predict(_array(test)) == truth)
    difference = hits[1].astype(float) - hits[0].astype(float)
    error = float(difference.std(ddof=1) / math.sqrt(len(truth))) if len(truth) > 1 else math.nan
    return PrefixGap(_probe_score(hits[0], truth), _probe_score(hits[1], truth), float(difference.mean()), error)


def noise_component(representation: Tensor, labels: Tensor) -> Tensor:
    """What the label does not explain: rows ``[N, p]`` minus the mean of their class, float64."""
    if len(representation) != len(labels):
        raise InputError(f"noise_component: {len(representation)} rows and {len(labels)} labels; give one label a row")
    x, result = representation.double(), torch.empty_like(representation, dtype=torch.float64)
    for label in labels.unique():
        rows = labels == label
        result[rows] = x[rows] - x[rows].mean(0)
    return result


def denoising_r2(student: Tensor, teacher: Tensor, *, folds: int = 5, ridge: float = 1.0, seed: int = 0) -> float:
    """Held-out R² of predicting the teacher's noise ``[N, q]`` from the student's ``[N, p]`` (ridge, k folds).

    The denoising conjecture says that after distillation one is a transform of the other: then R² is near 1; 0 or less
    means no linear relation. Give noise components (:func:`noise_component`, or representations of noise alone). Columns
    count by their variance; columns of the student are standardised before the penalty.
    Source: slides of the collapse paper. Limits: linear relations only.
    """
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher) or len(student) < 2 * folds:
        raise InputError(
            f"denoising_r2: student {list(student.shape)}, teacher {list(teacher.shape)}, {folds} folds; give [N, p] and "
            "[N, q] of the same rows with N at least twice the folds"
        )
    require("sklearn", extra="diagnose")
    from sklearn.linear_model import Ridge
    from sklearn.metrics import r2_score
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = _array(student), _array(teacher)
    if not np.any(y.std(0) > 0):
        return math.nan
    split = KFold(folds, shuffle=True, random_state=seed)
    predicted = cross_val_predict(make_pipeline(StandardScaler(), Ridge(alpha=ridge)), x, y, cv=split)
    return float(r2_score(y, predicted, multioutput="variance_weighted"))


def modality_probe(
    latents: Mapping[str, Tensor], *, hidden: Sequence[int] = (512, 256), seed: int = 0, rows: int = 4096
) -> dict[str, Any]:
    """Post-hoc modality probe: can a new network name the modality of a latent? ``latents``: name -> ``[N, k]``, row n of one
    sample.

    Half of the samples train it (:func:`fit_modality_probe`), at most ``rows``; the other half scores it. Returns
    "balanced_accuracy" (near "chance" = 1/m: the latents do not tell their modality), "epochs", "converged", "rows".
    A discriminator that was trained along with the encoders cannot answer this: a weak one has a high loss too.
    Limits: one architecture; failing to find a difference is no proof that there is none.
    """
    tensors = [x.detach().float() for x in latents.values()]
    if len(tensors) < 2 or len({tuple(x.shape) for x in tensors}) > 1 or len(tensors[0]) < 20:
        shapes = {name: list(x.shape) for name, x in latents.items()}
        raise InputError(f"modality_probe: latents are {shapes}; give two or more modalities of one [N, k], N >= 20")
    order = torch.randperm(len(tensors[0]), generator=generator(seed, "fresh", "split"))
    half = min(len(order) // 2, rows)
    modality = torch.arange(len(tensors)).repeat_interleave(half)
    train, held = (torch.cat([t[chosen] for t in tensors]) for chosen in (order[:half], order[half : 2 * half]))
    sample = torch.arange(half).repeat(len(tensors))
    return fit_modality_probe(train, modality, sample, held, modality, hidden, len(tensors), seed)


def fit_modality_probe(
    x: Tensor,
    y: Tensor,
    sample: Tensor,
    held_x: Tensor,
    held_y: Tensor,
    hidden: Sequence[int],
    classes: int,
    seed: int,
    *,
    random: torch.Generator | None = None,
    epochs: int = EPOCHS,
) -> dict[str, Any]:
    """The network of :func:`modality_probe`: trained on rows ``x [R, k]`` of modality ``y [R]`` and sample ``sample [R]``.

    ReLU layers of widths ``hidden`` on rows standardised by the training ones, so that shrinking latents hides nothing; Adam
    on cross-entropy, stopped on a fifth of the samples once their loss settles, after ``epochs`` at the latest. Scored on
    ``held_x``, ``held_y`` by the mean of the classes' recalls. ``random`` draws the stopping samples and the order.
    """
    random = generator(seed, "fresh", "order") if random is None else random
    x, y, sample, held_x, held_y = (t.cpu() for t in (x, y, sample, held_x, held_y))
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-12)
    x = (x - mean) / scale
    samples = int(sample.max()) + 1
    stop_sample = torch.zeros(samples, dtype=torch.bool)
    stop_sample[torch.randperm(samples, generator=random)[: max(1, samples // 5)]] = True
    stopping = stop_sample[sample]
    widths = [x.shape[1], *hidden, classes]
    with seeded_init(seed, "fresh", "init"):
        layers: list[nn.Module] = []
        for n in range(len(widths) - 1):
            layers += [nn.Linear(widths[n], widths[n + 1]), nn.ReLU()]
        network = nn.Sequential(*layers[:-1])
    best, converged = _fit(network, (x[~stopping], y[~stopping]), (x[stopping], y[stopping]), random, epochs)
    with torch.no_grad():
        right = network((held_x - mean) / scale).argmax(-1) == held_y
    counts = torch.bincount(held_y, minlength=classes).double()
    recalls = torch.bincount(held_y, right.double(), minlength=classes)[counts > 0] / counts[counts > 0]
    return {
        "balanced_accuracy": float(recalls.mean()),
        "chance": 1.0 / classes,
        "epochs": best,
        "converged": converged,
        "rows": len(held_y),
    }


def _fit(
    network: nn.Sequential,
    train: tuple[Tensor, Tensor],
    stop: tuple[Tensor, Tensor],
    random: torch.Generator,
    epochs: int,
) -> tuple[int, bool]:
    """Keeps the best weights. Returns their epoch, and whether the loss had settled before the epochs ran out."""
    (x, y), (stop_x, stop_y) = train, stop
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3, fused=True)
    best, bad, best_epoch = math.inf, 0, 0
    state = {k: v.clone() for k, v in network.state_dict().items()}
    batch = min(512, max(32, len(x) // _STEPS))
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(x), generator=random).split(batch):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(network(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            loss = float(F.cross_entropy(network(stop_x), stop_y))
        if loss < best - _PROGRESS:
            best, bad, best_epoch = loss, 0, epoch
            state = {k: v.clone() for k, v in network.state_dict().items()}
        else:
            bad += 1
            if bad >= _PATIENCE:
                break
    network.load_state_dict(state)
    return best_epoch, bad >= _PATIENCE


def fitted_logistic(x: Tensor, y: Tensor, c: float) -> Any:
    features, labels = _array(x), np.asarray(y)
    if features.ndim != 2 or len(features) != len(labels):
        raise InputError(f"probe: features {list(features.shape)} and {len(labels)} labels; give [N, p] and [N]")
    if len(np.unique(labels)) < 2:
        raise InputError("probe: the training labels hold a single class; a probe needs at least 2")
    require("sklearn", extra="diagnose")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near the optimum is good enough for a probe
        return model.fit(features, labels)


def _probe_score(correct: np.ndarray, labels: np.ndarray) -> ProbeScore:
    n, accuracy = len(labels), float(correct.mean())
    _, counts = np.unique(labels, return_counts=True)
    return ProbeScore(accuracy, math.sqrt(accuracy * (1 - accuracy) / n), float(counts.max() / n), n)


def _array(x: Tensor) -> np.ndarray:
    if not torch.isfinite(x).all():
        raise InputError("probe: the features hold NaN or infinite values; remove such rows first")
    return x.detach().double().cpu().numpy()
