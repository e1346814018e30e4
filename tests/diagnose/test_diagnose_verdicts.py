"""When a verdict changes, what its index is, and how often resamples agree with it."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from mmc_fast.diagnose import ModalityVerdict, Thresholds
from mmc_fast.diagnose.verdict import KINDS, carries, judge, kind_of, overall

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
        for aligned, told in (
            (0.34, "collapsed"),
            (0.36, "relied on"),
        ):  # what the outputs follow decides, where the score cannot
            first, *more = (
                {"audio": s | {"alignment": aligned}, "image": OTHER} for s in (some, *(d[0]["audio"] for d in draws))
            )
            assert judge(first, whole, [(d, whole) for d in more], LIMITS)[0].kind == told
    bad = entry(0.9, 0.5, math.nan, 0.0, 0.2)
    none = judge({"audio": lost, "image": OTHER}, whole, [({"audio": bad, "image": OTHER}, whole)] * 20, LIMITS)[0]
    assert "agreement" not in none.evidence


def test_the_thresholds_are_those_of_the_guide() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "diagnose.md").read_text()
    (listed,) = re.findall(r"fields of `Thresholds`: ([^(]*)", guide)
    assert {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+\d|\d)", listed)} == vars(Thresholds())


def test_what_is_equal_to_a_threshold() -> None:
    """ "At most" is said of loss and index, "above" of signal and effect, and an interval holds its ends."""
    t = Thresholds()
    e = {"all": 0.9, "chance": 0.5, "shuffled": 0.9, "ability": 0.4, "loss": t.loss, "index": t.index}
    e |= {"total_effect": t.effect}
    low, high = math.nextafter(t.index, 0), math.nextafter(t.index, 1)
    assert kind_of(e) == kind_of(e | {"index_low": t.index, "index_high": t.fair}) == "collapsed"
    assert kind_of(e | {"loss": math.nextafter(t.loss, 1)}) == kind_of(e | {"index": high}) == "under-used"
    assert kind_of(e | {"index": t.under}) == kind_of(e | {"index": 0.29, "index_high": t.under}) == "relied on"
    assert kind_of(e | {"index_low": t.index, "index_high": math.nextafter(t.fair, 2)}) == "undecided"
    follows = e | {"alignment": math.nextafter(t.aligned, 1), "total_effect": t.moved}
    assert kind_of(follows) == "under-used"
    assert kind_of(follows | {"alignment": t.aligned}) == "collapsed"
    assert kind_of(follows | {"total_effect": math.nextafter(t.moved, 0)}) == "collapsed"
    assert kind_of(follows | {"index_high": t.index / 2}) == "collapsed"
    assert kind_of(follows | {"index_high": math.nextafter(t.index / 2, 1)}) == "under-used"
    used = e | {"loss": 0.5, "index": 0.5, "index_high": 0.8}
    assert [kind_of(used | {"index_low": x}) for x in (low, t.index, high)] == ["undecided", "undecided", "relied on"]
    assert kind_of({k: v for k, v in used.items() if k != "index_high"}) == "relied on"
    nothing = e | {"all": 1.0, "chance": 0.0, "shuffled": 1.0, "ability": t.signal}
    assert not carries(nothing)
    assert carries(nothing | {"ability": math.nextafter(t.signal, 1)})
    assert kind_of(nothing | {"ability": 0.0}) == "uninformative"
    assert kind_of(nothing | {"ability": 0.0, "total_effect": math.nextafter(t.effect, 1)}) == "misleading"
    assert kind_of(nothing | {"all": 0.0}) == "undecided"


def test_ability_is_above_chance_and_none_counts_against_the_others() -> None:
    for chance in (0.0, 0.5):
        e = {"all": 0.4 + chance, "chance": chance, "ability": 0.03}
        assert carries(e)  # 0.05 of 0.4 is 0.02
        assert not carries(e | {"ability": 0.019})
    useful = {k: v for k, v in OTHER.items() if k != "alone"}  # no probe: what the model makes of it alone
    useless = entry(0.3, 0.2, 0.9, -0.1, 0.2)
    found = judge({"image": useful, "audio": useless}, {"all": 0.9, "chance": 0.5})
    assert [v.evidence["ability"] for v in found] == pytest.approx([0.4, -0.2])
    assert found[0].evidence["index"] == pytest.approx(1)  # all of the use and all of the ability


def test_nothing_used_is_an_index_of_zero() -> None:
    unused = entry(0.9, 0.5, 0.9, 0.0, 0.2)
    found = judge({"audio": unused, "image": unused | {"resampled_shapley": -0.1}}, {"all": 0.9, "chance": 0.5})
    assert [(v.kind, v.evidence["index"]) for v in found] == [("collapsed", 0.0)] * 2


@pytest.mark.parametrize("number", [9, 10, 21, 200])
def test_the_interval_of_the_index_is_that_of_the_nearest_order_statistics(number: int, seed: int) -> None:
    random, whole = np.random.default_rng(seed), {"all": 0.9, "chance": 0.5}
    draws = [({"audio": entry(0.9, 0.5, 0.8, v, 0.2), "image": OTHER}, whole) for v in random.uniform(0, 0.4, number)]
    e = judge({"audio": entry(0.9, 0.5, 0.8, 0.2, 0.2), "image": OTHER}, whole, draws)[0].evidence
    if number < 10:
        assert "index_low" not in e
        return
    assert "index_low" in e
    drawn = [judge(scores, w)[0].evidence["index"] for scores, w in draws]
    draws += [({"audio": entry(0.5, 0.5, 0.8, 0.1, 0.2), "image": OTHER}, whole)]  # without ability there is no index
    e = judge({"audio": entry(0.9, 0.5, 0.8, 0.2, 0.2), "image": OTHER}, whole, draws)[0].evidence
    ends = np.quantile(drawn, [0.025, 0.975], method="nearest")
    assert (e["index_low"], e["index_high"]) == tuple(ends)


def test_words_for_every_kind() -> None:
    evidence = entry(0.9, 0.5, 0.8, 0.1, 0.25) | {"all": 0.9, "chance": 0.5, "ability": 0.4, "index": 0.4}
    found = [ModalityVerdict(f"m{i}", kind, evidence) for i, kind in enumerate(KINDS)]
    assert len({v.sentence().split(" is ")[-1].split(" has ")[-1] for v in found}) == len(KINDS)
    assert "nothing was scored" in ModalityVerdict("a", "undecided").sentence()
    text = overall(found, None, {})
    assert all(f"{word}: m" in text for word in ("Modality collapse", "Misleading", "Under-used", "Undecided"))
    assert overall(found[:1], None, {}) == "Every modality is relied on."
    assert overall([], None, {}) == ""
    assert "Every modality" not in overall(found[:3], None, {})
    assert "neurons" in overall(found[:2], 0.9, vars(Thresholds()))
    for entropy, words in ((0.15, "keep the modalities apart"), (0.151, "mix the modalities")):
        assert words in overall(found, entropy, vars(Thresholds()))
    assert "neurons" not in overall(found[:1], 0.9, vars(Thresholds()))
