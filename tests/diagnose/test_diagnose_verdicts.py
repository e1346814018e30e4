"""When a verdict changes, what its index is, and how often resamples agree with it."""

from __future__ import annotations

import math

import pytest

from mmc_fast.diagnose import ModalityVerdict, Thresholds
from mmc_fast.diagnose.verdict import KINDS, judge, overall

LIMITS = Thresholds(signal=0.1, loss=0.05, index=0.1, effect=0.1, under=0.3, fair=1.0)
OTHER = {
    "alone": 0.9,
    "only": 0.9,
    "without": 0.5,
    "shuffled": 0.5,
    "shapley": 0.36,
    "resampled_shapley": 0.36,
    "total_effect": 0.9,
}


def entry(
    alone: float, only: float, shuffled: float, shapley: float, effect: float, error: float = 0.0
) -> dict[str, float]:
    found = {
        "alone": alone,
        "only": only,
        "without": 0.9,
        "shuffled": shuffled,
        "shapley": shapley,
        "total_effect": effect,
    }
    return found | {"alone_error": error, "resampled_shapley": shapley}


@pytest.mark.parametrize(
    ("kind", "scores"),
    [
        # chance 0.5, all 0.9: a share of 1/2 of the abilities, and use φ / (φ + 0.36), so φ = 0.04 is an index of 0.2
        ("relied on", entry(0.9, 0.5, 0.8, 0.1, 0.2)),
        ("relied on", entry(0.9, 0.5, 0.881, 0.0636, 0.2)),  # index 0.30
        ("under-used", entry(0.9, 0.5, 0.881, 0.0635, 0.2)),
        ("under-used", entry(0.9, 0.5, 0.879, 0.0, 0.2)),  # it has no share, but is missed: 0.0525 of its ability
        ("collapsed", entry(0.9, 0.5, 0.881, 0.0, 0.2)),
        ("collapsed", entry(0.9, 0.5, 0.9, 0.0189, 0.2)),  # index 0.0997
        ("under-used", entry(0.9, 0.5, 0.9, 0.0191, 0.2)),
        ("relied on", entry(0.9, 0.5, 0.9, 0.2, 0.0)),
        ("collapsed", entry(0.9, 0.5, 0.93, -0.1, 0.5)),
        ("relied on", entry(0.5, 0.9, 0.8, 0.2, 0.5)),  # the probe was too weak
        ("uninformative", entry(0.539, 0.5, 0.9, 0.0, 0.099)),
        ("misleading", entry(0.5, 0.5, 0.9, 0.0, 0.101)),
        ("misleading", entry(0.55, 0.5, 0.9, 0.0, 0.101, error=0.051)),
        ("uninformative", entry(0.6, 0.5, 0.9, 0.0, 0.101, error=0.051)),  # ability between one and two errors
        ("uninformative", entry(0.649, 0.5, 0.9, 0.0, 0.2, error=0.05)),  # within three errors of nothing
        ("collapsed", entry(0.651, 0.5, 0.9, 0.0, 0.2, error=0.05)),
        ("relied on", entry(0.52, 0.5, 0.85, 0.1, 0.5)),  # of use beside the other alone
    ],
)  # fmt: skip
def test_both_sides_of_every_threshold(kind: str, scores: dict[str, float]) -> None:
    verdict, other = judge({"audio": scores, "image": OTHER}, {"all": 0.9, "chance": 0.5}, thresholds=LIMITS)
    assert verdict.kind == kind, verdict
    assert other.kind == "relied on"
    ability = max(scores["alone"], scores["only"]) - 0.5
    used = max(scores["shapley"], 0) + 0.36
    assert verdict.evidence["ability"] == pytest.approx(ability)
    if ability > 0:
        assert verdict.evidence["loss"] == pytest.approx((0.9 - scores["shuffled"]) / ability)
        assert verdict.evidence["index"] == pytest.approx((scores["shapley"] / used) / (ability / (ability + 0.4)))
        assert f"{verdict.evidence['index']:.2f}" in verdict.sentence()
    assert verdict.sentence("accuracy").startswith("audio")


def test_a_model_near_chance_is_not_judged() -> None:
    scores = {"audio": OTHER, "image": OTHER}
    for error, kind in ((0.132, "relied on"), (0.134, "undecided")):
        found = judge(scores, {"all": 0.9, "chance": 0.5, "chance_error": error}, thresholds=LIMITS)
        assert {v.kind for v in found} == {kind}
    assert "Undecided: audio and image." in overall(found, 0.3, {"entropy": 0.2})


def test_resamples_give_the_interval_and_the_agreement() -> None:
    whole = {"all": 0.9, "chance": 0.5}
    lost = entry(0.9, 0.5, 0.9, 0.0, 0.2)
    for shapley, kind in ((0.3, "collapsed"), (0.4, "undecided")):
        used = entry(0.9, 0.5, 0.8, shapley, 0.2)
        draws = [({"audio": used if r < 20 else lost, "image": OTHER}, whole) for r in range(100)]
        verdict = judge({"audio": lost, "image": OTHER}, whole, draws, LIMITS)[0]
        assert (verdict.kind, verdict.evidence["agreement"]) == (kind, pytest.approx(0.8))
        high = 2 * shapley / (shapley + 0.36)
        assert (verdict.evidence["index_low"], verdict.evidence["index_high"]) == pytest.approx((0.0, high))
    little, more = entry(0.9, 0.5, 0.8, 0.05, 0.2), entry(0.9, 0.5, 0.8, 0.07, 0.2)
    for wrong, kind in ((2, "under-used"), (4, "relied on")):
        draws = [({"audio": more if r < wrong else little, "image": OTHER}, whole) for r in range(100)]
        assert judge({"audio": little, "image": OTHER}, whole, draws, LIMITS)[0].kind == kind, "the whole interval"
    weak = entry(0.51, 0.5, 0.85, 0.02, 0.2)
    for spread, kind in ((0.016, "relied on"), (0.018, "uninformative")):  # 0.05 is lost
        draws = [({"audio": weak | {"shuffled": 0.85 + spread * (-1) ** r}, "image": OTHER}, whole) for r in range(100)]
        verdict = judge({"audio": weak, "image": OTHER}, whole, draws, LIMITS)[0]
        assert (verdict.kind, verdict.evidence["lost_error"]) == (kind, pytest.approx(spread, rel=0.01))
    little, some = entry(0.9, 0.5, 0.89, 0.01, 0.2), entry(0.9, 0.5, 0.89, 0.2, 0.2)
    for spread, kind in ((0.006, "undecided"), (0.004, "relied on")):  # 0.01 is lost, and the index reaches below 0.1
        draws = [
            ({"audio": (little, some)[r % 2] | {"shuffled": 0.89 + spread * (-1) ** (r // 2)}, "image": OTHER}, whole)
            for r in range(100)
        ]
        assert judge({"audio": some, "image": OTHER}, whole, draws, LIMITS)[0].kind == kind
    bad = entry(0.9, 0.5, math.nan, 0.0, 0.2)
    none = judge({"audio": lost, "image": OTHER}, whole, [({"audio": bad, "image": OTHER}, whole)] * 20, LIMITS)[0]
    assert "agreement" not in none.evidence


def test_words_for_every_kind() -> None:
    evidence = entry(0.9, 0.5, 0.8, 0.1, 0.25) | {"all": 0.9, "chance": 0.5, "ability": 0.4, "index": 0.4}
    found = [ModalityVerdict(f"m{i}", kind, evidence) for i, kind in enumerate(KINDS)]
    assert len({v.sentence().split(" is ")[-1].split(" has ")[-1] for v in found}) == len(KINDS)
    assert "nothing was scored" in ModalityVerdict("a", "undecided", {"use_share": 0.5}).sentence()
    text = overall(found, None, {})
    assert all(f"{word}: m" in text for word in ("Modality collapse", "Misleading", "Under-used", "Undecided"))
    assert overall(found[:1], None, {}) == "Every modality is relied on."
