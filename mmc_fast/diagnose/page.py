"""The page of a diagnosis: one section per question, each with what it means and what it cannot show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from . import plot as plots
from .document import Block, Callout, Details, Facts, Panels, Report, Section, Table, Text, signed
from .figures import STYLE, Drawing
from .result import Diagnosis, Measure
from .verdict import overall

__all__ = ["build_page"]

Plot = Callable[[Diagnosis, Axes | None], Axes]


def build_page(d: Diagnosis, other: Diagnosis | None = None) -> Report:
    """The report of ``d``; with ``other`` a section that sets the two side by side."""
    report = Report(
        "Diagnosis of modality use",
        f"{d.samples:,} samples, {len(d.modalities)} modalities ("
        + ", ".join(f"{name} {width}" for name, width in d.modalities.items())
        + "). All sentences are chosen by the numbers.",
        f"mmc-fast {d.version}. This page is self-contained and loads nothing.",
    )
    report.add_section(_verdict(d))
    if other is not None:
        report.add_section(_comparison(d, other))
    report.add_section(_use(d))
    if "score.all" in d.measures:
        report.add_section(_reliance(d))
    report.add_section(_neurons(d))
    report.add_section(_representation(d))
    return report.add_section(_numbers(d))


def _verdict(d: Diagnosis) -> Section:
    kind = "finding" if any(v.kind in ("collapsed", "ignored") for v in d.verdicts) else "note"
    words = overall(d.verdicts, d.value("neuron_entropy"), d.settings["thresholds"])
    blocks: list[Block] = [
        Callout(words, kind),  # type: ignore[arg-type]
        Text("\n\n".join(v.sentence(d.metric) for v in d.verdicts)),
    ]
    if d.notes:
        blocks.append(Details("What could not be measured, and why", [Text("\n\n".join(d.notes))]))
    return Section("Verdict", blocks)


def _use(d: Diagnosis) -> Section:
    return Section(
        "What the head responds to",
        [
            Panels(
                [_figure(d, plots.plot_use_shares, _listed(d, "use_share")), _figure(d, plots.plot_blocks, _blocks(d))]
            ),
            Text(
                "**Meaning.** The use share is how much of the change of the outputs comes from each modality when it moves as "
                "it does in these data. It does not depend on units or on rotations inside of a modality. Blocks off the "
                f"diagonal say that the same response directions read two modalities: entanglement {d['entanglement']}.\n\n"
                "**Cannot show.** It is the local response, not the benefit: noise that moves the outputs counts as use, and a "
                "saturated head seems to use little."
            ),
            Panels(
                [
                    _figure(d, plots.plot_spectra, "Leading values of each spectrum."),
                    _figure(d, plots.plot_ranks, _ranks(d)),
                ]
            ),
            Text(
                "**Meaning.** A spectrum that falls fast, and a low rank, say that the head reads few directions, which different "
                "modalities then have to share.\n\n**Cannot show.** Ranks depend on widths; compare models of one architecture. "
                f"The numerical rank counts values above {d.settings['tolerance']:g} of the largest."
            ),
        ],
    )


def _reliance(d: Diagnosis) -> Section:
    return Section(
        "What the model loses without a modality",
        [
            Panels(
                [_figure(d, plots.plot_reliance, _scores(d)), _figure(d, plots.plot_shapley, _listed(d, "shapley"))]
            ),
            Text(
                "**Meaning.** Alone: a small network trained on this modality's features. Without it, only it: the fused model "
                "with features replaced by their mean. Collapse is signal alone, no loss without it, and little kept when it is "
                "all there is. Shapley values share the gain over chance among the modalities and add up to it.\n\n"
                "**Cannot show.** The mean is a place where the model may never have been, so a low score with only one modality "
                "is partly surprise; a network retrained without the modality, or a model trained with modality dropout, "
                "separates the two."
            ),
        ],
    )


def _neurons(d: Diagnosis) -> Section:
    blocks: list[Block] = []
    if "neuron_shares" in d.arrays:
        entropy = f"; mean entropy {d['neuron_entropy']} of 1" if "neuron_entropy" in d.measures else ""
        count = len(d.arrays["neuron_shares"])
        blocks.append(_figure(d, plots.plot_neurons, f"{count} units of the fusion, by modality{entropy}."))
        blocks.append(
            Text(
                "**Meaning.** Each column is a neuron of the fusion; colours are the variance that each modality brings to it. "
                "Pure columns are monosemantic, mixed ones read several modalities.\n\n**Cannot show.** Reading two modalities is "
                "what fusion is for: mixing harms only where noise of one meets the signal of another."
            )
        )
    if "responses" in d.arrays:
        words = "; ".join(
            f"neuron {r['neuron']}: overlap {r['overlap']:.2f}" if r["overlap"] is not None else f"neuron {r['neuron']}"
            for r in d.arrays["responses"]
        )
        blocks.append(_figure(d, plots.plot_responses, f"Ranges in which the neuron is active: {words}."))
        blocks.append(
            Text(
                "**Meaning.** A neuron that answers to the signal of one modality and to the noise of another is entangled: noise "
                "it cannot shut out without losing the signal. The share of neurons' variance that is noise of another modality "
                f"is {d['foreign_noise']}.\n\n**Cannot show.** Signal here is what class means hold; the rest counts as noise."
            )
        )
    rows = [
        ["degree of polysemanticity γ", str(d.measures.get("polysemanticity_degree", Measure(None)))],
        ["neurons with entropy above one half", str(d.measures.get("mixed_neurons", Measure(None)))],
        ["mean entropy of activation × gradient", str(d.measures.get("attribution_entropy", Measure(None)))],
        ["mean capacity of a feature", str(d.measures.get("feature_capacity", Measure(None)))],
        ["mean capacity of a neuron", str(d.measures.get("neuron_overlap", Measure(None)))],
        ["collision fraction, exact", str(d["collision_exact"])],
        ["collision bound", str(d["collision_bound"])],
        ["weight classifier, cross-entropy", str(d.measures.get("weight_classifier.cross_entropy", Measure(None)))],
        ["weight classifier, entropy", str(d.measures.get("weight_classifier.entropy", Measure(None)))],
    ]
    caption = (
        f"γ counts the principal directions with 90 % of each modality's variance that have at least {d.settings['tau']:g} of their "
        "length in the weights, over "
        f"the dimensions that hold {d.settings['energy']:.0%} of the weights' energy. The collision numbers follow from widths alone."
    )
    blocks.append(Table(["measure", "value"], rows, caption))
    return Section("Which neurons mix modalities", blocks)


def _representation(d: Diagnosis) -> Section:
    text = (
        "**Meaning.** A fused representation that is like one modality only has taken over that one. The mean variance inflation "
        f"factor is {d['fused.vif']}: 1 where no column can be predicted from the others.\n\n**Cannot show.** CKA sees linear "
        "geometry and is dominated by directions of large variance."
    )
    if "fresh_discriminator.balanced_accuracy" in d.measures:
        text += (
            "\n\nA discriminator trained afresh names the modality of a latent with balanced accuracy "
            f"{d['fresh_discriminator.balanced_accuracy']} (chance {d['fresh_discriminator.chance']})."
        )
    second = {name: m for name, m in d.measures.items() if name.startswith(("prefix_gap", "denoising_r2"))}
    if second:
        text += (
            "\n\nAgainst a second model: "
            + ", ".join(f"{name} {m}" for name, m in second.items())
            + ". A positive prefix gap says that fusion starved an encoder; an R² near 1 that the teacher's noise is a transform of "
            "the student's."
        )
    return Section("The fused representation", [_figure(d, plots.plot_similarity, _listed(d, "cka")), Text(text)])


def _comparison(d: Diagnosis, other: Diagnosis) -> Section:
    compared = d.compare(other)
    rows = []
    for name, (a, b, gap) in compared.rows.items():
        marked = gap.low is not None and gap.high is not None and (gap.low > 0 or gap.high < 0)
        value = signed(gap.value or 0.0)
        rows.append([f"`{name}`", str(a), str(b), f"**{value}**" if marked else value])
    changed = [f"{name}: {a} here, {b} there." for name, (a, b) in compared.changed_verdicts.items()]
    return Section(
        "Compared with the other diagnosis",
        [
            Text("**Changed verdicts.** " + (" ".join(changed) or "None.")),
            Details(
                "All measures side by side",
                [
                    Table(
                        ["measure", "this", "other", "difference"],
                        rows,
                        "Bold: the interval of the difference, taking the two as independent, excludes 0.",
                    )
                ],
            ),
        ],
    )


def _numbers(d: Diagnosis) -> Section:
    rows = [[f"`{name}`", *_cells(m)] for name, m in d.measures.items()]
    settings = {
        k: ", ".join(f"{a} {b:g}" for a, b in v.items()) if isinstance(v, Mapping) else str(v)
        for k, v in d.settings.items()
    }
    level = f"{d.settings['level']:.0%}"
    caption = (
        f"Intervals: {level}, bootstrap over {d.settings['groups']} random groups of samples, for this one model. A dash: not "
        "defined, or fixed by the weights."
    )
    table = Table(["measure", "value", "s.e.", "low", "high"], rows, caption)
    return Section("All numbers and settings", [Facts(settings), Details("All measures", [table])])


def _cells(m: Measure) -> list[str]:
    return ["–" if v is None else f"{v:.4g}" for v in (m.value, m.error, m.low, m.high)]


def _figure(d: Diagnosis, plot: Plot, alt: str) -> Any:
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(5.4, 3.9), layout="constrained")
        axes = plot(d, canvas.add_subplot())
    return Drawing(canvas, f"{axes.get_title('left') or axes.get_title()}: {alt}").figure()


def _listed(d: Diagnosis, prefix: str) -> str:
    return "; ".join(f"{name} {d.measures.get(f'{prefix}.{name}', Measure(None))}" for name in d.modalities)


def _blocks(d: Diagnosis) -> str:
    energies = d.arrays["block_energies"]
    names = list(d.modalities)
    return "; ".join(
        f"{a}, {b} {energies[i][j]:.3f}" for i, a in enumerate(names) for j, b in enumerate(names) if i <= j
    )


def _ranks(d: Diagnosis) -> str:
    return "; ".join(f"{name} {m}" for name, m in d.measures.items() if name.endswith("_rank"))


def _scores(d: Diagnosis) -> str:
    parts = [f"all {d['score.all']}, chance {d['score.chance']}"]
    for name in d.modalities:
        found = [
            f"{kind} {d.measures[f'{kind}.{name}']}"
            for kind in ("alone", "without", "only")
            if f"{kind}.{name}" in d.measures
        ]
        parts.append(f"{name}: {', '.join(found)}")
    return "; ".join(parts)
