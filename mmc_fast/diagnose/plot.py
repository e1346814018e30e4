"""Plots of a diagnosis on matplotlib axes; without axes, on a new figure that belongs to no global state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from mmc_fast.errors import InputError

from .figures import INK, MARKERS, STYLE, series_colour

if TYPE_CHECKING:
    from .result import Diagnosis, Measure

__all__ = [
    "plot_blocks",
    "plot_neurons",
    "plot_ranks",
    "plot_reliance",
    "plot_responses",
    "plot_shapley",
    "plot_similarity",
    "plot_spectra",
    "plot_use_shares",
]


def _axes(ax: Axes | None, title: str) -> Axes:
    if ax is None:
        with mpl.rc_context(STYLE):
            ax = Canvas(figsize=(5.4, 3.9), layout="constrained").add_subplot()
    ax.set_title(title)
    return ax


def _bars(ax: Axes, groups: Sequence[str], series: dict[str, list[Measure | None]], first_colour: int = 1) -> None:
    width = 0.8 / len(series)
    for index, (name, measures) in enumerate(series.items()):
        at = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
        values = [np.nan if m is None or m.value is None else m.value for m in measures]
        ax.bar(at, values, width * 0.92, label=name, color=series_colour(first_colour + index), linewidth=0)
        known = [(x, v, m) for x, v, m in zip(at, values, measures, strict=True) if m and m.low is not None]
        if known:
            low = [max(0.0, v - (m.low or 0.0)) for _, v, m in known]
            high = [max(0.0, (m.high or 0.0) - v) for _, v, m in known]
            x, y = [x for x, _, _ in known], [v for _, v, _ in known]
            ax.errorbar(x, y, yerr=[low, high], fmt="none", ecolor=INK, elinewidth=1)
    ax.set_xticks(range(len(groups)), list(groups))
    ax.tick_params(axis="x", length=0)
    slanted = sum(map(len, groups)) > 34
    if slanted:
        for label in ax.get_xticklabels():
            label.set_rotation(25)
            label.set_horizontalalignment("right")
    if len(series) > 1:
        below = -0.28 if slanted else -0.14
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, below), ncols=min(4, len(series)))


def _measures(d: Diagnosis, prefix: str) -> list[Measure | None]:
    return [d.measures.get(f"{prefix}.{name}") for name in d.modalities]


def plot_use_shares(d: Diagnosis, ax: Axes | None = None) -> Axes:
    """Share of the head's response that comes from each modality, with the line of equal use."""
    ax = _axes(ax, "Use share of each modality")
    _bars(ax, list(d.modalities), {"use share": _measures(d, "use_share")})
    ax.axhline(1 / len(d.modalities), color=INK, linestyle="--", linewidth=1.2, label="equal use")
    ax.set_ylabel("share of tr(G Σ)")
    ax.set_ylim(0, 1)
    return ax


def plot_blocks(d: Diagnosis, ax: Axes | None = None) -> Axes:
    """Energies of the blocks of the whitened AGOP; off the diagonal is entanglement."""
    ax = _axes(ax, "Blocks of the whitened AGOP")
    energies = np.array(d.arrays["block_energies"], dtype=float)
    names = list(d.modalities)
    ax.grid(False)
    mesh = ax.pcolormesh(energies, cmap="Blues", vmin=0, vmax=max(float(energies.max()), 1e-12), edgecolors="none")
    for (i, j), value in np.ndenumerate(energies):
        ink = "#ffffff" if value > 0.6 * energies.max() else INK
        ax.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=9)
    ax.set_xticks(np.arange(len(names)) + 0.5, names, rotation=25 if sum(map(len, names)) > 24 else 0)
    ax.set_yticks(np.arange(len(names)) + 0.5, names)
    ax.invert_yaxis()
    ax.set_aspect("equal")
    mesh.set_rasterized(False)
    return ax


def plot_spectra(d: Diagnosis, ax: Axes | None = None) -> Axes:
    """Each spectrum's leading values as shares of its sum, on a logarithmic scale."""
    ax = _axes(ax, "Spectra")
    for index, (name, values) in enumerate((k, v) for k, v in d.arrays.items() if k.startswith("spectrum.")):
        shown = np.array(values, dtype=float)
        shown = shown[shown > 1e-9]
        if len(shown):
            label = name.removeprefix("spectrum.")
            label = "fused representation" if label == "fused" else f"AGOP, layer {label}"
            ax.plot(
                np.arange(1, len(shown) + 1), shown, label=label, color=series_colour(index + 1), linewidth=1.8,
                marker=MARKERS[index % len(MARKERS)], markersize=3,
            )  # fmt: skip
    ax.set_yscale("log")
    ax.set_xlabel("position")
    ax.set_ylabel("share of the sum")
    ax.legend(loc="upper right")
    return ax


def plot_reliance(d: Diagnosis, ax: Axes | None = None) -> Axes:
    """Alone, without and only, per modality, with the scores of all and of chance."""
    _need(d, "score.all", "scores")
    ax = _axes(ax, "Reliance on each modality")
    series = {"alone": _measures(d, "alone"), "without it": _measures(d, "without"), "only it": _measures(d, "only")}
    if any(f"retrained_without.{name}" in d.measures for name in d.modalities):
        series["retrained without"] = _measures(d, "retrained_without")
    _bars(ax, list(d.modalities), {k: v for k, v in series.items() if any(v)})
    for name, style in (("score.all", "--"), ("score.chance", ":")):
        value = d.value(name)
        if value is not None:
            label = {"score.all": "all", "score.chance": "chance"}[name]
            ax.axhline(value, color=INK, linestyle=style, linewidth=1.2)
            ax.annotate(label, (1.0, value), xycoords=("axes fraction", "data"), fontsize=9, va="bottom", ha="right")
    ax.set_ylabel(str(d.metric))
    ax.set_ylim(0, 1.05)
    return ax


def plot_shapley(d: Diagnosis, ax: Axes | None = None) -> Axes:
    """Exact Shapley values: they add up to what all modalities gain over none."""
    _need(d, "score.all", "scores")
    ax = _axes(ax, "Shapley value of each modality")
    _bars(ax, list(d.modalities), {"Shapley value": _measures(d, "shapley")})
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.set_ylabel(f"{d.metric} contributed")
    return ax


def plot_neurons(d: Diagnosis, ax: Axes | None = None) -> Axes:
    """Every neuron's modality shares, neurons sorted by their largest modality and its share."""
    if "neuron_shares" not in d.arrays:
        raise InputError("plot_neurons: this diagnosis has no map of neurons; see its notes")
    ax = _axes(ax, "Neurons by modality share")
    shares = np.array(d.arrays["neuron_shares"], dtype=float)
    shares = shares[shares.sum(1) > 0]
    largest, first = shares.max(1), shares.argmax(1)
    # The last modality's neurons rise, so that two modalities make one falling curve.
    order = np.lexsort((np.where(first == shares.shape[1] - 1, largest, -largest), first))
    shares = shares[order] if len(shares) else np.zeros((1, len(d.modalities)))
    edges = np.repeat(np.arange(len(shares) + 1), 2)[1:-1]
    base = np.zeros(len(shares))
    for index, name in enumerate(d.modalities):
        top = base + shares[:, index]
        ax.fill_between(
            edges, np.repeat(base, 2), np.repeat(top, 2), color=series_colour(index + 1), label=name, linewidth=0
        )
        base = top
    ax.set_xlim(0, len(shares))
    ax.set_ylim(0, 1)
    ax.set_xlabel("neurons, sorted")
    ax.set_ylabel("share")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=min(4, len(d.modalities)))
    return ax


def plot_responses(d: Diagnosis, ax: Axes | None = None) -> Axes:
    """Activation of the most and the least entangled neuron against the signal it reads and the noise of another modality."""
    if "responses" not in d.arrays:
        raise InputError(
            "plot_responses: this diagnosis has no neuron responses; they need labels and a chain of layers"
        )
    ax = _axes(ax, "Most and least entangled neuron")
    for response, style in zip(d.arrays["responses"], ("-", "--"), strict=True):
        for index, kind in enumerate(("predictive", "noisy")):
            values = np.array(response[kind], dtype=float)  # null becomes NaN, which leaves a gap
            peak = np.nanmax(np.abs(values)) or 1.0
            of = response["signal of" if kind == "predictive" else "noise of"]
            label = f"{response['neuron']}: {'signal' if kind == 'predictive' else 'noise'} of {of}"
            ax.plot(
                response["centres"], values / peak, style, label=label, color=series_colour(index + 1), linewidth=1.8
            )
    ax.set_xlabel("feature, in standard deviations")
    ax.set_ylabel("mean activation / peak")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    return ax


def plot_similarity(d: Diagnosis, ax: Axes | None = None) -> Axes:
    """Linear CKA of the fused representation with the features of each modality."""
    ax = _axes(ax, "Likeness of the fused representation")
    _bars(ax, list(d.modalities), {"CKA": _measures(d, "cka")})
    ax.set_ylabel("linear CKA")
    ax.set_ylim(0, 1)
    return ax


def plot_ranks(d: Diagnosis, ax: Axes | None = None) -> Axes:
    """Effective and stable rank of each layer's AGOP and of the fused representation."""
    ax = _axes(ax, "Ranks")
    found = [k.removesuffix(".effective_rank") for k in d.measures if k.endswith(".effective_rank")]
    series = {
        kind: [d.measures.get(f"{name}.{kind.split()[0]}_rank") for name in found]
        for kind in ("effective rank", "stable rank")
    }
    _bars(ax, [name.replace("agop.", "AGOP ") for name in found], series)
    ax.set_ylabel("rank")
    return ax


def _need(d: Diagnosis, name: str, what: str) -> Any:
    if name not in d.measures:
        raise InputError(f"this diagnosis has no {what} to plot: {' '.join(d.notes) or 'reliance was not asked for'}")
