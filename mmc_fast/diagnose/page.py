"""The page of a diagnosis: a table of the modalities, and folded behind it one part per question and all numbers."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

from .document import Block, Cell, Details, Downloads, Facts, Panels, Report, Section, Table, Text, literal, signed
from .figures import Drawing
from .plot import PLOTS, plot
from .result import DiagnosisData, Measure
from .verdict import ModalityVerdict, overall

PLAIN = {
    "relied on": "with that of other samples the score is {shuffled:.3g} instead of {all:.3g}",
    "under-used": "alone it reaches {able:.3g}, and the model takes little of it",
    "collapsed": "alone it reaches {able:.3g}, and the model does not use it",
    "uninformative": "it carries nothing here and is not used",
    "misleading": "it carries nothing, yet it moves the outputs",
    "undecided": "these numbers do not tell",
}
READING_TABLE = (
    "Bars run from chance (0) to what the model reaches with all modalities (100 %).\n\n"
    "**Ability**: how far this modality gets alone, by networks trained on it or by the model itself, whichever is better. A lower "
    "bound where the networks saw only features of an encoder that never learned.\n\n"
    "**Use**: its Shapley value, that is its share of what the model gains over chance over all sets of modalities, those of other "
    "samples in place of what is absent.\n\n"
    "**Need**: what networks trained without it lose (measured with `control=True`).\n\n"
    "**Robustness**: how much of its ability the model keeps when it is all there is, the others taken away {absence}; a property "
    "of the model, no collapse.\n\n"
    "The verdict compares use with ability. Alignment: how far the modality moves the outputs the way that it would answer alone (−1 "
    "to 1; near 0 the model learned nothing from it); it decides where the score is too noisy. Redundant modalities share their use, so that each can have little of it."
)
SECTIONS = {
    "What the model loses without a modality": ("reliance", "shapley", "subsets"),
    "What the head responds to": ("use_shares", "blocks", "spectra", "ranks"),
    "Which neurons mix modalities": ("neurons", "responses"),
    "The fused representation": ("similarity",),
}
READING = {
    "reliance": (
        "Alone: a small network trained on this modality. Without it, only it: the fused model with the others, or this one, taken "
        "away ({absence}). Shuffled: with the modality of other samples, so that nothing is out of range. Shapley values share the "
        "gain over chance among the modalities and add up to it.",
        "Taking away by the mean, or by other samples, shows the model what it may never have met, so a low score with one modality "
        "is partly surprise; a network retrained without it, or a mask of the model's own, separates the two.",
    ),
    "subsets": (
        "Every set of modalities that can be present, the worst first, with its calibration error (ECE): a model that is wrong and "
        "sure of it when a modality is gone fails silently.",
        "On the sampled rows; ECE is biased upwards by about √(15 / rows).",
    ),
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


MORE = (
    (
        {
            "silent failures": "silent_failures", "share of outputs": "output_share", "utilisation": "utilisation",
            "rank without": "remaining.rank", "η² without": "remaining.eta2",
        },
        "Silent failures: right with all modalities, and wrong with 90 % confidence once this one is gone. Share of outputs: Shapley "
        "share of what the outputs change, useful or not. Utilisation: accuracy that a head refitted on frozen features loses without "
        "it. Rank and η²: effective rank of the fused representation, and its variance between classes, without the modality.",
    ),
    (
        {
            "redundancy": "pid.redundancy", "unique": "pid.unique", "unique rest": "pid.unique_rest", "synergy": "pid.synergy",
            "distillation": "distillation",
        },
        "Information about the class in nats, of this modality and of the rest, by Gaussians (linear relations only). Distillation: "
        "I(T; S) − I(S; Y) with this modality as student of its best teacher; below 0 distillation is not expected to help.",
    ),
)  # fmt: skip
"""Tables of measures by modality: column -> measure, and what the columns mean."""


def build_page(d: DiagnosisData, other: DiagnosisData | None = None) -> Report:
    """The report of ``d``; with ``other`` a section that sets the two side by side."""
    report = Report(
        "Diagnosis of modality use",
        top_line(d),
        f"mmc-fast {d.version}. This page is self-contained and loads nothing. All sentences are chosen by the numbers.",
    )
    report.add_section(_modalities(d))
    if other is not None:
        report.add_section(_comparison(d, other))
    return report.add_section(Section("Behind the table", _details(d)))


def top_line(d: DiagnosisData) -> str:
    """What was diagnosed, in one line, and what was found, in one or two sentences."""
    scored = f", {d.metric} {d['score.all']} (chance {d['score.chance']})" if "score.all" in d.measures else ""
    found = overall(d.verdicts, d.value("neuron_entropy"), d.settings["thresholds"])
    return f"**{literal(found)}**\n\n{d.n_samples:,} samples, {len(d.modalities)} modalities{scored}."


def overview(d: DiagnosisData) -> Table:
    """The first screen: one row per modality with bars and the verdict in one plain sentence."""
    columns = {title: partial(_gain, d, title) for title in ("ability", "use", "need", "robustness")}
    if "score.all" not in d.measures:
        shares = {"use share": "use_share", "share of outputs": "output_share"}
        columns = {title: partial(_share, d, kind) for title, kind in shares.items() if _any(d, kind)}
    verdicts = {v.modality: v for v in d.verdicts}
    rows: list[list[Cell | str]] = [
        [name, *(cell(name) for cell in columns.values()), _sentence(verdicts[name])] for name in d.modalities
    ]
    return Table(["modality", *columns, "verdict"], rows, cards=True)


def measures_csv(d: DiagnosisData) -> str:
    """All measures as CSV: measure, value, error, low, high."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["measure", "value", "error", "low", "high"])
    writer.writerows([name, m.value, m.error, m.low, m.high] for name, m in d.measures.items())
    return text.getvalue()


def _modalities(d: DiagnosisData) -> Section:
    reading = Details("How to read this table", [Text(_with_measures(d, READING_TABLE))])
    return Section("Modalities", [overview(d), reading, Downloads({"measures.csv": measures_csv(d)})])


def _sentence(verdict: ModalityVerdict) -> Cell:
    e = verdict.evidence
    notes = []
    if "index" in e:
        interval = f" [{e['index_low']:.2f}, {e['index_high']:.2f}]" if "index_low" in e else ""
        notes.append(f"use over ability {e['index']:.2f}{interval}".replace("-", "−"))
    if "alignment" in e and "index" in e:
        notes.append(f"alignment {e['alignment']:.2f}".replace("-", "−"))
    if e.get("agreement", 1.0) < 0.95:
        notes.append(f"the same verdict in {e['agreement']:.0%} of resamples")
    accused = verdict.kind in ("collapsed", "misleading")
    able = max(e.get(key, -math.inf) for key in ("alone", "only"))
    return Cell(
        f"**{verdict.kind}**: {PLAIN[verdict.kind].format(**e, able=able)}", accused, "; ".join(notes), markup=True
    )


def _gain(d: DiagnosisData, title: str, name: str) -> Cell:
    """A cell of the overview in parts of what the model gains over chance."""
    span, chance = (d.value("score.all") or 0.0) - (d.value("score.chance") or 0.0), d.value("score.chance") or 0.0
    alone, only, note = d.value(f"alone.{name}"), d.value(f"only.{name}"), ""
    able = max((s for s in (alone, only) if s is not None), default=None)
    value: float | None = None
    if title == "ability" and able is not None:
        value, note = able - chance, f"score {able:.3g}"
    elif title == "use":
        value = d.value(f"resampled_shapley.{name}")
    elif title == "need":
        value = d.value(f"need.{name}")
        without = d.value(f"retrained_without.{name}")
        note = "" if without is None else f"retrained {without:.3g}"
    elif title == "robustness" and only is not None and able is not None and able > chance:
        value, span = only - chance, able - chance
        note = f"only it {only:.3g}"
    if value is None or not span > 0:
        return Cell("–")
    return Cell(f"{value / span:.0%}".replace("-0%", "0%").replace("-", "−"), note=note, bar=value / span)


def _share(d: DiagnosisData, kind: str, name: str) -> Cell:
    m = d.measures.get(f"{kind}.{name}", Measure(None))
    return (
        Cell("–")
        if m.value is None
        else Cell(f"{m.value:.0%}", note="" if m.low is None else f"{m.low:.2f} to {m.high:.2f}", bar=m.value)
    )


def _any(d: DiagnosisData, kind: str) -> bool:
    return any(f"{kind}.{name}" in d.measures for name in d.modalities)


def _details(d: DiagnosisData) -> list[Block]:
    blocks: list[Block] = []
    for title, kinds in SECTIONS.items():
        pictures = _pictures(d, kinds)
        if pictures:
            blocks.append(Details(title, pictures))
    more = _more(d)
    if more:
        blocks.append(Details("Further questions", more))
    if d.notes:
        blocks.append(Details("What could not be measured, and why", [Text(literal("\n\n".join(d.notes)))]))
    return [*blocks, *_numbers(d)]


def _more(d: DiagnosisData) -> list[Block]:
    """Single numbers that have no picture, in words."""
    blocks: list[Block] = []
    if "modality_probe.balanced_accuracy" in d.measures:
        blocks.append(
            Text(
                "A post-hoc modality probe names the modality of a latent with balanced accuracy "
                f"{d['modality_probe.balanced_accuracy']} (chance {d['modality_probe.chance']})."
            )
        )
    second = [
        f"{literal(name)} {m}" for name, m in d.measures.items() if name.startswith(("prefix_gap", "denoising_r2"))
    ]
    if second:
        blocks.append(
            Text(
                f"Against a second model: {', '.join(second)}. A positive prefix gap says that fusion starved an encoder; an R² "
                "near 1 that the teacher's noise is a transform of the student's."
            )
        )
    for titles, caption in MORE:
        shown = {title: key for title, key in titles.items() if _any(d, key)}
        if shown:
            rows = [[n, *(str(d.measures.get(f"{key}.{n}", "–")) for key in shown.values())] for n in d.modalities]
            blocks.append(Table(["modality", *shown], rows, caption, cards=True))
    if "emap.score" in d.measures:
        blocks.append(
            Text(
                f"Without interactions between modalities the model would score {d['emap.score']}, and it scores "
                f"{d['emap.all']} on these {d.settings.get('emap_rows')} samples (EMAP): interactions add {d['emap.interaction']}."
            )
        )
    return blocks


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
    known = {
        "absence": {"model": "by the model's own mask", "resample": "by other samples"}.get(
            str(d.settings.get("absence")), "by the mean"
        )
    }
    return re.sub(
        r"\{([\w.]+)\}", lambda name: str(known.get(name[1]) or d.measures.get(name[1], "not measured")), text
    )


def _comparison(d: DiagnosisData, other: DiagnosisData) -> Section:
    compared = d.compare(other)
    rows: list[list[Cell | str]] = []
    for name, (a, b, gap) in compared.rows.items():
        marked = gap.low is not None and gap.high is not None and (gap.low > 0 or gap.high < 0)
        value = signed(gap.value or 0.0)
        rows.append([Cell(name, code=True), str(a), str(b), Cell(value, strong=marked)])
    changed = [f"{literal(name)}: {a} here, {b} there." for name, (a, b) in compared.changed_verdicts.items()]
    caption = "Bold: the interval of the difference, taking the two as independent, excludes 0."
    blocks: list[Block] = [
        Text("**Changed verdicts.** " + (" ".join(changed) or "None.")),
        Details("All measures side by side", [Table(["measure", "this", "other", "difference"], rows, caption)]),
    ]
    return Section("Compared with the other diagnosis", blocks)


def _numbers(d: DiagnosisData) -> list[Block]:
    def cells(m: Measure) -> list[str]:
        return ["–" if v is None else f"{v:.4g}" for v in (m.value, m.error, m.low, m.high)]

    rows: list[list[Cell | str]] = [[Cell(name, code=True), *cells(m)] for name, m in d.measures.items()]
    settings = {
        k: ", ".join(f"{a} {b:g}" for a, b in v.items()) if isinstance(v, Mapping) else str(v)
        for k, v in d.settings.items()
    }
    caption = (
        f"Intervals: {d.settings['level']:.0%}, bootstrap over {d.settings['groups']} random groups of samples, for this one "
        "model. A dash: not defined, or fixed by the weights."
    )
    sizes = {"modalities": ", ".join(f"{name} {width}" for name, width in d.modalities.items())}
    return [
        Details("All numbers", [Table(["measure", "value", "s.e.", "low", "high"], rows, caption)]),
        Details("Settings", [Facts(sizes | settings)]),
    ]
