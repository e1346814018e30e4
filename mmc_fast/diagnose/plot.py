"""Pictures of a diagnosis on matplotlib axes; without axes, on a new figure that belongs to no global state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmc_fast._util.names import unknown
from mmc_fast.errors import InputError

from .figures import INK, MARKERS, Spread, draw_bars, in_legend, new_axes, series_colour, styled
from .result import DiagnosisData, Measure
from .tasks import BOUNDED

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@styled
def plot(d: DiagnosisData, kind: str, ax: Axes | None = None) -> Axes:
    """Draw one of :data:`PLOTS` on ``ax`` or on new axes, which are returned; InputError where ``d`` lacks what it shows."""
    if kind not in PLOTS:
        raise unknown("plot", kind, list(PLOTS))
    chosen = PLOTS[kind]
    if not chosen.shows(d):
        notes = " ".join(d.notes) or "it was not asked for"
        raise InputError(f"plot {kind!r}: this diagnosis has no {chosen.needs}: {notes}")
    axes = new_axes(chosen.title) if ax is None else ax
    axes.set_title(chosen.title)
    chosen.draw(d, axes)
    return axes


@dataclass(frozen=True)
class Plot:
    """A picture: its title, what draws it, its numbers in words, and the measure or array without which there is none."""

    title: str
    draw: Callable[[DiagnosisData, Any], None]
    numbers: Callable[[DiagnosisData], str]
    needs: str = "block_energies"

    def shows(self, d: DiagnosisData) -> bool:
        """Whether ``d`` holds what the picture shows."""
        return self.needs in d.measures or self.needs in d.arrays


def _use_shares(d: DiagnosisData, ax: Axes) -> None:
    """Share of the head's response that comes from each modality, with the line of equal use."""
    _bars(ax, list(d.modalities), {"use share": _measures(d, "use_share")})
    ax.axhline(1 / len(d.modalities), color=INK, linestyle="--", linewidth=1.2)
    ax.set_ylabel("share of tr(G Σ)")
    ax.set_ylim(0, 1)


def _blocks(d: DiagnosisData, ax: Axes) -> None:
    """Energies of the blocks of the whitened AGOP; off the diagonal is entanglement."""
    energies = np.array(d.arrays["block_energies"], dtype=float)
    names = list(d.modalities)
    ax.grid(False)
    ax.pcolormesh(energies, cmap="Blues", vmin=0, vmax=max(float(energies.max()), 1e-12), edgecolors="none")
    for (i, j), value in np.ndenumerate(energies):
        ink = "#ffffff" if value > 0.6 * energies.max() else INK
        ax.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=9)
    ax.set_xticks(np.arange(len(names)) + 0.5, names, rotation=25 if sum(map(len, names)) > 24 else 0)
    ax.set_yticks(np.arange(len(names)) + 0.5, names)
    ax.invert_yaxis()
    ax.set_aspect("equal")


def _spectra(d: DiagnosisData, ax: Axes) -> None:
    """Leading values of the AGOP at every layer and of the fused representation, as shares of their sums."""
    for index, (name, values) in enumerate((k, v) for k, v in d.arrays.items() if k.startswith("spectrum.")):
        shown = np.array(values, dtype=float)
        shown = shown[shown > 1e-9]
        if len(shown):
            layer = name.removeprefix("spectrum.")
            label = "fused representation" if layer == "fused" else f"AGOP, layer {layer}"
            marker = MARKERS[index % len(MARKERS)]
            colour = series_colour(index + 1)
            ax.plot(np.arange(1, len(shown) + 1), shown, label=label, color=colour, marker=marker, markersize=3)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # powers as mathematics are no text in an SVG
    ax.set_xlabel("position")
    ax.set_ylabel("share of the sum")
    ax.legend(loc="upper right")


def _reliance(d: DiagnosisData, ax: Axes) -> None:
    """Alone, without and only, per modality, with the scores of all and of chance."""
    kinds = {
        "alone": "alone", "without": "without it", "only": "only it", "shuffled": "shuffled",
        "retrained_without": "retrained without",
    }  # fmt: skip
    found = {label: _measures(d, key) for key, label in kinds.items()}
    _bars(ax, list(d.modalities), {label: values for label, values in found.items() if any(values)})
    for label, line in (("all", "--"), ("chance", ":")):
        value = d.value(f"score.{label}")
        if value is not None:
            ax.axhline(value, color=INK, linestyle=line, linewidth=1.2)
            ax.annotate(label, (1.0, value), xycoords=("axes fraction", "data"), fontsize=9, va="bottom", ha="right")
    ax.set_ylabel(str(d.metric))
    if d.metric in BOUNDED:
        ax.set_ylim(0, 1.05)


def _shapley(d: DiagnosisData, ax: Axes) -> None:
    """Exact Shapley values: they add up to what all modalities gain over none."""
    _bars(ax, list(d.modalities), {"Shapley value": _measures(d, "shapley")})
    ax.axhline(0, color=INK, linewidth=0.8)
    ax.set_ylabel(f"{d.metric} contributed")


def _subsets(d: DiagnosisData, ax: Axes) -> None:
    """Accuracy of every set of present modalities, the worst first, with its calibration error; at most the 16 worst and all."""
    rows = d.arrays["subsets"]
    rows = rows if len(rows) <= 16 else [*rows[:15], max(rows, key=lambda row: len(row["present"]))]
    at = np.arange(len(rows))
    ax.barh(at, [row["accuracy"] for row in rows], 0.6, color=series_colour(1), label="accuracy")
    ax.plot([row["ece"] for row in rows], at, "o", color=series_colour(3), markersize=5, label="ECE")
    ax.set_yticks(
        at, [" + ".join(row["present"]) if len(row["present"]) < len(d.modalities) else "all" for row in rows]
    )
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", visible=True)
    ax.set_xlim(0, 1)
    ax.invert_yaxis()
    _legend(ax, -0.1, 2)


def _neurons(d: DiagnosisData, ax: Axes) -> None:
    """Every neuron's modality shares, neurons sorted by their largest modality and its share."""
    shares = np.array(d.arrays["neuron_shares"], dtype=float)
    shares = shares[shares.sum(1) > 0]
    largest, first = shares.max(1), shares.argmax(1)
    # The last modality's neurons rise, so that two modalities make one falling curve.
    order = np.lexsort((np.where(first == shares.shape[1] - 1, largest, -largest), first))
    shares = shares[order] if len(shares) else np.zeros((1, len(d.modalities)))
    edges = np.repeat(np.arange(len(shares) + 1), 2)[1:-1]
    tops = np.repeat(np.concatenate([np.zeros((len(shares), 1)), shares.cumsum(1)], 1), 2, axis=0)
    for i, name in enumerate(d.modalities):
        ax.fill_between(
            edges, tops[:, i], tops[:, i + 1], color=series_colour(i + 1), label=in_legend(name), linewidth=0
        )
    ax.set_xlim(0, len(shares))
    ax.set_ylim(0, 1)
    ax.set_xlabel("neurons, sorted")
    ax.set_ylabel("share")
    _legend(ax, -0.18, len(d.modalities))


def _responses(d: DiagnosisData, ax: Axes) -> None:
    """Activation of the most and the least entangled neuron against the signal it reads and the noise of another modality."""
    for response, line in zip(d.arrays["responses"], ("-", "--"), strict=True):
        for colour, (key, kind) in enumerate((("predictive", "signal"), ("noisy", "noise")), start=1):
            values = np.array(response[key], dtype=float)  # null becomes NaN, which leaves a gap
            label = f"{response['neuron']}: {kind} of {response[f'{kind} of']}"
            peak = np.nanmax(np.abs(values)) or 1.0
            ax.plot(
                response["centres"],
                values / peak,
                line,
                label=in_legend(label),
                color=series_colour(colour),
                linewidth=1.8,
            )
    ax.set_xlabel("feature, in standard deviations")
    ax.set_ylabel("mean activation / peak")
    _legend(ax, -0.18, 2)


def _similarity(d: DiagnosisData, ax: Axes) -> None:
    """Linear CKA of the fused representation with the features of each modality."""
    _bars(ax, list(d.modalities), {"CKA": _measures(d, "cka")})
    ax.set_ylabel("linear CKA")
    ax.set_ylim(0, 1)


def _ranks(d: DiagnosisData, ax: Axes) -> None:
    """Effective and stable rank of each layer's AGOP and of the fused representation."""
    found = [k.removesuffix(".effective_rank") for k in d.measures if k.endswith(".effective_rank")]
    series = {
        f"{kind} rank": [d.measures.get(f"{name}.{kind}_rank") for name in found] for kind in ("effective", "stable")
    }
    _bars(ax, [name.replace("agop.", "AGOP ") for name in found], series)
    ax.set_ylabel("rank")


def _listed(d: DiagnosisData, *prefixes: str) -> str:
    names = [f"{prefix}.{name}" for name in d.modalities for prefix in prefixes]
    return "; ".join(f"{name} {d.measures[name]}" for name in names if name in d.measures)


def _energies(d: DiagnosisData) -> str:
    names, energies = list(d.modalities), d.arrays["block_energies"]
    pairs = [(i, j) for i in range(len(names)) for j in range(i, len(names))]
    return "; ".join(f"{names[i]}, {names[j]} {energies[i][j]:.3f}" for i, j in pairs)


def _overlaps(d: DiagnosisData) -> str:
    found = [(r["neuron"], r["overlap"]) for r in d.arrays["responses"]]
    return "; ".join(f"neuron {k}" + ("" if o is None else f": overlap of active ranges {o:.2f}") for k, o in found)


PLOTS = {
    "use_shares": Plot("Use share of each modality", _use_shares, lambda d: _listed(d, "use_share")),
    "blocks": Plot("Blocks of the whitened AGOP", _blocks, _energies),
    "spectra": Plot("Spectra", _spectra, lambda d: "leading values of each spectrum"),
    "ranks": Plot("Ranks", _ranks, lambda d: "; ".join(f"{k} {m}" for k, m in d.measures.items() if "_rank" in k)),
    "reliance": Plot(
        "Reliance on each modality",
        _reliance,
        lambda d: f"all {d['score.all']}, chance {d['score.chance']}; {_listed(d, 'alone', 'without', 'only')}",
        "score.all",
    ),
    "shapley": Plot("Shapley value of each modality", _shapley, lambda d: _listed(d, "shapley"), "score.all"),
    "subsets": Plot(
        "Sets of present modalities, worst first",
        _subsets,
        lambda d: "; ".join(
            f"{' + '.join(r['present'])} {r['accuracy']:.3f}, ECE {r['ece']:.3f}" for r in d.arrays["subsets"]
        ),
        "subsets",
    ),
    "neurons": Plot(
        "Neurons by modality share", _neurons, lambda d: f"{len(d.arrays['neuron_shares'])} units", "neuron_shares"
    ),
    "responses": Plot("Most and least entangled neuron", _responses, _overlaps, "responses"),
    "similarity": Plot("Likeness of the fused representation", _similarity, lambda d: _listed(d, "cka")),
}


def _measures(d: DiagnosisData, prefix: str) -> list[Measure | None]:
    return [d.measures.get(f"{prefix}.{name}") for name in d.modalities]


def _bars(ax: Axes, groups: Sequence[str], series: dict[str, list[Measure | None]]) -> None:
    values = {label: [np.nan if m is None or m.value is None else m.value for m in ms] for label, ms in series.items()}
    errors = {label: [_spread(m) for m in ms] for label, ms in series.items()}
    slanted = draw_bars(ax, groups, values, errors, {label: i for i, label in enumerate(series, start=1)})
    if len(series) > 1:
        _legend(ax, -0.28 if slanted else -0.14, len(series))


def _spread(m: Measure | None) -> Spread:
    if m is None or m.value is None or m.low is None or m.high is None:
        return None
    return max(0.0, m.value - m.low), max(0.0, m.high - m.value)


def _legend(ax: Axes, below: float, entries: int) -> None:
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, below), ncols=min(4, entries))
