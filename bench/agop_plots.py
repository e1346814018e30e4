"""Figures of the scans: cost of the AGOP against N, C, h and d."""

from __future__ import annotations

from pathlib import Path

__all__ = ["plot"]


def plot(results: list[dict], folder: Path) -> None:
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for axis in dict.fromkeys(r["axis"] for r in results):
        part = [r for r in results if r["axis"] == axis]
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.subplots()
        for name, label in (("ours", "mmc_fast.agop"), ("forward", "forward product"), ("closed_form", "closed form")):
            axes.plot([r["value"] for r in part], [r["milliseconds"][name] for r in part], marker="o", label=label)
        label = {"n": "N", "outputs": "C"}.get(axis, axis)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel=label,
            ylabel="CPU time (ms)",
            title=f"AGOP, one hidden ReLU layer, against {label}",
        )
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        figure.savefig(folder / f"agop_{label}.svg")
