"""The page of a diagnosis: one section per question, each with what it means and what it cannot show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from .document import Block, Callout, Details, Facts, Figure, Panels, Report, Section, Table, Text, signed
from .figures import Drawing
from .plot import PLOTS, plot
from .result import DiagnosisData, Measure
from .verdict import overall

__all__ = ["build_page"]


def build_page(d: DiagnosisData, other: DiagnosisData | None = None) -> Report:
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


def _verdict(d: DiagnosisData) -> Section:
    found = overall(d.verdicts, d.value("neuron_entropy"), d.settings["thresholds"])
    kind = "finding" if any(v.kind in ("collapsed", "ignored") for v in d.verdicts) else "note"
    blocks: list[Block] = [
        Callout(found, kind),  # type: ignore[arg-type]
        Text("\n\n".join(v.sentence(d.metric) for v in d.verdicts)),
    ]
    if d.notes:
        blocks.append(Details("What could not be measured, and why", [Text("\n\n".join(d.notes))]))
    return Section("Verdict", blocks)


def _use(d: DiagnosisData) -> Section:
    blocks: list[Block] = [
        _panels(d, "use_shares", "blocks"),
        _reading(
            "The use share is how much of the change of the outputs comes from each modality when it moves as it does in "
            "these data. It does not depend on units or on rotations inside of a modality. Blocks off the diagonal say that "
            f"the same response directions read two modalities: entanglement {d['entanglement']}.",
            "It is the local response, not the benefit: noise that moves the outputs counts as use, and a saturated head "
            "seems to use little.",
        ),
        _panels(d, "spectra", "ranks"),
        _reading(
            "A spectrum that falls fast, and a low rank, say that the head reads few directions, which different modalities "
            "then have to share.",
            "Ranks depend on widths; compare models of one architecture. The numerical rank counts values above "
            f"{d.settings['tolerance']:g} of the largest.",
        ),
    ]
    return Section("What the head responds to", blocks)


def _reliance(d: DiagnosisData) -> Section:
    blocks = [
        _panels(d, "reliance", "shapley"),
        _reading(
            "Alone: a small network trained on this modality's features. Without it, only it: the fused model with features "
            "replaced by their mean. Collapse is signal alone, no loss without it, and little kept when it is all there is. "
            "Shapley values share the gain over chance among the modalities and add up to it.",
            "The mean is a place where the model may never have been, so a low score with only one modality is partly "
            "surprise; a network retrained without the modality, or a model trained with modality dropout, separates the two.",
        ),
    ]
    return Section("What the model loses without a modality", blocks)


def _neurons(d: DiagnosisData) -> Section:
    blocks: list[Block] = []
    if "neuron_shares" in d.arrays:
        blocks += [
            _figure(d, "neurons"),
            _reading(
                "Each column is a neuron of the fusion; colours are the variance that each modality brings to it. Pure columns "
                "are monosemantic, mixed ones read several modalities.",
                "Reading two modalities is what fusion is for: mixing harms only where noise of one meets the signal of another.",
            ),
        ]
    if "responses" in d.arrays:
        blocks += [
            _figure(d, "responses"),
            _reading(
                "A neuron that answers to the signal of one modality and to the noise of another is entangled: noise it cannot "
                "shut out without losing the signal. The share of neurons' variance that is noise of another modality is "
                f"{d['foreign_noise']}.",
                "Signal here is what class means hold; the rest counts as noise.",
            ),
        ]
    named = {
        "polysemanticity_degree": "degree of polysemanticity γ",
        "mixed_neurons": "neurons with entropy above one half",
        "attribution_entropy": "mean entropy of activation × gradient",
        "feature_capacity": "mean capacity of a feature",
        "neuron_overlap": "mean capacity of a neuron",
        "collision_exact": "collision fraction, exact",
        "collision_bound": "collision bound",
        "weight_classifier.cross_entropy": "weight classifier, cross-entropy",
        "weight_classifier.entropy": "weight classifier, entropy",
    }
    caption = (
        "γ counts the principal directions with 90 % of each modality's variance that have at least "
        f"{d.settings['tau']:g} of their length in the weights, over the dimensions that hold {d.settings['energy']:.0%} of the "
        "weights' energy. The collision numbers follow from widths alone."
    )
    rows = [[title, str(d.measures.get(name, Measure(None)))] for name, title in named.items()]
    return Section("Which neurons mix modalities", [*blocks, Table(["measure", "value"], rows, caption)])


def _representation(d: DiagnosisData) -> Section:
    reading = _reading(
        "A fused representation that is like one modality only has taken over that one. The mean variance inflation factor is "
        f"{d['fused.vif']}: 1 where no column can be predicted from the others.",
        "CKA sees linear geometry and is dominated by directions of large variance.",
    )
    more = []
    if "modality_probe.balanced_accuracy" in d.measures:
        more.append(
            "A post-hoc modality probe names the modality of a latent with balanced accuracy "
            f"{d['modality_probe.balanced_accuracy']} (chance {d['modality_probe.chance']})."
        )
    second = [f"{name} {m}" for name, m in d.measures.items() if name.startswith(("prefix_gap", "denoising_r2"))]
    if second:
        more.append(
            f"Against a second model: {', '.join(second)}. A positive prefix gap says that fusion starved an encoder; an R² near "
            "1 that the teacher's noise is a transform of the student's."
        )
    return Section("The fused representation", [_figure(d, "similarity"), reading, Text("\n\n".join(more))])


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
    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.4g}"

    rows = [[f"`{name}`", *map(cell, (m.value, m.error, m.low, m.high))] for name, m in d.measures.items()]
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


def _reading(meaning: str, limits: str) -> Text:
    return Text(f"**Meaning.** {meaning}\n\n**Cannot show.** {limits}")


def _panels(d: DiagnosisData, *kinds: str) -> Panels:
    return Panels([_figure(d, kind) for kind in kinds])


def _figure(d: DiagnosisData, kind: str) -> Figure:
    axes = plot(d, kind)
    return Drawing(cast(Any, axes.figure), f"{PLOTS[kind][0]}: {_described(d, kind)}").figure()


def _described(d: DiagnosisData, kind: str) -> str:
    """The numbers of a picture, in words."""
    if kind == "blocks":
        names, energies = list(d.modalities), d.arrays["block_energies"]
        pairs = [(i, j) for i in range(len(names)) for j in range(i, len(names))]
        return "; ".join(f"{names[i]}, {names[j]} {energies[i][j]:.3f}" for i, j in pairs)
    if kind == "ranks":
        return "; ".join(f"{name} {m}" for name, m in d.measures.items() if name.endswith("_rank"))
    if kind == "neurons":
        return f"{len(d.arrays['neuron_shares'])} units; mean entropy {d.measures.get('neuron_entropy', Measure(None))} of 1."
    if kind == "responses":
        overlaps = [(r["neuron"], r["overlap"]) for r in d.arrays["responses"]]
        return "; ".join(f"neuron {k}" + ("" if o is None else f": overlap {o:.2f}") for k, o in overlaps)
    if kind == "reliance":
        return f"all {d['score.all']}, chance {d['score.chance']}; " + _listed(d, ("alone", "without", "only"))
    prefix = {"use_shares": "use_share", "shapley": "shapley", "similarity": "cka"}.get(kind)
    return "leading values of each spectrum." if prefix is None else _listed(d, (prefix,))


def _listed(d: DiagnosisData, prefixes: Sequence[str]) -> str:
    parts = [
        f"{name} {prefix} {d.measures[f'{prefix}.{name}']}"
        for name in d.modalities
        for prefix in prefixes
        if f"{prefix}.{name}" in d.measures
    ]
    return "; ".join(parts)
