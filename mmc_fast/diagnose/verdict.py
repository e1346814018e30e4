"""The verdict on each modality, from numbers and calibrated thresholds, and the words for it.

This is the only rule: ``diagnose`` and every report that judges a modality call :func:`judge_modality`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = [
    "THRESHOLDS",
    "ModalityVerdict",
    "Thresholds",
    "agreement",
    "judge_modality",
    "overall",
    "verdicts_from_scores",
]


@dataclass(frozen=True)
class Thresholds:
    """Where verdicts change. ``docs/diagnose.md`` states how they were set and how often they are wrong.

    use: a modality is ignored where its use share is below this times 1/m (calibrated).
    kept: it has collapsed where, of what it can do alone, the fused model keeps at most this (calibrated).
    entropy: neurons mix modalities where their mean entropy is above this (calibrated).
    signal, loss: it says something where it alone gets this far from chance to the fused score; the model relies on it
    where the score without it falls by more than ``loss`` of that way (conventions, not calibrated).
    """

    use: float = 0.3
    kept: float = 0.85
    entropy: float = 0.15
    signal: float = 0.25
    loss: float = 0.05


THRESHOLDS = Thresholds()


@dataclass(frozen=True)
class ModalityVerdict:
    """``kind``: "collapsed", "ignored", "relied on", "redundant", "weak", "used" or "undecided", and the numbers behind it.

    With labels, ``best = max(alone, only)``: signal = (best − chance) / (all − chance), loss = (all − without) / (all − chance),
    kept = (only − chance) / (best − chance). "undecided": the fused model is not above chance. ``evidence["agreement"]``: the
    share of resamples that give the same verdict.
    """

    modality: str
    kind: str
    use_share: float | None
    evidence: dict[str, float] = field(default_factory=dict)

    def sentence(self, metric: str | None) -> str:
        """The verdict in plain words with its evidence."""
        e = self.evidence
        share = "not defined" if self.use_share is None else f"{self.use_share:.1%}"
        text = {
            "collapsed": f"{self.modality} has collapsed: it carries signal that the fused model has lost.",
            "ignored": f"{self.modality} is ignored: the head hardly responds to it.",
            "relied on": f"{self.modality} is relied on.",
            "redundant": f"{self.modality} is redundant: usable, but the model does without it.",
            "weak": f"{self.modality} carries little by itself, and the model loses nothing without it.",
            "used": f"{self.modality} is used; whether it helps cannot be said without its score alone.",
            "undecided": f"{self.modality} cannot be judged: the fused model is not above chance.",
        }[self.kind]
        text += f" Use share {share}"
        if "all" in e:
            alone = f"alone {e['alone']:.3f}, " if "alone" in e else ""
            text += (
                f"; {metric} {alone}all {e['all']:.3f}, without it {e['without']:.3f}, only it "
                f"{e['only']:.3f}, chance {e['chance']:.3f}"
            )
            if "retrained_without" in e:
                text += (
                    f"; a network trained without it {e['retrained_without']:.3f} (with it {e['retrained_all']:.3f})"
                )
        if "agreement" in e and math.isfinite(e["agreement"]):
            text += f"; the same verdict in {e['agreement']:.0%} of resamples"
        return text + "."


def agreement(
    kind: str,
    modality: str,
    modalities: int,
    use_shares: Sequence[float],
    scores: Sequence[Mapping[str, float] | None],
    thresholds: Thresholds,
) -> float:
    """Share of resamples that give the verdict ``kind``: shares ``[R']`` and scores ``[R]``, the shorter one repeated.

    Resamples without a score, such as an AUROC of one class, do not count; NaN where there is no other.
    """
    same = [
        judge_modality(modality, use_shares[r % len(use_shares)], modalities, row, thresholds).kind == kind
        for r, row in enumerate(scores)
        if row is None or all(map(math.isfinite, row.values()))
    ]
    return sum(same) / len(same) if same else math.nan


def judge_modality(
    modality: str,
    use_share: float | None,
    modalities: int,
    scores: Mapping[str, float] | None,
    thresholds: Thresholds = THRESHOLDS,
) -> ModalityVerdict:
    """The verdict on one modality; ``scores``: alone, all, without, only, chance, or None where there are no labels.

    "alone" may be missing, and then a modality that the fused model cannot use is not said to carry little.
    "chance_error" among the scores: a fused model within two of these of chance is not judged.
    """
    ignored = use_share is not None and modalities > 1 and use_share < thresholds.use / modalities
    if scores is None:
        return ModalityVerdict(modality, "ignored" if ignored else "used", use_share)
    evidence = dict(scores)
    span = scores["all"] - scores["chance"]
    # The network of the probe can be too weak for a modality that the fused model reads well.
    above = max(scores.get("alone", scores["only"]), scores["only"]) - scores["chance"]
    if span <= 2 * scores.get("chance_error", 0.0):
        return ModalityVerdict(modality, "ignored" if ignored else "undecided", use_share, evidence)
    signal, loss = above / span, (scores["all"] - scores["without"]) / span
    kept = (scores["only"] - scores["chance"]) / above if above > 0 else 1.0
    evidence |= {"signal": signal, "loss": loss, "kept": kept}
    if loss > thresholds.loss:
        kind = "relied on"
    elif signal < thresholds.signal:
        kind = "ignored" if ignored else "weak" if "alone" in scores else "used"
    else:
        kind = "collapsed" if kept <= thresholds.kept or ignored else "redundant"
    return ModalityVerdict(modality, kind, use_share, evidence)


def verdicts_from_scores(
    scores: Mapping[str, Mapping[str, float]], complete: float, chance: float, thresholds: Thresholds = THRESHOLDS
) -> list[ModalityVerdict]:
    """Verdicts where only scores are known and no use shares, as in the records of a training.

    ``scores``: modality -> "without" and "only", where known "alone". ``complete``: the fused score with all modalities.
    """
    whole = {"all": complete, "chance": chance}
    return [judge_modality(name, None, len(scores), whole | dict(s), thresholds) for name, s in scores.items()]


def overall(verdicts: Sequence[ModalityVerdict], entropy: float | None, thresholds: Mapping[str, float]) -> str:
    """One or two sentences on the model as a whole."""
    lost = [v.modality for v in verdicts if v.kind == "collapsed"]
    ignored = [v.modality for v in verdicts if v.kind == "ignored"]
    parts = []
    if lost:
        parts.append(f"Modality collapse: {_join(lost)}.")
    if ignored:
        parts.append(f"Ignored: {_join(ignored)}.")
    if any(v.kind == "undecided" for v in verdicts):
        parts.append("The fused model is not above chance, so what it lost cannot be said.")
    elif not lost and not ignored:
        parts.append("No modality has collapsed or is ignored.")
    if entropy is not None and len(verdicts) > 1:
        mixed = entropy > thresholds["entropy"]
        parts.append(
            f"Fusion neurons {'mix' if mixed else 'keep apart'} the modalities (mean entropy {entropy:.2f} of 1; above "
            f"{thresholds['entropy']:.2f} counts as mixing)."
        )
    return " ".join(parts)


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
