"""Numbers of finished runs that differ in their seed: reliance on each modality, training curves, the adversary, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mmc_fast.diagnose.document import Cell, Table
from mmc_fast.diagnose.statistics import mean_sd
from mmc_fast.diagnose.verdict import KINDS, ModalityVerdict

Results = Mapping[str, Any]
"""The content of a run's results.json."""


def chance_score(metric: str, labels: ArrayLike) -> float:
    """Score of a model that knows nothing but the labels' frequencies."""
    y = np.asarray(labels)
    if metric in ("auroc", "macro_auroc", "concordance"):
        return 0.5
    if metric == "r2":
        return 0.0
    return float((y == 1).mean()) if metric == "auprc" else float(np.bincount(y).max() / len(y))


def reliance(runs: Sequence[Results]) -> tuple[float, dict[str, dict[str, float]]]:
    """Means over the runs: score on complete data, and the scores of every modality that has a unimodal model."""
    scored = [run["scores"]["reliance"] for run in runs]
    modalities = [m for m, entry in scored[0].items() if entry.get("unimodal") is not None]
    kinds = ("unimodal", "leave_one_out", "single_modality", "shuffled", "shapley")
    means = {m: {kind: mean_sd([s[m][kind] for s in scored])[0] for kind in kinds} for m in modalities}
    return mean_sd([run["scores"]["complete"] for run in runs])[0], means


def verdicts(runs: Sequence[Results]) -> list[ModalityVerdict]:
    """One verdict per modality: the kind that the diagnosis gives in most runs, else "undecided", and mean evidence.

    ``evidence["runs"]`` counts the runs and ``evidence["same"]`` those of that kind.
    """
    entries = [run["scores"].get("reliance") or {} for run in runs]
    found = []
    for modality in entries[0]:
        own = [entry[modality] for entry in entries]
        kinds = [entry["verdict"] for entry in own]
        kind = max(KINDS, key=kinds.count)
        same = kinds.count(kind)
        names = set.intersection(*({k for k, v in e["evidence"].items() if v is not None} for e in own))
        evidence = {k: mean_sd([e["evidence"][k] for e in own])[0] for k in sorted(names)}
        evidence |= {"runs": len(own), "same": same}
        found.append(ModalityVerdict(modality, kind if 2 * same > len(own) else "undecided", evidence))
    return found


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


def reliance_table(by_method: Mapping[str, Sequence[Results]]) -> Table:
    """Title of a method -> its runs: scores, use over ability and verdict of every modality."""
    judged = {title: {v.modality: v for v in verdicts(runs)} for title, runs in by_method.items()}
    modalities = list(next(iter(judged.values())))
    columns = ["modality", "unimodal"]
    first = next(iter(judged.values()))
    lines: list[list[Cell | str]] = [[m, _score(first[m].evidence.get("alone"))] for m in modalities]
    for title, found in judged.items():
        columns += [f"{title}: shuffled", "only this one", "use over ability", "verdict"]
        for line in lines:
            verdict = found[str(line[0])]
            line += [_score(verdict.evidence.get(kind)) for kind in ("shuffled", "only", "index")]
            line.append(Cell(verdict.kind, strong=verdict.kind in ("collapsed", "misleading")))
    caption = (
        "Scores of a unimodal model, of the fused model when the modality is shuffled across samples, and when it is the only one; "
        "the share of the use over the share of the ability; the verdict of the diagnosis in most runs."
    )
    return Table(columns, lines, caption)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


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
    rows: list[list[Cell | str]] = [
        [Cell(key, code=True), *(values.get(key, "–") for values in flat.values())] for key in keys
    ]
    return Table(["setting", *configs], rows, "A dash stands where a method does not have the setting.")
