"""Drawings of methods and trained runs: score against missing rate, reliance on each modality, the adversary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmc_fast.diagnose.figures import Drawing, Line, Reference, bars, lines

from .comparison import AVERAGE, COMPLETE, Comparison
from .trained import Results, history, reliance

METRIC_NAMES = {"accuracy": "accuracy", "auroc": "AUC (ROC)", "auprc": "AUC (precision–recall)",
                "macro_auroc": "mean AUC (ROC)", "r2": "R²", "concordance": "concordance"}  # fmt: skip
_OTHER_COLOURS = 5  # after those of methods


def metric_name(metric: str) -> str:
    """How a metric is written on an axis."""
    return METRIC_NAMES.get(metric, metric)


def draw_rates(comparison: Comparison, names: Mapping[str, str]) -> Drawing:
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
    )


def draw_reliance(runs: Sequence[Results], title: str, chance: float) -> Drawing:
    """Per modality: its unimodal model, the fused model with it shuffled across samples, and the fused model with it only."""
    everything, scored = reliance(runs)
    kinds = {"unimodal": "unimodal", "shuffled": "this one shuffled", "single_modality": "only this one"}
    described = "; ".join(
        f"{m} unimodal {s['unimodal']:.3f}, shuffled {s['shuffled']:.3f}, only this one {s['single_modality']:.3f}"
        for m, s in scored.items()
    )
    data = runs[0]["data"]
    return bars(
        f"{data['name']}, {title}: reliance on each modality",
        list(scored),
        {label: [s[kind] for s in scored.values()] for kind, label in kinds.items()},
        y_label=metric_name(data["metric"]),
        alt=f"{data['name']}, {title}: all modalities {everything:.3f}, chance {chance:.3f}; {described}.",
        references=[Reference("all modalities", everything), Reference("chance", chance)],
        colours={label: _OTHER_COLOURS + i for i, label in enumerate(kinds.values())},
    )


def draw_repair(before: Sequence[Results], after: Sequence[Results], titles: tuple[str, str], chance: float) -> Drawing:
    """Per modality, when it is all there is: its unimodal model, and the fused model before and after the repair."""
    unimodal, kept, repaired = (
        {m: s[kind] for m, s in reliance(runs)[1].items()}
        for runs, kind in ((before, "unimodal"), (before, "single_modality"), (after, "single_modality"))
    )
    data = before[0]["data"]
    described = "; ".join(f"{m} {unimodal[m]:.3f}, {kept[m]:.3f}, {repaired[m]:.3f}" for m in unimodal)
    labels = ("a model of this modality alone", *titles)
    return bars(
        f"{data['name']}: what is left when one modality is all there is",
        list(unimodal),
        {label: list(s.values()) for label, s in zip(labels, (unimodal, kept, repaired), strict=True)},
        y_label=f"test {metric_name(data['metric'])}",
        alt=f"{data['name']}, score with one modality alone ({', '.join(labels)}): {described}; chance {chance:.3f}.",
        caption=f"Mean over {len(before)} trainings each." if len(before) > 1 else "One training each.",
        references=[Reference("chance", chance)],
        colours={labels[0]: _OTHER_COLOURS, labels[1]: 0, labels[2]: 4},
    )


def draw_adversary(runs: Sequence[Results], title: str, chance: float) -> Drawing:
    """Discrimination loss over its value at invariance, and the discriminator's accuracy, against the epoch."""
    series = {}
    for key, label in (("loss_md_over_entropy", "L_md / H"), ("psi_accuracy", "accuracy of ψ")):
        epochs, means, spread = history(runs, key)
        if epochs:
            series[label] = Line(epochs, means, spread)
    ends = "; ".join(f"{name} ends at {line.y[-1]:.2f}" for name, line in series.items())
    name = runs[0]["data"]["name"]
    return lines(
        f"{name}, {title}: adversarial training",
        series,
        x_label="epoch",
        y_label="share",
        alt=f"{name}: encoders against discriminator over the epochs; {ends}.",
        caption="Modality-invariant latents would hold L_md / H at 1 and the accuracy of ψ at chance. Cut off at 2.",
        references=[Reference("ψ at chance", chance), Reference("L_md at invariance", 1.0)],
        y_limits=(0.0, 2.0),
        colours={label: _OTHER_COLOURS + i for i, label in enumerate(series)},
        markers=False,
    )
