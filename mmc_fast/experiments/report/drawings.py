"""The drawings that every set of runs gets: score against missing rate, reliance, learning curves, the game."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmc_fast.diagnose.figures import Drawing, Line, Reference, bars, lines
from mmc_fast.diagnose.statistics import mean_sd

from .comparison import AVERAGE, COMPLETE, Comparison
from .runs import NAMES as METHOD_COLOURS
from .runs import RunSet, display_name, series_index

__all__ = [
    "draw_fresh_discriminator",
    "draw_game",
    "draw_history",
    "draw_missing_rates",
    "draw_rates",
    "draw_reliance",
    "metric_name",
]

METRIC_NAMES = {"accuracy": "accuracy", "auroc": "AUC (ROC)", "auprc": "AUC (precision–recall)"}


def metric_name(metric: str) -> str:
    """How a metric is written on an axis."""
    return METRIC_NAMES.get(metric, metric)


def draw_missing_rates(runs: RunSet, comparison: Comparison) -> Drawing:
    """Score against the nominal missing rate, one line per method, band = s.d. over seeds."""
    names = {method: display_name(method) for method in comparison.scores}
    return draw_rates(comparison, names, colours=series_index(list(runs.methods)))


def draw_rates(
    comparison: Comparison, names: Mapping[str, str], *, colours: Mapping[str, int] | None = None
) -> Drawing:
    """Score against the nominal missing rate, one line for each method in ``names`` (key -> name in the legend)."""
    conditions = [c for c in comparison.conditions if c != AVERAGE]
    rates = [0.0 if c == COMPLETE else float(c.split()[0]) for c in conditions]
    series = {}
    for method, name in names.items():
        values = [comparison.scores[method][c] for c in conditions]
        series[name] = Line(rates, [s.mean for s in values], [s.sd for s in values])
    ends = "; ".join(f"{name} from {line.y[0]:.3f} to {line.y[-1]:.3f}" for name, line in series.items())
    return lines(
        f"{comparison.dataset}: score against missing rate",
        series,
        x_label="nominal missing rate",
        y_label=metric_name(comparison.metric),
        alt=f"{comparison.dataset}: test score as the missing rate grows from {rates[0]:g} to {rates[-1]:g}: {ends}.",
        caption="Band: s.d. over seeds.",
        colours=colours,
    )


def draw_reliance(runs: RunSet, method: str, chance: float) -> Drawing:
    """Per modality: its unimodal model, the fused model with that of other samples, and the fused model with nothing else."""
    scored = {m: s for m, s in runs.reliance(method).items() if "alone" in s and "only" in s}
    kinds = {"alone": "alone", "shuffled": "that of other samples", "only": "nothing else"}
    everything = runs.complete(method)
    described = "; ".join(
        f"{m} alone {s['alone']:.3f}, shuffled {s['shuffled']:.3f}, only {s['only']:.3f}" for m, s in scored.items()
    )
    model = display_name(method)
    return bars(
        f"{runs.dataset}, {model}: reliance on each modality",
        list(scored),
        {label: [s[kind] for s in scored.values()] for kind, label in kinds.items()},
        y_label=metric_name(runs.metric),
        alt=f"{runs.dataset}, {model}: all modalities {everything:.3f}, chance {chance:.3f}; {described}.",
        references=[Reference("all modalities", everything), Reference("chance", chance)],
        colours={label: len(METHOD_COLOURS) + i for i, label in enumerate(kinds.values())},
    )


def draw_history(runs: RunSet, key: str, title: str, y_label: str) -> Drawing:
    """A logged quantity against the epoch, one line per method that logged it."""
    series = {}
    for method in runs.methods:
        epochs, means, spread = runs.history(method, key)
        if epochs:
            series[display_name(method)] = Line(epochs, means, spread)
    ends = "; ".join(f"{name} ends at {line.y[-1]:.3f}" for name, line in series.items())
    return lines(
        f"{runs.dataset}: {title}",
        series,
        x_label="epoch",
        y_label=y_label,
        alt=f"{runs.dataset}: {title} over the epochs; {ends}.",
        markers=False,
        colours=series_index(list(runs.methods)),
    )


def draw_game(runs: RunSet, method: str, chance: float) -> Drawing:
    """Discrimination loss over its value at invariance, and the discriminator's accuracy, against the epoch."""
    series = {}
    for key, label in (("loss_md_over_entropy", "L_md / H"), ("psi_accuracy", "accuracy of ψ")):
        epochs, means, spread = runs.history(method, key)
        if epochs:
            series[label] = Line(epochs, means, spread)
    ends = "; ".join(f"{name} ends at {line.y[-1]:.2f}" for name, line in series.items())
    return lines(
        f"{runs.dataset}, {display_name(method)}: the game",
        series,
        x_label="epoch",
        y_label="share",
        alt=f"{runs.dataset}: the game between encoders and discriminator over the epochs; {ends}.",
        caption="Modality-invariant latents would hold L_md / H at 1 and the accuracy of ψ at chance. Cut off at 2.",
        references=[Reference("ψ at chance", chance), Reference("L_md at invariance", 1.0)],
        y_limits=(0.0, 2.0),
        colours={label: len(METHOD_COLOURS) + i for i, label in enumerate(series)},
        markers=False,
    )


def draw_fresh_discriminator(runs: Sequence[RunSet], method: str) -> Drawing:
    """Held-out balanced accuracy of a discriminator trained afresh on frozen latents, beside chance, per data set."""
    accuracy: list[float] = []
    spread: list[float | None] = []
    chance: list[float] = []
    for run_set in runs:
        fresh = [run["game"]["fresh_discriminator"] for run in run_set.methods[method]]
        mean, sd = mean_sd([f["balanced_accuracy"] for f in fresh])
        accuracy.append(mean)
        spread.append(sd)
        chance.append(fresh[0]["chance"])
    names = [run_set.dataset for run_set in runs]
    described = "; ".join(f"{n} {a:.2f} (chance {c:.2f})" for n, a, c in zip(names, accuracy, chance, strict=True))
    return bars(
        f"{display_name(method)}: fresh discriminator on frozen latents",
        names,
        {"fresh discriminator": accuracy, "chance": chance},
        y_label="balanced accuracy",
        alt=f"Held-out balanced accuracy of a freshly trained modality discriminator: {described}.",
        errors={"fresh discriminator": spread},
        colours={"fresh discriminator": 3, "chance": 0},
        y_limits=(0.0, 1.05),
    )
