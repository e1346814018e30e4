"""Which modality collapsed: a verdict per modality from four scores, and the sentence that says it.

Scores are put on a scale from chance (0) to the fused model on complete data (1):

- signal = (alone − chance) / (all − chance): what a model of this modality alone can do;
- loss = (all − without) / (all − chance): what the fused model loses when the modality is taken away;
- kept = (only − chance) / (alone − chance): how much of the modality's own signal the fused model can use when it gets
  nothing else.

"Taken away" means filled with the train mean, which a model trained on complete data has never seen: a low "only" is
partly that surprise. The comparison with a model trained with modality dropout, which has seen it, separates the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["KEPT_MAX", "LOSS_MAX", "SIGNAL_MIN", "Verdict", "judge", "sentence"]

SIGNAL_MIN = 0.25
LOSS_MAX = 0.02
KEPT_MAX = 0.5

Kind = Literal["collapsed", "relied on", "redundant", "weak"]


@dataclass(frozen=True)
class Verdict:
    """One modality in one model; the five scores are means over seeds, the three shares are defined above."""

    modality: str
    kind: Kind
    alone: float
    all: float
    without: float
    only: float
    chance: float
    signal: float
    loss: float
    kept: float


def judge(reliance: Mapping[str, Mapping[str, float]], complete: float, chance: float) -> list[Verdict]:
    """A verdict for every modality. A fused model that is not above chance gives none.

    "collapsed": signal of its own, no loss without it, little kept. "relied on": the fused model loses without it.
    "redundant": signal, no loss, but the fused model can use it. "weak": little signal and no loss.
    """
    span = complete - chance
    if span <= 0:
        return []
    verdicts = []
    for modality, scores in reliance.items():
        alone, without, only = scores["alone"], scores["without"], scores["only"]
        signal, loss = (alone - chance) / span, (complete - without) / span
        kept = (only - chance) / (alone - chance) if alone > chance else 1.0
        kind: Kind
        if loss > LOSS_MAX:
            kind = "relied on"
        elif signal < SIGNAL_MIN:
            kind = "weak"
        else:
            kind = "collapsed" if kept <= KEPT_MAX else "redundant"
        verdicts.append(Verdict(modality, kind, alone, complete, without, only, chance, signal, loss, kept))
    return verdicts


def sentence(verdict: Verdict, model: str, trained_with_masks: float | None = None) -> str:
    """The verdict in plain words with its numbers.

    ``trained_with_masks``: the "only" score of a model trained with modality dropout, where there is one.
    """
    v = verdict
    name = f"**{v.modality}**"
    numbers = (
        f"alone it reaches {v.alone:.3f} (chance {v.chance:.3f}); the fused model scores {v.all:.3f} with all "
        f"modalities, {v.without:.3f} without {v.modality}, and {v.only:.3f} with nothing else"
    )
    text = {
        "collapsed": f"{name} has collapsed in the {model} model: {numbers}.",
        "relied on": f"The {model} model relies on {name}: {numbers}.",
        "redundant": f"{name} is redundant but usable in the {model} model: {numbers}.",
        "weak": f"{name} carries little by itself: {numbers}.",
    }[v.kind]
    if v.kind != "collapsed" or trained_with_masks is None:
        return text
    usable = (trained_with_masks - v.chance) / (v.alone - v.chance)
    if usable > KEPT_MAX:
        return text + (
            f" The signal is there for a fused model: trained with modality dropout, the same architecture gets "
            f"{trained_with_masks:.3f} from {v.modality} with nothing else."
        )
    return text + (
        f" Modality dropout does not bring it back either: there {v.modality} with nothing else gives "
        f"{trained_with_masks:.3f}."
    )
