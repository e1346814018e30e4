"""Calibration, shares of outputs, information and refitted heads, each against an independent computation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from diagnose_models import Toy

from mmc_fast.diagnose import diagnose
from mmc_fast.diagnose.alignment import EffectRows
from mmc_fast.diagnose.measures.calibration import brier_score, expected_calibration_error, silent_failures
from mmc_fast.diagnose.measures.information import (
    components,
    distillation_margin,
    gaussian_information,
    gaussian_pid,
    one_hot,
)  # fmt: skip
from mmc_fast.diagnose.measures.outputs import alignment, emap_outputs, output_shapley
from mmc_fast.diagnose.measures.refitted import class_variance_share, conditional_utilisation
from mmc_fast.diagnose.measures.reliance import Afresh
from mmc_fast.diagnose.measures.retrieval import recalled
from mmc_fast.diagnose.tasks import Task
from mmc_fast.errors import InputError
from mmc_fast.testing import planted_head


def test_calibration_by_hand(generator: torch.Generator) -> None:
    confidence = torch.rand(400, generator=generator, dtype=torch.float64)
    for bins, p in ((15, confidence), (8, (16 * confidence).ceil() / 16)):  # edges among the second
        odd = (p * bins).ceil() % 2 == 1
        correct = torch.rand(400, generator=generator) < torch.where(odd, 0.9, 0.1)  # too sure and too modest in turn
        expected = 0.0
        for b in range(bins):
            inside = (p > b / bins) & (p <= (b + 1) / bins)
            if inside.any():
                gap = correct[inside].double().mean() - p[inside].mean()
                expected += float(inside.double().mean() * gap.abs())
        assert expected_calibration_error(p, correct, bins) == pytest.approx(expected, abs=1e-12)
        assert bins != 15 or expected_calibration_error(p, correct) == pytest.approx(expected, abs=1e-12)
    assert expected_calibration_error(torch.ones(5), torch.ones(5, dtype=torch.bool)) == 0
    p = torch.rand(60, 4, generator=generator, dtype=torch.float64).softmax(1)
    y = torch.randint(4, (60,), generator=generator)
    by_hand = [sum((p[n, c] - float(c == y[n])) ** 2 for c in range(4)) for n in range(60)]
    torch.testing.assert_close(brier_score(p, y), torch.stack(by_hand))
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    two = torch.rand(60, generator=generator, dtype=torch.float64)
    truth = torch.randint(2, (60,), generator=generator)
    ours = brier_score(torch.stack([1 - two, two], 1), truth).mean() / 2
    assert float(ours) == pytest.approx(metrics.brier_score_loss(truth.numpy(), two.numpy()))
    for bad in ((confidence, correct[:3]), (confidence, correct, 0), (confidence[:0], correct[:0]), (p, p > 0)):
        with pytest.raises(InputError, match=r"give two \[N\]"):
            expected_calibration_error(*bad)
    assert expected_calibration_error(confidence, correct, 1) == pytest.approx(
        float((correct.double().mean() - confidence.mean()).abs())
    )
    with pytest.raises(InputError, match=r"give \[N, C\] and \[N\]"):
        brier_score(p, y[:3])


def test_silent_failures() -> None:
    right = torch.tensor([True, True, True, False])
    without = torch.tensor([False, False, True, False])
    confidence = torch.tensor([0.95, 0.5, 0.99, 0.99])
    assert silent_failures(right, without, confidence).tolist() == [True, False, False, False]
    assert silent_failures(right, without, confidence, 0.5).tolist() == [True, True, False, False]


def test_output_shapley_averages_over_orders(generator: torch.Generator) -> None:
    """Against the definition: the mean over all orders of what each modality adds."""
    moved = torch.rand(8, generator=generator, dtype=torch.float64).numpy()
    moved[-1], moved[0] = 0.0, 2.0
    expected = np.zeros(3)
    for order in itertools.permutations(range(3)):
        inside = 0
        for i in order:
            expected[i] += (moved[inside] - moved[inside | 1 << i]) / 6
            inside |= 1 << i
    np.testing.assert_allclose(output_shapley(moved), expected / 2.0)
    assert output_shapley(moved).sum() == pytest.approx(1)
    assert np.isnan(output_shapley(np.zeros(4))).all()


def test_alignment_is_a_correlation_without_the_noise_of_the_replacements(generator: torch.Generator) -> None:
    """Against numpy on clipped columns, and against the correlation that no replacement disturbs."""
    e, a = torch.randn(500, 3, generator=generator), torch.randn(500, 3, generator=generator).exp()
    e += 0.2 * a

    def clipped(x: torch.Tensor) -> np.ndarray:
        x = x.double().numpy()
        return np.clip(x, *np.quantile(x, [0.05, 0.95], axis=0))

    x, y = clipped(e), clipped(a)
    x, y = (v - v.mean(0) for v in (x, y))
    expected = (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y)
    counts = np.random.default_rng(3).multinomial(500, np.full(500, 1 / 500), size=4)
    value, drawn = alignment(e, a, 4, counts)
    assert value == pytest.approx(expected * math.sqrt(1.25))
    rows = [np.repeat(np.arange(500), c) for c in counts]
    again = [(x[i] * y[i]).sum() / np.linalg.norm(x[i]) / np.linalg.norm(y[i]) * math.sqrt(1.25) for i in rows]
    np.testing.assert_allclose(drawn, again)
    signal, rest = torch.randn(2, 40_000, 1, generator=generator)
    effect = signal + rest
    other = effect[torch.randperm(40_000, generator=generator)]
    assert alignment(effect - other, signal)[0] == pytest.approx(math.sqrt(0.5), abs=0.03)
    assert math.isnan(alignment(torch.zeros(9, 2), torch.randn(9, 2))[0])
    assert alignment(-a, a, 1)[0] == -1, "cut off at what a correlation can be"


@pytest.mark.parametrize("kind", ["classes", "one logit", "labels", "numbers"])
def test_effects_meet_the_answers_of_a_probe_on_the_same_scale(kind: str, generator: torch.Generator) -> None:
    """What moves the outputs is what the probe says, so the alignment is 1, whichever scale the probe answers on."""
    logits = torch.randn(400, 2, generator=generator)[:, : 1 if kind == "one logit" else 2]
    task = {
        "classes": Task("classes", "accuracy", 2), "one logit": Task("classes", "auroc", 1),
        "labels": Task("labels", "f1", 2), "numbers": Task("numbers", "r2", 2),
    }[kind]  # fmt: skip
    both = torch.cat([torch.zeros_like(logits), logits], 1) if kind == "one logit" else logits
    answers = logits if kind in ("labels", "numbers") else both.softmax(1)
    rows, beside = EffectRows(task, ["a", "b"], 300, 0), torch.randn(logits.shape, generator=generator)
    for index, part in enumerate(torch.arange(400).split(100)):
        outputs = {("coalition.3", 0): (logits + beside)[part]}
        outputs |= {("shuffled.0", draw): beside[part] for draw in range(2)} | {("shuffled.1", 0): logits[part]}
        rows.add(index, outputs)
    kept = torch.cat([rows.kept._drawn(i, 100) for i in range(4)]).argsort()[:300]
    half = torch.arange(0, 300, 2)
    probes = {"a": Afresh(0.9, 0.1, answers[kept[half]], half)}
    assert rows.measures(probes, 20, 0.95)["alignment.a"].value == pytest.approx(1, abs=1e-3)
    assert "alignment.b" not in rows.measures(probes, 20, 0.95)
    probes["b"] = Afresh(0.5, 0.1, answers[kept], torch.arange(300))
    assert abs(rows.measures(probes, 20, 0.95)["alignment.b"].value or 0.0) < 0.35


def test_emap_is_the_additive_part(generator: torch.Generator) -> None:
    a, b = torch.randn(30, 3, generator=generator), torch.randn(30, 2, generator=generator)
    w, v = torch.randn(3, 4, generator=generator), torch.randn(2, 4, generator=generator)

    def fuse(f):
        return (f["a"] @ w).tanh() + (f["b"] @ v) + (f["a"] @ w) * (f["b"] @ v)

    every = torch.stack(
        [torch.stack([fuse({"a": a[i : i + 1], "b": b[j : j + 1]})[0] for j in range(30)]) for i in range(30)]
    )
    expected = every.mean(1) + every.mean(0) - every.mean((0, 1))  # Hessel and Lee, algorithm 1
    torch.testing.assert_close(emap_outputs(fuse, {"a": a, "b": b}), expected.double(), rtol=1e-4, atol=1e-5)
    c = torch.randn(30, 2, generator=generator)

    def additive(f):
        return (f["a"] @ w).tanh() + (f["b"] @ v).exp() - (f["c"] @ v)

    three = {"a": a, "b": b, "c": c}
    for partners in (None, 7):
        found = emap_outputs(additive, three, partners, generator)
        torch.testing.assert_close(found, additive(three).double(), rtol=1e-4, atol=1e-4)
    some = [emap_outputs(fuse, {"a": a, "b": b}, 7, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert (torch.equal(some[0], some[1]), torch.equal(some[0], some[2])) == (True, False), "partners are drawn"


def test_information_of_gaussians_is_unbiased(generator: torch.Generator) -> None:
    """Closed form of a known covariance; few rows, so that the plain estimate would be far too large."""
    mix = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    covariance = mix @ mix.t() + 2 * torch.eye(5, dtype=torch.float64)
    truth = 0.5 * float(torch.logdet(covariance[:3, :3]) + torch.logdet(covariance[3:, 3:]) - torch.logdet(covariance))
    root = torch.linalg.cholesky(covariance)
    found, plain = [], []
    for _ in range(600):
        x = torch.randn(25, 5, generator=generator, dtype=torch.float64) @ root.t()
        found.append(gaussian_information(x[:, :3], x[:, 3:]))
        s = torch.cov(x.t())
        plain.append(0.5 * float(torch.logdet(s[:3, :3]) + torch.logdet(s[3:, 3:]) - torch.logdet(s)))
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - truth) < 4 * error
    assert np.mean(plain) - truth > 8 * error
    x = torch.randn(200, 5, generator=generator, dtype=torch.float64) @ root.t()
    change = torch.randn(3, 3, generator=generator, dtype=torch.float64) * 100
    assert gaussian_information(x[:, :3] @ change, x[:, 3:]) == pytest.approx(gaussian_information(x[:, :3], x[:, 3:]))
    assert gaussian_information(x[:, :3] + 1e8, x[:, 3:] - 1e8) == pytest.approx(
        gaussian_information(x[:, :3], x[:, 3:]), abs=1e-5
    )
    assert gaussian_information(x[:, :0], x[:, 3:]) == 0, "of nothing"
    assert math.isnan(gaussian_information(torch.zeros(200, 1), x[:, 3:]))
    for a, b in ((x[:6, :3], x[:6, 3:]), (x[:50, :3], x[:40, 3:]), (x[:, 0], x[:, 3:])):
        with pytest.raises(InputError, match=r"N > p \+ q \+ 1"):
            gaussian_information(a, b)
    assert math.isfinite(gaussian_information(x[:7, :3], x[:7, 3:]))


def test_margin_of_distillation_and_its_jackknife(generator: torch.Generator) -> None:
    """I(T; S) − I(S; Y) by its parts; the error by leaving each of 16 groups of rows out."""
    student = torch.randn(200, 2, generator=generator) + 3
    teacher = student @ torch.randn(2, 3, generator=generator) + torch.randn(200, 3, generator=generator)
    target = student[:, :1] + 2 * torch.randn(200, 1, generator=generator)

    def margin(rows: torch.Tensor) -> float:
        t, s, y = teacher[rows], student[rows], target[rows]
        return gaussian_information(t, s) - gaussian_information(s, y)

    found = distillation_margin(teacher, student, target)
    assert found.value == pytest.approx(margin(torch.arange(200)))
    left_out = np.array([margin((torch.arange(200) % 16 != k).nonzero()[:, 0]) for k in range(16)])
    assert found.error == pytest.approx(np.sqrt(15) * left_out.std())


def test_parts_of_information_on_known_truth(generator: torch.Generator) -> None:
    n = 4000
    s, a, b, noise = torch.randn(4, n, 1, generator=generator, dtype=torch.float64)
    shared = gaussian_pid(s + 0.1 * a, s + 0.1 * b, s + 0.5 * noise)
    assert shared.redundancy.value > 0.5
    assert max(shared.unique.value, shared.unique_rest.value, shared.synergy.value) < 0.1
    own = gaussian_pid(a, b, a + 0.5 * noise)
    assert own.unique.value == pytest.approx(0.5 * math.log(1 + 4), abs=5 * own.unique.error)
    assert abs(own.redundancy.value) < 5 * own.redundancy.error + 0.01
    joint = gaussian_pid(a, a + s, s + 0.1 * noise)  # a alone says nothing, and cleans a + s
    assert joint.synergy.value > 1
    assert abs(joint.unique.value) < 0.01
    total = gaussian_information(torch.cat([a, a + s], 1), s + 0.1 * noise)
    parts = (joint.redundancy, joint.unique, joint.unique_rest, joint.synergy)
    assert sum(p.value for p in parts) == pytest.approx(total)


def test_the_jackknife_error_is_the_spread_over_samples(generator: torch.Generator) -> None:
    values, errors = [], []
    for _ in range(200):
        x = torch.randn(160, 1, generator=generator, dtype=torch.float64)
        y = x + torch.randn(160, 1, generator=generator, dtype=torch.float64)
        found = distillation_margin(x, y, torch.randn(160, 1, generator=generator, dtype=torch.float64))
        values.append(found.value)
        errors.append(found.error)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.2)
    assert np.mean(values) == pytest.approx(0.5 * math.log(2), abs=0.03)


def test_components_and_one_hot(generator: torch.Generator) -> None:
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    x = torch.cat([x, x[:, :2], torch.ones(50, 1)], 1)
    found = components(x, 20)
    assert found.shape == (50, 6)
    torch.testing.assert_close(torch.cov(found.t()), torch.eye(6, dtype=torch.float64), atol=1e-8, rtol=0)
    torch.testing.assert_close(components(1e-9 * x, 20).abs(), found.abs())
    assert components(x, 4).shape == (50, 4)
    assert components(torch.randn(50, 20, generator=generator)).shape == (50, 16)
    assert components(torch.ones(9, 3)).shape == (9, 0)
    assert one_hot(torch.tensor([3, 7, 7, 9])).tolist() == [[1, 0], [0, 1], [0, 1], [0, 0]]


def test_conditional_utilisation(generator: torch.Generator) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    y = torch.randint(3, (1500,), generator=generator)
    strong = torch.nn.functional.one_hot(y, 3) + 0.1 * torch.randn(1500, 3, generator=generator)
    noise = torch.randn(1500, 3, generator=generator)
    found = conditional_utilisation({"strong": strong, "noise": noise}, y)
    assert found["strong"].value == pytest.approx(2 / 3, abs=0.08)  # from 1 down to chance
    assert abs(found["noise"].value) < 0.02
    twice = conditional_utilisation({"strong": strong * 1000, "noise": noise}, y)
    assert twice["strong"].value == pytest.approx(found["strong"].value, abs=1e-6)
    redundant = conditional_utilisation({"strong": strong, "copy": strong + 0}, y)
    assert max(abs(i.value) for i in redundant.values()) < 0.02


def test_class_variance_share(generator: torch.Generator) -> None:
    x = torch.randn(90, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (90,), generator=generator)
    within = sum(float((x[y == c] - x[y == c].mean(0)).square().sum()) for c in range(3))
    total = float((x - x.mean(0)).square().sum())
    assert class_variance_share(x, y) == pytest.approx(1 - within / total)
    assert math.isnan(class_variance_share(torch.ones(5, 2), torch.arange(5)))


def test_what_remains_of_the_fused_representation() -> None:
    """Rank and share of the classes, of what enters the last layer; without a modality that nobody reads both stay."""
    planted = planted_head(4, ignored=1, num_samples=900)
    d = diagnose(planted, planted.batches(300), remaining=True, emap=True, probes=False, resamples=0)
    hidden = planted.head[:2](torch.cat(list(planted.features.values()), 1).double().float()).double()
    centred = hidden - hidden.mean(0)
    p = torch.linalg.svdvals(centred)
    rank = float(torch.special.entr(p / p.sum()).sum().exp())
    between = sum(int((planted.classes == c).sum()) * centred[planted.classes == c].mean(0).square() for c in range(3))
    share = float(between.sum() / centred.square().sum())
    for name in ("all", "b"):
        assert d.value(f"remaining.rank.{name}") == pytest.approx(rank, rel=1e-4)
        assert d.value(f"remaining.eta2.{name}") == pytest.approx(share, rel=1e-4)
    assert d.value("remaining.rank.a") == pytest.approx(rank, rel=0.1), "other rows, not one for all"
    assert d.value("remaining.eta2.a") < 0.1 * share
    first = planted.fuse(planted.encode(torch.arange(300))).argmax(1) == planted.classes[:300]
    assert d.value("emap.all") == pytest.approx(float(first.double().mean()))
    assert d.settings["emap_rows"] == 300
    x = torch.randn(2, 300, 1, generator=torch.Generator().manual_seed(0))
    for fuse, left in ((lambda f: f["image"] * f["audio"], 0.5), (lambda f: f["image"] + f["audio"], 1.0)):
        toy = Toy(torch.nn.Identity())
        toy.fuse = fuse  # type: ignore[method-assign]
        labels = (fuse({"image": x[0], "audio": x[1]})[:, 0] > 0).long()
        d = diagnose(toy, [(*x, labels)], emap=True, probes=False, resamples=0, agop=False)
        assert (d.value("emap.all"), d.value("emap.score")) == (1.0, pytest.approx(left, abs=0.15))


@pytest.mark.parametrize("k", [1, 5])
def test_recall_of_a_sorted_list(k: int, generator: torch.Generator) -> None:
    queries, candidates = torch.randn(2, 60, 3, generator=generator, dtype=torch.float64)
    candidates[:30] += 2 * queries[:30]
    found = recalled(torch.cat([queries, candidates], 1), k)
    for row in range(60):
        cosine = torch.cosine_similarity(queries[row].expand(60, -1), candidates)
        assert found[row] == float(row in cosine.argsort(descending=True)[:k])
    assert recalled(torch.ones(60, 6), k).mean() == pytest.approx(k / 60), "all alike: any order"
    one_tie = torch.tensor(
        [[1.0, 0.0, 0.6, 0.8], [0.6, -0.8, 0.6, -0.8]]
    )  # both candidates are as near to the first query
    assert recalled(one_tie, 1).tolist() == [0.5, 1.0]
    scaled = torch.cat([queries, 100 * candidates], 1)
    torch.testing.assert_close(recalled(scaled, k), found)
    with pytest.raises(InputError, match="side by side"):
        recalled(torch.ones(60, 5), k)


def test_two_towers_by_retrieval(generator: torch.Generator) -> None:
    """Both towers are needed: without one, its partner is found by chance; a third modality moves nothing."""
    shared = torch.randn(400, 4, generator=generator)
    image, text = (shared + 0.3 * torch.randn(400, 4, generator=generator) for _ in range(2))

    class Towers:
        def encode(self, batch):
            return {"image": batch[0], "text": batch[1], "place": batch[2]}

        def fuse(self, features):
            return torch.cat([features["image"], features["text"] + 0 * features["place"][:, :4]], 1)

    place = torch.randn(400, 5, generator=generator)
    loader = list(zip(image.split(64), text.split(64), place.split(64), torch.arange(400).split(64), strict=True))
    d = diagnose(Towers(), loader, metric="recall@5")
    assert (d.metric, d.settings["task"]) == ("recall@5", "pairs")
    assert d.value("score.all") == pytest.approx(float(recalled(torch.cat([image, text], 1), 5).mean()))
    assert d.value("score.chance") == pytest.approx(5 / 400, abs=0.01)
    assert d.value("shuffled.text") == pytest.approx(5 / 400, abs=0.02)
    assert d["score.all"].low < d.value("score.all") < d["score.all"].high
    assert [v.kind for v in d.verdicts] == ["relied on", "relied on", "uninformative"]
