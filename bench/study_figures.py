"""Figures of docs/study.md, drawn from the rows of the run log."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from study import EXPLORED, MAIN, ROOT

FOLDER = ROOT / "docs" / "img"
COLOURS = {"missing": "#0b7285", "complete": "#e8590c"}


def differences(found: Mapping[str, dict], others: Mapping[str, str]) -> None:
    """Test scores: robust minus each of ``others`` (title -> method), with intervals, for every set."""
    fig, axes = plt.subplots(1, len(others), figsize=(10, 3.6), sharey=True)
    for axis, (title, other) in zip(axes, others.items(), strict=True):
        for offset, (condition, colour) in enumerate(COLOURS.items()):
            for y, entry in enumerate(found.values()):
                mean, low, high = entry[f"robust - {other}"][condition]
                axis.plot([low, high], [y + 0.2 * offset] * 2, color=colour, lw=2)
                axis.plot(mean, y + 0.2 * offset, "o", color=colour, label=condition if y == 0 else None)
        axis.axvline(0, color="0.4", lw=1)
        axis.set_title(f"robust minus {title}", fontsize=10)
        axis.set_yticks([y + 0.1 for y in range(len(found))], list(found))
        axis.set_xlabel("difference of test score, 95 % interval")
    axes[0].legend(frameon=False, fontsize=9)
    _save(fig, "study.png")


def ablation(rows: list[dict]) -> None:
    """Difference of each ablation row from robust, paired by seed: mean and standard error, one panel a set."""
    value = {
        (r["name"], r["set"], r["seed"]): (r["mean_missing"] + r["complete"]) / 2
        for r in rows
        if r["stage"] == "ablation"
    }
    names = [n for n in dict.fromkeys(name for name, _, _ in value) if n != "robust"]
    if not names:
        return
    fig, axes = plt.subplots(1, len(EXPLORED), figsize=(11, 0.32 * len(names) + 1.2), sharey=True)
    for axis, s in zip(axes, EXPLORED, strict=True):
        for y, name in enumerate(reversed(names)):
            d = [v - value["robust", s, seed] for (n, t, seed), v in value.items()
                 if n == name and t == s and ("robust", s, seed) in value]  # fmt: skip
            if d:
                error = np.std(d, ddof=1) / len(d) ** 0.5 if len(d) > 1 else 0.0
                axis.errorbar(np.mean(d), y, xerr=error, fmt="o", color="#0b7285", capsize=2)
        axis.axvline(0, color="0.4", lw=1)
        axis.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
        axis.set_title(s, fontsize=10)
        axis.set_xlabel("score minus robust, ±1 s.e.")
    _save(fig, "study_ablation.png")


def noise(rows: list[dict]) -> None:
    """Validation score on complete data against the noise rate on the weakest modality in training."""
    cells: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    for row in rows:
        if row["stage"] == "noise":
            name, rate = row["name"].rsplit(", r ", 1)
            cells[name, row["set"], float(rate)].append(row["complete"])
    if not cells:
        return
    fig, axes = plt.subplots(1, len(EXPLORED), figsize=(11, 3.2))
    for axis, s in zip(axes, EXPLORED, strict=True):
        for name in MAIN:
            points = sorted((rate, np.mean(v)) for (n, t, rate), v in cells.items() if n == name and t == s)
            if points:
                axis.plot(*zip(*points, strict=True), "o-", label=name)
        axis.set_title(s, fontsize=10)
        axis.set_xlabel("noise rate r")
    axes[0].set_ylabel("score, complete data")
    axes[0].legend(frameon=False, fontsize=8)
    _save(fig, "study_noise.png")


def _save(fig, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    fig.tight_layout()
    fig.savefig(FOLDER / name, dpi=110)
    plt.close(fig)
