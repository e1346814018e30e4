"""Numbers of finished runs that differ in their seed: reliance on each modality, training curves, the adversary, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mmc_fast.diagnose.document import Cell, Table
from mmc_fast.diagnose.statistics import mean_sd
from mmc_fast.diagnose.verdict import ModalityVerdict, verdicts_from_scores

__all__ = [
    "RELIANCE",
    "Results",
    "chance_score",
    "history",
    "probe",
    "probe_table",
    "reliance",
    "reliance_table",
    "settings_table",
    "verdicts",
    "without_effect",
]

Results = Mapping[str, Any]
"""The content of a run's results.json."""

RELIANCE = {"alone": "unimodal", "without": "leave_one_out", "only": "single_modality"}
"""Score of a verdict -> its key under "reliance" in results.json."""


def chance_score(metric: str, labels: ArrayLike) -> float:
    """Score of a model that knows nothing but the labels' frequencies."""
    y = np.asarray(labels)
    if metric == "auroc":
        return 0.5
    return float((y == 1).mean()) if metric == "auprc" else float(np.bincount(y).max() / len(y))


def reliance(runs: Sequence[Results]) -> tuple[float, dict[str, dict[str, float]]]:
    """Means over the runs: score on complete data, and "alone", "without" and "only" of every modality that has all."""
    scored = [run["scores"]["reliance"] for run in runs]
    modalities = [m for m, entry in scored[0].items() if entry.get(RELIANCE["alone"]) is not None]
    means = {m: {kind: mean_sd([s[m][key] for s in scored])[0] for kind, key in RELIANCE.items()} for m in modalities}
    return mean_sd([run["scores"]["complete"] for run in runs])[0], means


def verdicts(runs: Sequence[Results], chance: float) -> list[ModalityVerdict]:
    """The verdict of the diagnosis on every modality, from the scores alone: no use share is measured here."""
    everything, scored = reliance(runs)
    return verdicts_from_scores(scored, everything, chance)


def history(runs: Sequence[Results], key: str) -> tuple[list[int], list[float], list[float | None]]:
    """Epochs, mean and s.d. over the runs of a logged quantity, for the epochs that logged it in every run."""
    by_seed = [{r["epoch"]: r[key] for r in run["history"] if r.get(key) is not None} for run in runs]
    epochs = sorted(set.intersection(*(set(values) for values in by_seed)))
    stats = [mean_sd([values[epoch] for values in by_seed]) for epoch in epochs]
    return epochs, [mean for mean, _ in stats], [sd for _, sd in stats]


def probe(run: Results) -> Mapping[str, Any] | None:
    """What the post-hoc modality probe found on the frozen latents of a run; None without adversary."""
    found: Mapping[str, Any] | None = (run.get("adversarial") or {}).get("modality_probe")
    return found


def without_effect(run: Results) -> bool:
    """Whether λ changed nothing in a run with an adversary."""
    return bool(run["label"] == "without-effect")


def reliance_table(by_method: Mapping[str, Sequence[Results]], chance: float) -> Table:
    """Title of a method -> its runs: scores and verdict of every modality."""
    modalities = list(reliance(next(iter(by_method.values())))[1])
    columns, rows = ["modality", "unimodal"], [[m] for m in modalities]
    found = {title: (reliance(runs)[1], verdicts(runs, chance)) for title, runs in by_method.items()}
    lines: list[list[Cell | str]] = [[*row] for row in rows]
    for line in lines:
        line.append(f"{next(iter(found.values()))[0][str(line[0])]['alone']:.3f}")
    for title, (scored, judged) in found.items():
        columns += [f"{title}: leave-one-out", "single-modality", "verdict"]
        for line, verdict in zip(lines, judged, strict=True):
            s = scored[verdict.modality]
            kind = Cell(verdict.kind, strong=verdict.kind == "collapsed")
            line += [f"{s['without']:.3f}", f"{s['only']:.3f}", kind]
    caption = (
        "Score of a model of this modality, of the fused model without it, and of the fused model with nothing else "
        "(absent modalities at their train mean); means over seeds. Verdicts by the rule of the diagnosis, without use shares."
    )
    return Table(columns, lines, caption)


def probe_table(by_method: Mapping[str, Sequence[Results]]) -> Table | None:
    """Title of a method -> its runs: the probe's balanced accuracy beside chance; None where nobody has an adversary."""
    lines = []
    for title, runs in by_method.items():
        found = [probe(run) for run in runs]
        known = [f for f in found if f is not None]
        if known:
            mean, sd = mean_sd([f["balanced_accuracy"] for f in known])
            spread = "" if sd is None else f" ± {sd:.3f}"
            lines.append([title, f"{mean:.3f}{spread}", f"{known[0]['chance']:.3f}"])
    caption = (
        "A modality probe trained afterwards on the frozen latents; at chance, they would not tell their modality."
    )
    return Table(["method", "balanced accuracy", "chance"], lines, caption) if lines else None


def settings_table(configs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Title of a method -> its configuration: one line per setting, nested ones by their dotted name."""

    def walk(prefix: str, values: Mapping[str, Any]) -> dict[str, str]:
        result = {}
        for key, value in values.items():
            if isinstance(value, Mapping):
                result.update(walk(f"{prefix}{key}.", value))
            else:
                result[f"{prefix}{key}"] = "–" if value is None else str(value)
        return result

    flat = {name: walk("", config) for name, config in configs.items()}
    keys = list(dict.fromkeys(key for values in flat.values() for key in values))
    rows = [[f"`{key}`", *(values.get(key, "–") for values in flat.values())] for key in keys]
    return Table(["setting", *configs], rows, "A dash stands where a method does not have the setting.")
