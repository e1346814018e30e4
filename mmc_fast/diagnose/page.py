"""The page of a diagnosis: the verdicts, one section per question with what its pictures mean and cannot show, all numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

from .document import Block, Callout, Details, Facts, Panels, Report, Section, Table, Text, signed
from .figures import Drawing
from .plot import PLOTS, plot
from .result import DiagnosisData, Measure
from .verdict import overall

__all__ = ["build_page"]

SECTIONS = {
    "What the head responds to": ("use_shares", "blocks", "spectra", "ranks"),
    "What the model loses without a modality": ("reliance", "shapley"),
    "Which neurons mix modalities": ("neurons", "responses"),
    "The fused representation": ("similarity",),
}
READING = {
    "use_shares": (
        "The use share is how much of the change of the outputs comes from each modality when it moves as it does in these data. "
        "It does not depend on units or on rotations inside of a modality. Blocks off the diagonal say that the same response "
        "directions read two modalities: entanglement {entanglement}.",
        "It is the local response, not the benefit: noise that moves the outputs counts as use, and a saturated head seems to use "
        "little.",
    ),
    "spectra": (
        "A spectrum that falls fast, and a low rank, say that the head reads few directions, which different modalities then have "
        "to share.",
        "Ranks depend on widths; compare models of one architecture.",
    ),
    "reliance": (
        "Alone: a small network trained on this modality's features. Without it, only it: the fused model with features replaced "
        "by their mean. Collapse is signal alone, no loss without it, and little kept when it is all there is. Shapley values share "
        "the gain over chance among the modalities and add up to it.",
        "The mean is a place where the model may never have been, so a low score with only one modality is partly surprise; a "
        "network retrained without the modality, or a model trained with modality dropout, separates the two.",
    ),
    "neurons": (
        "Each column is a neuron of the fusion; colours are the variance that each modality brings to it. Pure columns are "
        "monosemantic, mixed ones read several modalities: mean entropy {neuron_entropy}, degree of polysemanticity "
        "{polysemanticity_degree}, mean entropy of activation × gradient {attribution_entropy}.",
        "Reading two modalities is what fusion is for: mixing harms only where noise of one meets the signal of another.",
    ),
    "responses": (
        "A neuron that answers to the signal of one modality and to the noise of another is entangled: noise it cannot shut out "
        "without losing the signal. The share of neurons' variance that is noise of another modality is {foreign_noise}.",
        "Signal here is what class means hold; the rest counts as noise.",
    ),
    "similarity": (
        "A fused representation that is like one modality only has taken over that one. The mean variance inflation factor is "
        "{fused.vif}: 1 where no column can be predicted from the others.",
        "CKA sees linear geometry and is dominated by directions of large variance.",
    ),
}
"""Kind of a picture -> what it, and those after it, means and cannot show; names of measures in braces."""


def build_page(d: DiagnosisData, other: DiagnosisData | None = None) -> Report:
    """The report of ``d``; with ``other`` a section that sets the two side by side."""
    sizes = ", ".join(f"{name} {width}" for name, width in d.modalities.items())
    report = Report(
        "Diagnosis of modality use",
        f"{d.samples:,} samples, {len(d.modalities)} modalities ({sizes}). All sentences are chosen by the numbers.",
        f"mmc-fast {d.version}. This page is self-contained and loads nothing.",
    )
    report.add_section(_verdict(d))
    if other is not None:
        report.add_section(_comparison(d, other))
    for title, kinds in SECTIONS.items():
        blocks = _pictures(d, kinds)
        if blocks:
            report.add_section(Section(title, blocks))
    return report.add_section(_numbers(d))


def _verdict(d: DiagnosisData) -> Section:
    found = overall(d.verdicts, d.value("neuron_entropy"), d.settings["thresholds"])
    lost = any(v.kind in ("collapsed", "ignored") for v in d.verdicts)
    sentences = [v.sentence(d.metric) for v in d.verdicts]
    if "modality_probe.balanced_accuracy" in d.measures:
        sentences.append(
            "A post-hoc modality probe names the modality of a latent with balanced accuracy "
            f"{d['modality_probe.balanced_accuracy']} (chance {d['modality_probe.chance']})."
        )
    second = [f"{name} {m}" for name, m in d.measures.items() if name.startswith(("prefix_gap", "denoising_r2"))]
    if second:
        sentences.append(
            f"Against a second model: {', '.join(second)}. A positive prefix gap says that fusion starved an encoder; an R² near "
            "1 that the teacher's noise is a transform of the student's."
        )
    blocks: list[Block] = [Callout(found, "finding" if lost else "note"), Text("\n\n".join(sentences))]
    if d.notes:
        blocks.append(Details("What could not be measured, and why", [Text("\n\n".join(d.notes))]))
    return Section("Verdict", blocks)


def _pictures(d: DiagnosisData, kinds: tuple[str, ...]) -> list[Block]:
    """The pictures that this diagnosis has, in pairs, each pair with its reading."""
    blocks: list[Block] = []
    shown = [kind for kind in kinds if PLOTS[kind].shows(d)]
    for kind in [k for k in shown if k in READING]:
        group = [kind, *(k for k in shown[shown.index(kind) + 1 :][:1] if k not in READING)]
        drawings = [Drawing(cast(Any, plot(d, k).figure), f"{PLOTS[k].title}: {PLOTS[k].numbers(d)}") for k in group]
        meaning, limits = (_with_measures(d, text) for text in READING[kind])
        reading = Text(f"**Meaning.** {meaning}\n\n**Cannot show.** {limits}")
        blocks += [Panels([drawing.figure() for drawing in drawings]), reading]
    return blocks


def _with_measures(d: DiagnosisData, text: str) -> str:
    return re.sub(r"\{([\w.]+)\}", lambda name: str(d.measures.get(name[1], "not measured")), text)


def _comparison(d: DiagnosisData, other: DiagnosisData) -> Section:
    compared = d.compare(other)
    rows = []
    for name, (a, b, gap) in compared.rows.items():
        marked = gap.low is not None and gap.high is not None and (gap.low > 0 or gap.high < 0)
        value = signed(gap.value or 0.0)
        rows.append([f"`{name}`", str(a), str(b), f"**{value}**" if marked else value])
    changed = [f"{name}: {a} here, {b} there." for name, (a, b) in compared.changed_verdicts.items()]
    caption = "Bold: the interval of the difference, taking the two as independent, excludes 0."
    blocks: list[Block] = [
        Text("**Changed verdicts.** " + (" ".join(changed) or "None.")),
        Details("All measures side by side", [Table(["measure", "this", "other", "difference"], rows, caption)]),
    ]
    return Section("Compared with the other diagnosis", blocks)


def _numbers(d: DiagnosisData) -> Section:
    def cells(m: Measure) -> list[str]:
        return ["–" if v is None else f"{v:.4g}" for v in (m.value, m.error, m.low, m.high)]

    rows = [[f"`{name}`", *cells(m)] for name, m in d.measures.items()]
    settings = {
        k: ", ".join(f"{a} {b:g}" for a, b in v.items()) if isinstance(v, Mapping) else str(v)
        for k, v in d.settings.items()
    }
    caption = (
        f"Intervals: {d.settings['level']:.0%}, bootstrap over {d.settings['groups']} random groups of samples, for this one "
        "model. A dash: not defined, or fixed by the weights."
    )
    table = Table(["measure", "value", "s.e.", "low", "high"], rows, caption)
    return Section("All numbers and settings", [Facts(settings), Details("All measures", [table])])
