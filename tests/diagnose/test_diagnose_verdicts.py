"""When a verdict changes, and how often resamples agree with it."""

from __future__ import annotations

import math

import pytest

from mmc_fast.diagnose import Thresholds
from mmc_fast.diagnose.verdict import agreement, judge_modality, verdicts_from_scores

LIMITS = Thresholds(use=0.4, kept=0.7, entropy=0.2, signal=0.3, loss=0.1)


def scores(*, alone: float | None, without: float, only: float, error: float = 0.0) -> dict[str, float]:
    """From chance 0.5 to a fused score of 0.9, so that 0.04 is a tenth of the way."""
    found = {"all": 0.9, "chance": 0.5, "without": without, "only": only, "chance_error": error}
    return found | ({} if alone is None else {"alone": alone})


@pytest.mark.parametrize(
    ("kind", "share", "known"),
    [
        ("relied on", 0.5, scores(alone=0.8, without=0.859, only=0.5)),
        ("collapsed", 0.5, scores(alone=0.8, without=0.861, only=0.5)),
        ("weak", 0.5, scores(alone=0.619, without=0.9, only=0.5)),
        ("collapsed", 0.5, scores(alone=0.621, without=0.9, only=0.5)),
        ("collapsed", 0.5, scores(alone=0.8, without=0.9, only=0.709)),
        ("redundant", 0.5, scores(alone=0.8, without=0.9, only=0.711)),
        ("redundant", 0.201, scores(alone=0.8, without=0.9, only=0.8)),
        ("collapsed", 0.199, scores(alone=0.8, without=0.9, only=0.8)),
        ("redundant", 0.5, scores(alone=0.5, without=0.9, only=0.8)),
        ("ignored", 0.199, scores(alone=0.5, without=0.9, only=0.5)),
        ("weak", 0.201, scores(alone=0.5, without=0.9, only=0.5)),
        ("used", 0.5, scores(alone=None, without=0.9, only=0.5)),
        ("ignored", 0.1, scores(alone=None, without=0.9, only=0.5)),
        ("relied on", 0.5, scores(alone=None, without=0.8, only=0.5)),
        ("redundant", 0.5, scores(alone=None, without=0.9, only=0.8)),
        ("relied on", 0.5, scores(alone=0.8, without=0.7, only=0.5, error=0.199)),
        ("undecided", 0.5, scores(alone=0.8, without=0.7, only=0.5, error=0.201)),
        ("ignored", 0.1, scores(alone=0.8, without=0.7, only=0.5, error=0.201)),
        ("used", 0.201, None),
        ("ignored", 0.199, None),
    ],
)
def test_both_sides_of_every_threshold(kind: str, share: float, known: dict[str, float] | None) -> None:
    verdict = judge_modality("audio", share, 2, known, LIMITS)
    assert verdict.kind == kind
    sentence = verdict.sentence("accuracy" if known else None)
    assert sentence.startswith("audio")
    assert f"{share:.1%}" in sentence
    if "signal" in verdict.evidence and known and "alone" in known:
        assert verdict.evidence["signal"] == pytest.approx((max(known["alone"], known["only"]) - 0.5) / 0.4)
        assert verdict.evidence["loss"] == pytest.approx((0.9 - known["without"]) / 0.4)


def test_scores_alone_give_the_same_verdicts() -> None:
    """Records of a training hold no use shares; the rule is the same and nothing is called ignored."""
    records = {
        "collapsed": {"alone": 0.8, "without": 0.9, "only": 0.5},
        "relied on": {"alone": 0.8, "without": 0.7, "only": 0.75},
        "redundant": {"alone": 0.8, "without": 0.9, "only": 0.79},
        "weak": {"alone": 0.55, "without": 0.9, "only": 0.5},
    }
    found = verdicts_from_scores(records, 0.9, 0.5, LIMITS)
    assert [v.kind for v in found] == [v.modality for v in found] == list(records)
    assert found[0].evidence["kept"] == pytest.approx(0)
    assert {v.kind for v in verdicts_from_scores(records, 0.5, 0.5, LIMITS)} == {"undecided"}


def test_one_modality_is_not_ignored() -> None:
    assert judge_modality("image", 1.0, 1, None, LIMITS).kind == "used"


def test_agreement_counts_resamples() -> None:
    rows = [scores(alone=0.8, without=w, only=0.5) for w in (0.7, 0.7, 0.7, 0.9)]
    assert agreement("relied on", "audio", 2, [0.5], rows, LIMITS) == 0.75
    assert agreement("collapsed", "audio", 2, [0.5, 0.5], rows, LIMITS) == 0.25
    rows.append(scores(alone=0.8, without=math.nan, only=0.5))
    assert agreement("relied on", "audio", 2, [0.5], rows, LIMITS) == 0.75
    assert math.isnan(agreement("relied on", "audio", 2, [0.5], rows[-1:], LIMITS))
    assert agreement("ignored", "audio", 2, [0.1, 0.5], [None, None, None], LIMITS) == pytest.approx(2 / 3)
