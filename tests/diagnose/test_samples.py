"""What is kept of single rows, by hand: answers of all coalitions, effects, the bootstrap over rows, evidence of verdicts."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from mmc_fast.diagnose import evidence, further, sampled
from mmc_fast.diagnose.alignment import EffectRows
from mmc_fast.diagnose.layers import ChainSums
from mmc_fast.diagnose.measures.calibration import expected_calibration_error
from mmc_fast.diagnose.measures.outputs import alignment, output_shapley
from mmc_fast.diagnose.measures.polysemanticity import neuron_response
from mmc_fast.diagnose.measures.reliance import Afresh
from mmc_fast.diagnose.measures.weights import signal_noise_shares
from mmc_fast.diagnose.options import DiagnoseOptions
from mmc_fast.diagnose.reservoir import Reservoir
from mmc_fast.diagnose.result import Measure
from mmc_fast.diagnose.subsets import SubsetRows, bootstrap_interval, resampled_rows
from mmc_fast.diagnose.tasks import Task

CLASSES = Task("classes", "accuracy", 3)


@pytest.mark.parametrize("stored", [False, True])
def test_answers_of_every_set_of_modalities(stored: bool, generator: torch.Generator) -> None:
    """All rows are kept, so every number is that of all rows; nothing is asked without any modality."""
    names, labels = ["a", "b", "c"], torch.randint(3, (90,), generator=generator)
    outputs = 4 * torch.randn(8, 90, 3, generator=generator)
    kept = SubsetRows(CLASSES, names, 90, 3)
    for index, part in enumerate(torch.arange(90).split(30)):
        kept.add(index, {c: outputs[c, part] for c in range(1, 8)}, labels[part])
        if stored:
            again = SubsetRows(CLASSES, names, 90, 3)
            again.load_state(kept.to_state())
            kept = again
    found, tables = kept.measures(50, 0.9, True)
    p = outputs.double().softmax(-1)
    for part in torch.arange(90).split(30):
        p[0, part] = p[7, part].mean(0)  # the mean answer of the batch
    moved = (p - p[7]).square().sum(-1).mean(1).numpy()
    right = p.argmax(-1) == labels
    confidence = p.amax(-1)
    assert [found[f"output_share.{n}"].value for n in names] == pytest.approx(list(output_shapley(moved)), rel=1e-5)
    for i, name in enumerate(names):
        without = 7 - 2**i
        silent = right[7] & ~right[without] & (confidence[without] >= 0.9)
        assert found[f"silent_failures.{name}"].value == pytest.approx(float(silent.double().mean()))
        rows = torch.tensor(tables["samples"]["row"])
        assert tables["samples"][f"silent_failure.{name}"] == silent[rows].tolist()
        assert tables["samples"][f"predicted_without.{name}"] == p[without].argmax(-1)[rows].tolist()
        told = torch.tensor(tables["samples"][f"confidence_without.{name}"])
        torch.testing.assert_close(told, confidence[without][rows].float(), atol=1e-4, rtol=0)
    assert sorted(tables["samples"]["row"]) == list(range(90))
    assert tables["samples"]["label"] == labels[rows].tolist()
    assert tables["samples"]["predicted"] == p[7].argmax(-1)[rows].tolist()
    torch.testing.assert_close(
        torch.tensor(tables["samples"]["confidence"]), confidence[7][rows].float(), atol=1e-4, rtol=0
    )
    truth = torch.nn.functional.one_hot(labels, 3)
    sets = {tuple(row["present"]): row for row in tables["subsets"]}
    assert len(sets) == 7
    for c in range(1, 8):
        row = sets[tuple(n for i, n in enumerate(names) if c >> i & 1)]
        assert row["accuracy"] == pytest.approx(float(right[c].double().mean()))
        assert row["brier"] == pytest.approx(float((p[c] - truth).square().sum(-1).mean()))
        assert row["ece"] == pytest.approx(expected_calibration_error(confidence[c].float(), right[c]), abs=1e-6)
    whole = sets["a", "b", "c"]
    assert (found["ece.all"], found["brier.all"]) == (Measure(whole["ece"]), Measure(whole["brier"]))
    accuracies = [row["accuracy"] for row in tables["subsets"]]
    assert accuracies == sorted(accuracies)
    assert "samples" not in kept.measures(50, 0.9, False)[1]
    draws = resampled_rows(90, 50, 3) / 90
    silent = torch.tensor(tables["samples"]["silent_failure.a"]).double().numpy()
    shares = np.array([output_shapley(row) for row in draws @ kept.kept.columns["moved"].double().numpy()])
    for name, drawn in (("output_share.b", shares[:, 1]), ("silent_failures.a", draws @ silent)):
        by_rows = bootstrap_interval(found[name].value, drawn, 0.9)
        assert (found[name].low, found[name].high) == pytest.approx((by_rows.low, by_rows.high))


@pytest.mark.parametrize(
    ("task", "width", "answer"),
    [
        (None, 1, lambda y: y),
        (None, 3, lambda y: y.softmax(1)),
        (Task("classes", "auroc", 1), 1, lambda y: torch.cat([1 - y.sigmoid(), y.sigmoid()], 1)),
        (Task("labels", "f1", 2), 2, lambda y: y.sigmoid()),
        (Task("numbers", "r2", 2), 2, lambda y: y),
    ],
)
def test_answers_lie_on_the_scale_of_the_task(
    task: Task | None, width: int, answer: Any, generator: torch.Generator
) -> None:
    kept, y = SubsetRows(task, ["a"], 20, 0), torch.randn(2, 20, width, generator=generator)
    kept.add(0, {0: y[0], 1: y[1]}, None if task is None or task.kind != "classes" else torch.arange(20) % 2)
    expected = (answer(y[0]) - answer(y[1])).square().sum(1)
    found = torch.empty(20)
    found[kept.kept.columns["row"]] = kept.kept.columns["moved"][:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert ("predicted" in kept.kept.columns) == (width == 1 and task is not None)
    masked = SubsetRows(task, ["a"], 20, 0)  # nothing to ask without any modality: the mean answer
    masked.add(0, {1: y[1]}, None)
    found[masked.kept.columns["row"]] = masked.kept.columns["moved"][:, 0]
    torch.testing.assert_close(found, (answer(y[1]) - answer(y[1]).mean(0)).square().sum(1), rtol=1e-4, atol=1e-6)


def test_the_interval_of_a_bootstrap_over_rows(seed: int) -> None:
    drawn = np.random.default_rng(seed).normal(size=200)
    drawn[::9] = np.nan
    known = drawn[np.isfinite(drawn)]
    for level in (0.5, 0.95):
        found = bootstrap_interval(0.1, drawn, level)
        ends = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
        assert (found.low, found.high) == pytest.approx((min(ends[0], 0.1), max(ends[1], 0.1)))
        assert found.error == pytest.approx(known.std(ddof=1))
    assert bootstrap_interval(9.0, drawn, 0.5).high == bootstrap_interval(-9.0, drawn, 0.5).low * -1 == 9.0
    assert bootstrap_interval(0.1, known[:9], 0.95) == Measure(0.1)
    assert bootstrap_interval(0.1, known[:10], 0.95).low is not None
    assert bootstrap_interval(math.nan, drawn, 0.95) == Measure(None)
    counts = resampled_rows(30, 500, seed)
    assert counts.shape == (200, 30)
    assert (counts.sum(1) == 30).all()
    assert counts.var() == pytest.approx(1 - 1 / 30, rel=0.15)
    assert len(resampled_rows(30, 7, seed)) == 7
    assert (resampled_rows(30, 7, seed) != resampled_rows(30, 7, seed + 1)).any()


def test_effects_of_the_kept_rows(generator: torch.Generator) -> None:
    """Log-odds with all modalities less their mean over the draws, against what a model of one modality answers."""
    y = torch.randn(7, 80, 3, generator=generator)
    y[4:] += torch.randn(80, 3, generator=generator)
    rows = EffectRows(CLASSES, ["a", "b"], 50, 5)
    for index, part in enumerate(torch.arange(80).split(20)):
        outputs = {("coalition.1", 0): y[6, part], ("coalition.3", 0): y[0, part]}
        outputs |= {("shuffled.0", draw): y[1 + draw, part] for draw in range(3)}
        outputs |= {("shuffled.1", draw): y[4 + draw, part] for draw in range(3)}
        outputs |= {("alone.a", 0): y[5, part]}
        rows.add(index, outputs)
        again = EffectRows(CLASSES, ["a", "b"], 50, 5)
        again.load_state(rows.to_state())
        rows = again
    kept = torch.cat([rows.kept._drawn(i, 20) for i in range(4)]).argsort()[:50]
    odds = y.double().log_softmax(-1)
    odds = odds - odds.mean(-1, keepdim=True)
    effect, alone = odds[0] - odds[1:4].mean(0), odds[5]
    counts = resampled_rows(50, 40, 5)
    for level in (0.5, 0.9):
        found = rows.measures({}, 40, level)
        value, drawn = alignment(effect[kept], alone[kept], 3, counts)
        expected = bootstrap_interval(value, drawn, level)
        assert list(found) == ["alignment.a"]
        ours = found["alignment.a"]
        assert (ours.value, ours.low, ours.high) == pytest.approx((value, expected.low, expected.high), abs=1e-5)
    probe = Afresh(0.9, 0.1, odds[4].softmax(1)[kept[:20]], torch.arange(20))
    found = rows.measures({"a": probe, "b": probe}, 40, 0.9)
    assert found["alignment.a"] == ours, "a model of the adapter's own comes before the probe"
    assert found["alignment.b"].value == pytest.approx(
        alignment((odds[0] - odds[4:7].mean(0))[kept[:20]], odds[4][kept[:20]], 3)[0], abs=1e-4
    )
    few = Afresh(0.9, 0.1, odds[4].softmax(1)[kept[:9]], torch.arange(9))
    assert "alignment.b" not in rows.measures({"b": few}, 40, 0.9)
    wide = Afresh(0.9, 0.1, torch.ones(20, 4) / 4, torch.arange(20))
    assert "alignment.b" not in rows.measures({"b": wide}, 40, 0.9)


@pytest.mark.parametrize(
    ("outputs", "names", "asked", "kept"),
    [(3, 2, 4096, 4096), (0, 1, 10**7, 2**22), (10**6, 2, 4096, 256), (2**11, 4, 4096, 512), (10**6, 2, 100, 100)],
)
def test_fewer_effects_are_kept_of_many_classes(outputs: int, names: int, asked: int, kept: int) -> None:
    rows = EffectRows(Task("classes", "accuracy", outputs), [str(i) for i in range(names)], asked, 0)
    assert rows.kept.size == kept


class _Scores:
    @staticmethod
    def chance_error() -> float:
        return 0.01


def judged(monkeypatch, measures: dict[str, Measure], draws: dict[str, np.ndarray], absence: str = "model") -> Any:
    """What the rule is asked, and what it answered."""
    asked: list[Any] = []
    monkeypatch.setattr(evidence, "judge", lambda *a: asked.append(a) or plain(*a))
    collector: Any = SimpleNamespace(widths={"a": 3, "b": 2})
    return evidence.verdicts_of(
        collector, measures, draws, _Scores, absence, DiagnoseOptions(level=0.8, seed=4)
    ), *asked  # type: ignore[arg-type]


plain = evidence.judge
KINDS = ("alone", "without", "only", "shuffled", "shapley", "resampled_shapley", "total_effect", "alignment")


def given() -> dict[str, Measure]:
    measures = {f"{kind}.{m}": Measure(0.6 + 0.01 * k + 0.1 * (m == "b")) for k, kind in enumerate(KINDS) for m in "ab"}
    measures |= {
        "alone.a": Measure(0.8, 0.02),
        "alone.b": Measure(0.7),
        "score.all": Measure(0.9),
        "score.chance": Measure(0.5),
    }
    return measures | {"use_share.a": Measure(0.3), "agop.0.stable_rank": Measure(2.0)}


def test_evidence_is_that_of_the_measures_and_of_each_resample(seed: int, monkeypatch) -> None:
    """What is not resampled stays, but for an ability by a probe: that is as uncertain as its error says."""
    random = np.random.default_rng(seed)
    draws = {f"{kind}.{m}": random.random(400) for kind in ("only", "shuffled", "resampled_shapley") for m in "ab"}
    draws |= {f"score.{key}": random.random(400) for key in ("all", "chance")}
    measures = given()
    verdicts, (scores, whole, resamples, thresholds) = judged(monkeypatch, measures, draws)
    for m in "ab":
        assert scores[m] == {k: measures[f"{k}.{m}"].value for k in KINDS} | ({"alone_error": 0.02} if m == "a" else {})
    assert whole == {"all": 0.9, "chance": 0.5, "chance_error": 0.01}
    assert thresholds == DiagnoseOptions().thresholds
    assert len(resamples) == 400
    for r, (row, of_all) in enumerate(resamples):
        assert of_all == {"all": draws["score.all"][r], "chance": draws["score.chance"][r], "chance_error": 0.01}
        for m in "ab":
            for kind in KINDS[1:]:
                expected = draws[f"{kind}.{m}"][r] if f"{kind}.{m}" in draws else measures[f"{kind}.{m}"].value
                assert row[m][kind] == expected
        assert row["b"]["alone"] == 0.7
    able = np.array([row["a"]["alone"] for row, _ in resamples])
    assert able.mean() == pytest.approx(0.8, abs=4 * 0.02 / 20)
    assert able.std() == pytest.approx(0.02, rel=0.2)
    drawn = draws | {"alone.a": random.random(400)}
    assert [row["a"]["alone"] for row, _ in judged(monkeypatch, given(), drawn)[1][2]] == drawn["alone.a"].tolist()
    e = verdicts[0].evidence
    assert (e["use_share"], "use_share" in verdicts[1].evidence) == (0.3, False)
    assert measures["robustness.a"].value == pytest.approx((e["only"] - 0.5) / e["ability"])
    assert measures["use_index.a"] == Measure(e["index"], None, e["index_low"], e["index_high"])
    unable = given() | {"alone.a": Measure(0.5), "only.a": Measure(0.5)}
    judged(monkeypatch, unable, {})
    assert ("robustness.a" in unable, "robustness.b" in unable) == (False, True), "a share of nothing"
    resampled = given()
    judged(monkeypatch, resampled, {}, "resample")
    assert "robustness.a" not in resampled
    assert resampled["use_index.a"].low is None


def test_need_is_the_gap_of_two_networks(monkeypatch) -> None:
    measures = given() | {"retrained_all": Measure(0.9, 0.03), "retrained_without.a": Measure(0.6, 0.04)}
    verdicts, _ = judged(monkeypatch, measures, {})
    low, high = stats.norm.interval(0.8, 0.3, 0.05)
    found = measures["need.a"]
    assert (found.value, found.error, found.low, found.high) == pytest.approx((0.3, 0.05, low, high))
    assert "need.b" not in measures
    assert verdicts[0].evidence["retrained_without"] == 0.6


def test_latents_are_probed_in_samples_that_have_all_of_them(generator: torch.Generator, monkeypatch) -> None:
    asked: list[Any] = []
    told = {"balanced_accuracy": 0.8, "chance": 0.5}
    monkeypatch.setattr(sampled, "modality_probe", lambda latents, seed: asked.append((latents, seed)) or told)
    x = torch.randn(2, 30, 4, generator=generator)
    x[0, 3, 1] = x[1, 5] = torch.nan
    kept = Reservoir(100, 0)
    kept.columns = {"latent.a": x[0], "latent.b": x[1], "x": x[0]}
    measures: dict[str, Measure] = {}
    sampled.latent_measures(measures, kept, 9)
    assert {name: m.value for name, m in measures.items()} == {f"modality_probe.{k}": v for k, v in told.items()}
    (latents, seed), rows = asked.pop(), [n for n in range(30) if n not in (3, 5)]
    assert (list(latents), seed) == (["a", "b"], 9)
    for i, name in enumerate("ab"):
        assert torch.equal(latents[name], x[i, rows])
    for count in (22, 21):
        kept.columns = {"latent.a": x[0, :count], "latent.b": x[1, :count]}
        sampled.latent_measures({}, kept, 9)
        assert len(asked) == (count == 22), "twenty whole samples are enough"
        asked.clear()
    kept.columns = {"latent.a": x[0]}
    sampled.latent_measures({}, kept, 9)
    assert not asked


@pytest.mark.parametrize("apart", [False, True])
def test_networks_train_on_the_rows_apart_and_the_diagnosed_judge(apart: bool, generator, monkeypatch) -> None:
    def rows(n: int) -> Reservoir:
        kept = Reservoir(99, 0)
        kept.columns = {"x": torch.randn(n, 5, generator=generator), "input.a": torch.randn(n, 4, generator=generator)}
        kept.columns["labels"] = torch.randint(3, (n,), generator=generator)
        return kept

    def named(kept: Reservoir) -> dict[str, torch.Tensor]:
        x = kept.columns["x"]
        return {"a": x[:, :3], "b": x[:, 3:], "input.a": kept.columns["input.a"]}

    own, train = rows(30), rows(40)
    source, scores = train if apart else own, {("a",): 0.5, ("input.a",): 0.6, ("b",): 0.95, ("a", "b"): 0.7}
    asked: dict[tuple[str, ...], Any] = {}

    def network(features, labels, names, *, task, seed, judged):
        assert (names in asked, task, seed) == (False, CLASSES, 7)
        asked[names] = judged
        torch.testing.assert_close(features, named(source), rtol=0, atol=0)
        assert torch.equal(labels, source.columns["labels"])
        return Afresh(scores[names], 0.1, labels, labels)

    monkeypatch.setattr(sampled, "train_afresh", network)
    collector: Any = SimpleNamespace(widths={"a": 3, "b": 2}, reservoir=own, task=CLASSES)
    measures, notes = {}, []  # type: ignore[var-annotated]
    options = DiagnoseOptions(control=True, seed=7, level=0.8)
    best = sampled.probe_measures(measures, notes, collector, options, {}, train if apart else None)
    assert set(asked) == set(scores)
    for judged in asked.values():
        assert (judged is not None) == apart
        if apart:
            torch.testing.assert_close(dict(judged[0]), named(own), rtol=0, atol=0)
            assert torch.equal(judged[1], own.columns["labels"])
    assert {n: m.value for n, m in measures.items()} == {
        "probe_features.a": 0.5, "probe_inputs.a": 0.6, "probe_features.b": 0.95, "alone.a": 0.6, "alone.b": 0.95,
        "retrained_without.a": 0.95, "retrained_without.b": 0.5, "retrained_all": 0.7,
    }  # fmt: skip
    low, high = stats.norm.interval(0.8, 0.6, 0.1)
    assert (measures["alone.a"].low, measures["alone.a"].high) == pytest.approx((low, high))
    assert measures["alone.b"].high == 1.0, "no accuracy is above 1"
    assert {name: found.score for name, found in best.items()} == {"a": 0.6, "b": 0.95}
    assert [note.split(" was ")[0] for note in notes] == ["Ability of b"]
    asked.clear(), measures.clear(), notes.clear()
    best = sampled.probe_measures(
        measures, notes, collector, DiagnoseOptions(seed=7), {"b": 0.3}, train if apart else None
    )
    assert (set(asked), list(best), measures["alone.b"], notes) == ({("a",), ("input.a",)}, ["a"], Measure(0.3), [])


def test_the_jackknife_of_a_mean_is_its_standard_error(generator: torch.Generator) -> None:
    x, places = torch.randn(40, generator=generator).double(), torch.randperm(40, generator=generator) % 5
    found = further._jackknife(lambda rows: float(x[rows].mean()), places, 0.8)
    error = stats.sem([float(x[places == k].mean()) for k in range(5)])
    low, high = stats.t.interval(0.8, 4, float(x.mean()), error)
    assert (found.value, found.error) == pytest.approx((float(x.mean()), error))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert further._jackknife(lambda rows: float(rows.sum()), places % 2, 0.8) == Measure(40.0), "of two groups"
    assert further._jackknife(lambda rows: math.nan, places, 0.8) == Measure(None)
    assert further._jackknife(lambda rows: 1.0 if rows.all() else math.nan, places, 0.8) == Measure(1.0)


def test_answers_without_labels_are_those_of_the_first_rows(generator: torch.Generator) -> None:
    x = torch.randn(30, 3, generator=generator)
    kept = Reservoir(99, 0)
    kept.add(0, {"x": x, "row": torch.arange(30), "place": torch.zeros(30).long()})
    collector: Any = SimpleNamespace(
        widths={"a": 2, "b": 1}, reservoir=kept, groups=1, places=lambda index, count: torch.zeros(count).long()
    )
    adapter: Any = SimpleNamespace(
        encode=lambda part: {"a": part[:, :2], "b": part[:, 2:]}, fuse=lambda f: torch.cat([3 * f["a"], f["b"]], 1)
    )
    for size, read in ((19, 20), (20, 20), (21, 30), (99, 30)):
        found = further.unlabelled_pass(adapter, enumerate(x.split(10)), collector, "mean", size, 0)
        assert (found.rows, len(found.kept.keys)) == (read, min(size, read))
        p, rows = torch.cat([3 * x[:, :2], x[:, 2:]], 1).double(), found.kept.columns["row"]
        mean = p.mean(0)
        for c, y in (
            (1, torch.cat([p[:, :2], mean[2:].expand(30, 1)], 1)),
            (2, torch.cat([mean[:2].expand(30, 2), p[:, 2:]], 1)),
        ):
            moved = (y.softmax(1) - p.softmax(1)).square().sum(1).float()
            torch.testing.assert_close(found.kept.columns["moved"][:, c], moved[rows], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "components"), [(200, {"a": 16, "b": 4}), (40, {"a": 4, "b": 4}), (20, {"a": 1, "b": 1}), (15, None)]
)
def test_information_takes_as_many_components_as_the_rows_allow(
    rows: int, components: Any, generator: torch.Generator
) -> None:
    """A quarter of the rows, less the classes, over the modalities; sixteen at most."""
    x, kept, arrays, notes = torch.randn(rows, 30, generator=generator), Reservoir(999, 0), {}, []
    kept.columns = {"x": x, "labels": torch.arange(rows) % 3}
    collector: Any = SimpleNamespace(widths={"a": 26, "b": 4}, reservoir=kept)
    measures: dict[str, Measure] = {}
    further.information_measures(measures, arrays, notes, collector, 0.9)
    assert arrays.get("information_components") == components
    assert (bool(measures), bool(notes)) == (components is not None, components is None)
    if measures:
        assert measures["distillation.a"].value == arrays["distillation"]["a"]["b"]


def test_responses_of_the_neurons_with_the_most_and_the_least_noise_of_others(generator: torch.Generator) -> None:
    """To the direction between classes that the neuron reads in its home modality, and to the loudest noise of another."""
    widths, labels = {"a": 3, "b": 2, "c": 4}, torch.arange(300) % 3
    x = torch.randn(300, 9, generator=generator) + 1.5 * torch.randn(3, 9, generator=generator)[labels] + 20
    head = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    w = head[0].weight.data.normal_(generator=generator).mul_(100)
    w[0], w[1, 3:] = 0.0, 0.0  # dead; and one without any noise of others, next to dead
    w[1] *= 1e-3
    head[0].bias.data = -(x @ w.t()).mean(0)
    kept = Reservoir(999, 0)
    kept.columns = {"x": x, "labels": labels}
    collector: Any = SimpleNamespace(layers=ChainSums(list(head), 1), reservoir=kept, task=CLASSES, widths=widths)
    for without in ({"widths": {"all": 9}}, {"labels": labels * 0}):  # nothing to tell apart
        kept.columns["labels"] = without.get("labels", labels)
        other: Any = SimpleNamespace(**vars(collector) | {"widths": without.get("widths", widths)})
        sampled.neuron_measures(measures := {}, arrays := {}, other)
        assert (list(measures), arrays) == (["attribution_entropy"], {})
    kept.columns["labels"] = labels
    arrays = {}
    sampled.neuron_measures({}, arrays, collector)
    signal, noise = signal_noise_shares(w, x, labels, widths)
    others = [float(n.sum() - n[s.argmax()]) for s, n in zip(signal, noise, strict=True)]
    shown = [k for k in range(2, 8) if signal[k].max() > 0.02]
    expected = [max(shown, key=lambda k: others[k]), min(shown, key=lambda k: others[k])]
    assert [found["neuron"] for found in arrays["responses"]] == expected
    parts, z = dict(zip("abc", (slice(3), slice(3, 5), slice(5, 9)), strict=True)), (x - x.mean(0)).double()
    means = torch.stack([z[labels == c].mean(0) for c in range(3)])[labels]
    for found in arrays["responses"]:
        k = found["neuron"]
        home, loudest = int(signal[k].argmax()), sorted(range(3), key=lambda i: -float(noise[k, i]))
        own, other = "abc"[home], "abc"[next(i for i in loudest if i != home)]
        assert (found["signal of"], found["noise of"]) == (own, other)
        between = means[:, parts[own]].t() @ means[:, parts[own]]
        predictive = z[:, parts[own]] @ between @ w[k, parts[own]].double()
        noisy = (z - means)[:, parts[other]] @ w[k, parts[other]].double()
        curve = neuron_response(head[:2](x)[:, k].detach(), predictive, noisy, bins=9)
        for name in ("centres", "predictive", "noisy", "overlap", "entangled"):
            np.testing.assert_allclose(found[name], getattr(curve, name), rtol=1e-4, atol=1e-5)


def test_without_scores_nothing_is_judged() -> None:
    collector: Any = SimpleNamespace(widths={"a": 3, "b": 2})
    found = evidence.verdicts_of(collector, given(), {}, None, "model", DiagnoseOptions())
    assert [(v.modality, v.kind, v.evidence) for v in found] == [
        ("a", "undecided", {"use_share": 0.3}), ("b", "undecided", {}),
    ]  # fmt: skip
