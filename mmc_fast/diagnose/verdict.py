"""The verdict on each modality: what the model uses of it against what it could give, by calibrated thresholds.

This is the only rule: ``diagnose``, ``evaluate`` and every report that judges a modality call :func:`judge`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

KINDS = ("relied on", "under-used", "collapsed", "uninformative", "misleading", "undecided")


@dataclass(frozen=True)
class Thresholds:
    """Where verdicts change. ``docs/guides/diagnose.md`` states how they were set and how often they are wrong.

    signal: a modality carries something where its ability is above this share of what the model reaches, and above ``errors``
    standard errors: a diagnosis makes some ten such tests, and two standard errors would find something in noise once in four
    diagnoses. Beside others it carries something where as much is lost when it is resampled. A model that is no more above
    chance is not judged.
    loss, index: it has collapsed where at most these parts of its ability are lost when it is resampled, and used.
    under: it is under-used where its use over its ability is below this, with the whole interval.
    fair: it has collapsed by the score only where the whole interval of the index is below this.
    aligned: the score leaves the use open where the interval of the index reaches below ``under`` and no more than ``errors``
    standard errors are lost. Then it has collapsed where what it moves is aligned at most this much with what it would answer
    by itself (:func:`~mmc_fast.diagnose.measures.outputs.alignment`). One that has collapsed by the score is under-used instead where
    that is aligned more, with a total effect of at least ``moved`` (less is of an accidental direction), unless the whole interval of
    the index lies below half of ``index``. Without alignment nothing is said of an interval that holds ``index`` and ``fair``, or
    ``index`` with a loss within two standard errors of nothing.
    effect: outputs are moved where the total effect is above this.
    entropy: neurons mix modalities where their mean entropy is above this.
    """

    signal: float = 0.05
    loss: float = 0.1
    index: float = 0.2
    under: float = 0.3
    fair: float = 1.0
    aligned: float = 0.35
    moved: float = 0.001
    effect: float = 0.1
    entropy: float = 0.15
    errors: float = 3.0


THRESHOLDS = Thresholds()


@dataclass(frozen=True)
class ModalityVerdict:
    """``kind`` and the numbers behind it.

    - "relied on": used about as much as it could give. "under-used": clearly less, by ``evidence["index"]``.
    - "collapsed": it could give, and is not used. "uninformative": it carries nothing and is not used.
    - "misleading": it carries nothing, yet moves the outputs. "undecided": the numbers do not tell.

    ``evidence``: "all", "chance", "alone", "without", "only", "shuffled" (scores), "ability" = best of alone and only − chance,
    "shapley", "loss" = (all − shuffled) / ability, "index" = share of the use / share of the abilities, where use is
    "resampled_shapley" (other samples in place of what is absent: what a model answers to a single modality by its own mask may be right
    by accident), with "index_low" and
    "index_high", "alignment", "total_effect", "use_share", "alone_error", "chance_error", "lost_error" (of all − shuffled), "agreement" = share of resamples with the same verdict; what was not measured is
    left out.
    """

    modality: str
    kind: str
    evidence: dict[str, float] = field(default_factory=dict)

    def sentence(self, metric: str | None = None) -> str:
        """The verdict in one plain sentence with its main numbers."""
        e, name = self.evidence, self.modality
        if "all" not in e:
            return f"{name} cannot be judged: nothing was scored."
        ability = f"{name} alone reaches {e.get('alone', e['only']):.3f} (chance {e['chance']:.3f})"
        lost = f"the model scores {e['all']:.3f}, and {e['shuffled']:.3f} with the {name} of other samples"
        text = {
            "relied on": f"{name} is relied on: {lost}.",
            "under-used": f"{name} is under-used: {ability}, but {lost}.",
            "collapsed": f"{name} has collapsed: {ability}, but {lost}.",
            "uninformative": f"{name} is uninformative: {ability}, and {lost}.",
            "misleading": f"{name} is misleading: {ability}, yet it moves the outputs (total effect {e['total_effect']:.2f}).",
            "undecided": f"{name} cannot be judged: {ability}; {lost}.",
        }[self.kind]
        if math.isfinite(e.get("index", math.nan)):
            interval = f" [{e['index_low']:.2f}, {e['index_high']:.2f}]" if "index_low" in e else ""
            text += f" Use over ability {e['index']:.2f}{interval}."
        return text


def judge(
    scores: Mapping[str, Mapping[str, float]],
    whole: Mapping[str, float],
    draws: Sequence[tuple[Mapping[str, Mapping[str, float]], Mapping[str, float]]] = (),
    thresholds: Thresholds = THRESHOLDS,
) -> list[ModalityVerdict]:
    """One verdict per modality.

    Args:
        scores: modality -> "only", "without", "shuffled", "resampled_shapley", "total_effect", where known "alone" and "alone_error".
        whole: "all", "chance", "chance_error" (of a model without knowledge on as many samples).
        draws: the same two in the resamples of the samples; they give the interval of the index and the agreement.
    """
    found = _judged(scores, whole, thresholds)
    resampled = [_judged(s, w, thresholds) for s, w in draws]
    for position, verdict in enumerate(found):
        same = [r[position] for r in resampled if all(map(math.isfinite, r[position].evidence.values()))]
        if len(same) < 10:
            continue
        lost = [r.evidence["all"] - r.evidence["shuffled"] for r in same]
        verdict.evidence["lost_error"] = statistics.stdev(lost)
        verdict.evidence["agreement"] = sum(r.kind == verdict.kind for r in same) / len(same)
        indices = sorted(r.evidence["index"] for r in same if "index" in r.evidence)
        if indices and "index" in verdict.evidence:
            verdict.evidence["index_low"] = indices[round(0.025 * (len(indices) - 1))]
            verdict.evidence["index_high"] = indices[round(0.975 * (len(indices) - 1))]
        found[position] = replace(verdict, kind=kind_of(verdict.evidence, thresholds))
    return found


def _judged(
    scores: Mapping[str, Mapping[str, float]], whole: Mapping[str, float], thresholds: Thresholds
) -> list[ModalityVerdict]:
    chance = whole["chance"]
    # The network of the probe can be too weak for a modality that the fused model reads well.
    ability = {name: max(s.get("alone", s["only"]), s["only"]) - chance for name, s in scores.items()}
    total = sum(max(a, 0.0) for a in ability.values())
    used = sum(max(s["resampled_shapley"], 0.0) for s in scores.values())
    verdicts = []
    for name, s in scores.items():
        a = ability[name]
        evidence = dict(s) | {"all": whole["all"], "chance": chance, "ability": a}
        if a > 0:
            evidence["loss"] = (whole["all"] - s["shuffled"]) / a
            evidence["index"] = (s["resampled_shapley"] / used) / (a / total) if used > 0 else 0.0
        evidence["chance_error"] = whole.get("chance_error", 0.0)
        verdicts.append(ModalityVerdict(name, kind_of(evidence, thresholds), evidence))
    return verdicts


def carries(e: Mapping[str, float], t: Thresholds = THRESHOLDS) -> bool:
    """Whether a modality says something by itself, by its evidence."""
    error = max(e.get("alone_error", 0.0), e.get("chance_error", 0.0))
    return e["ability"] > max(t.signal * (e["all"] - e["chance"]), t.errors * error)


def kind_of(e: Mapping[str, float], t: Thresholds = THRESHOLDS) -> str:
    """The kind that the evidence of a verdict gives."""
    span, chance_error = e["all"] - e["chance"], e.get("chance_error", 0.0)
    if span <= t.errors * chance_error:
        return "undecided"
    if not carries(e, t):
        if e["all"] - e["shuffled"] > max(t.signal * span, t.errors * e.get("lost_error", chance_error)):
            return "relied on"  # it helps only beside others
        error = max(e.get("alone_error", 0.0), chance_error)
        return "misleading" if e["total_effect"] > t.effect and e["ability"] <= error else "uninformative"
    low, high = e.get("index_low", e["index"]), e.get("index_high", e["index"])
    if e["loss"] <= t.loss and e["index"] <= t.index and high <= t.fair:
        follows = e.get("alignment", -1.0) > t.aligned and e["total_effect"] >= t.moved and high > t.index / 2
        return "under-used" if follows else "collapsed"
    if high < t.under:
        return "under-used"
    missed = (e["all"] - e["shuffled"]) / max(e.get("lost_error", chance_error), 1e-12)
    if low > t.under or missed > t.errors:
        return "relied on"
    if "alignment" in e:
        return "collapsed" if e["alignment"] <= t.aligned else "relied on"
    return "undecided" if low <= t.index and (high > t.fair or missed <= 2) else "relied on"


def overall(verdicts: Sequence[ModalityVerdict], entropy: float | None, thresholds: Mapping[str, float]) -> str:
    """One or two sentences on the model as a whole."""
    parts = []
    for kind, words in (
        ("collapsed", "Modality collapse"), ("misleading", "Misleading"), ("under-used", "Under-used"),
        ("uninformative", "Carrying nothing"), ("undecided", "Undecided"),
    ):  # fmt: skip
        named = [v.modality for v in verdicts if v.kind == kind]
        if named:
            parts.append(f"{words}: {_join(named)}.")
    if verdicts and all(v.kind == "relied on" for v in verdicts):
        parts.append("Every modality is relied on.")
    if entropy is not None and len(verdicts) > 1:
        mixed = entropy > thresholds["entropy"]
        parts.append(
            f"Fusion neurons {'mix the modalities' if mixed else 'keep the modalities apart'} (mean entropy {entropy:.2f} of 1; above "
            f"{thresholds['entropy']:.2f} counts as mixing)."
        )
    return " ".join(parts)


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
