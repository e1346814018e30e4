"""Scores of groups of rows under weights, against those of the repeated rows, and the error of chance."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from diagnose_models import Toy
from sklearn.metrics import f1_score, r2_score, roc_auc_score
from torch import Tensor

from mmc_fast.diagnose import diagnose
from mmc_fast.diagnose.predictions import ConditionScores
from mmc_fast.diagnose.tasks import Task
from mmc_fast.testing import planted_head


def outputs_and_labels(random: np.random.Generator, kind: str) -> tuple[Tensor, Tensor]:
    """Of four conditions or draws."""
    outputs = torch.from_numpy(random.integers(-5, 5, size=(4, 300, 2)).astype(np.float32))  # ties
    if kind == "classes":
        return outputs, torch.from_numpy(random.integers(2, size=300))
    if kind == "survival":  # time and event, with ties
        return outputs[:, :, :1], torch.from_numpy(
            np.stack([random.integers(9, size=300), random.integers(2, size=300)], 1)
        )
    labels = torch.from_numpy(random.integers(2, size=(300, 2)))
    return outputs, labels if kind == "labels" else labels + torch.from_numpy(random.standard_normal((300, 2))).float()


def harrell(risk: np.ndarray, labels: np.ndarray) -> float:
    """Pair by pair."""
    right = pairs = 0.0
    for (t, event), r in zip(labels, risk, strict=True):
        if event:
            longer = (labels[:, 0] > t) | ((labels[:, 0] == t) & (labels[:, 1] == 0))
            pairs += longer.sum()
            right += ((risk < r) & longer).sum() + ((risk == r) & longer).sum() / 2
    return right / pairs


ORACLES = {
    "auroc": lambda y, t: roc_auc_score(t, y[:, 1] - y[:, 0]),
    "accuracy": lambda y, t: float((y.argmax(1) == t).mean()),
    "f1": lambda y, t: f1_score(t, y > 0, average="micro"),
    "macro_auroc": lambda y, t: roc_auc_score(t, y, average="macro"),
    "r2": lambda y, t: r2_score(t, y, multioutput="uniform_average"),
    "concordance": lambda y, t: harrell(y[:, 0], t),
    "own": lambda y, t: float((np.square(y - t) * (1 + t**2)).mean()),
}
KINDS = {"f1": "labels", "macro_auroc": "labels", "r2": "numbers", "own": "numbers", "concordance": "survival"}


@pytest.mark.parametrize("metric", list(ORACLES))
def test_weighted_scores_of_groups_are_those_of_the_repeated_rows(metric: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    kind = KINDS.get(metric, "classes")
    outputs, labels = outputs_and_labels(random, kind)
    places = torch.from_numpy(random.integers(4, size=300))
    function = (lambda y, t: ORACLES["own"](y.numpy(), t.numpy())) if metric == "own" else None
    task = Task(kind, metric, outputs.shape[2], function)
    drawn = [("coalition.0", 0), ("shuffled.0", 0), ("shuffled.0", 1), ("coalition.1", 0)]
    scores = ConditionScores(task, {"coalition.0": 1, "shuffled.0": 2, "coalition.1": 1}, 4, 300, seed)
    for index, rows in enumerate(torch.arange(300).split(70)):
        scores.add(index, {d: y[rows] for d, y in zip(drawn, outputs, strict=True)}, labels[rows], places[rows])
    weights = np.array([[2.0, 0, 1, 1], [1, 1, 1, 1]])
    found, effects = scores.scores(weights), scores.total_effects(weights)
    assert task.evaluate(outputs[0], labels) == pytest.approx(ORACLES[metric](outputs[0].numpy(), labels.numpy()))
    answers = [task.answers(y).double().numpy() for y in outputs]
    assert list(effects) == ["shuffled.0"]
    for r, w in enumerate(weights):
        rows = np.concatenate([np.flatnonzero(places.numpy() == k).repeat(int(w[k])) for k in range(4)])
        truth = labels.numpy()[rows]
        one = [ORACLES[metric](y[rows], truth) for y in outputs.numpy()]
        assert (found["coalition.0"][r], found["coalition.1"][r]) == pytest.approx((one[0], one[3]))
        if metric == "f1":  # of the hits of both draws together
            both = f1_score(
                np.tile(truth, (2, 1)), np.concatenate([y[rows] > 0 for y in outputs[1:3]]), average="micro"
            )
        assert found["shuffled.0"][r] == pytest.approx(both if metric == "f1" else (one[1] + one[2]) / 2)
        moved = np.mean([np.square(answers[d][rows] - answers[3][rows]).sum(1).mean() for d in (1, 2)])
        assert effects["shuffled.0"][r] == pytest.approx(moved / (2 * answers[3][rows].var(0).sum()))
        if metric == "f1":
            constant = [np.tile(answer, (len(rows), 1)) for answer in ([1, -1], [-1, 1], [1, 1])]
            best = max(ORACLES["f1"](y, truth) for y in constant)
            assert scores.chance(weights)[r] == pytest.approx(best)
        if metric == "accuracy":
            assert scores.chance(weights)[r] == pytest.approx(max(truth.mean(), 1 - truth.mean()))


def test_accuracy_by_one_logit(seed: int) -> None:
    random = np.random.default_rng(seed)
    y, labels = random.integers(-2, 3, size=(90, 1)) / 2, random.integers(2, size=90)  # with zeros, which say class 0
    scores = ConditionScores(Task("classes", "accuracy", 1), {"coalition.1": 1}, 1, 90, seed)
    scores.add(0, {("coalition.1", 0): torch.from_numpy(y)}, torch.from_numpy(labels), torch.zeros(90).long())
    assert scores.whole() == pytest.approx(((y[:, 0] > 0) == labels).mean())
    assert scores.seen_classes() == 2


def test_outputs_that_are_alike_but_for_rounding(seed: int) -> None:
    """Without any modality the order of batches must not look like knowledge, and outputs that do not vary move nowhere."""
    random = np.random.default_rng(seed)
    labels = torch.from_numpy(np.r_[0, 1, random.integers(2, size=98)])
    same = torch.full((100, 2), 3.0)
    for rounding, expected in ((1e-6, 0.5), (1e-2, 1.0)):
        near = same.clone()
        near[:, 1] += rounding * labels
        scores = ConditionScores(
            Task("classes", "auroc", 2), {"coalition.0": 1, "shuffled.0": 1, "coalition.1": 1}, 1, 9, seed
        )
        for index, rows in enumerate((labels == 0, labels == 1)):  # as a diagnosis that was killed between them
            again = ConditionScores(scores.task, scores.conditions, 1, 9, seed)
            again.load_state(scores.to_state())
            scores, one = again, {("coalition.0", 0): near[rows], ("shuffled.0", 0): near[rows] + 1}
            scores.add(index, one | {("coalition.1", 0): same[rows]}, labels[rows], labels[rows] * 0)
        assert scores.scores(np.ones((1, 1)))["coalition.0"] == [expected]
        assert scores.total_effects(np.ones((1, 1)))["shuffled.0"] == [0.0]


def test_recall_under_weights_counts_each_candidate_once(generator: torch.Generator) -> None:
    x = torch.randn(40, 6, generator=generator)
    x[:, 3:] = x[:, :3] + 0.5 * x[:, 3:]
    queries, candidates = (torch.nn.functional.normalize(part, dim=1) for part in x.chunk(2, 1))
    better = (queries @ candidates.t() > (queries * candidates).sum(1, keepdim=True)).sum(1).numpy()
    places = torch.arange(40) % 3
    task = Task("pairs", "recall@5", 6, lambda y, _: float(y.sum()))
    scores = ConditionScores(task, {"coalition.1": 1}, 3, 40, 0)
    scores.add(0, {("coalition.1", 0): x}, torch.zeros(40, 1), places)
    weights = np.array([[1.0, 1, 1], [0, 2, 1]])
    expected = [np.average(better < 5, weights=w[places.numpy()]) for w in weights]
    np.testing.assert_allclose(scores.scores(weights)["coalition.1"], expected)


@pytest.mark.parametrize("metric", ["auroc", "macro_auroc", "concordance"])
def test_error_of_chance_is_that_over_all_orders(metric: str) -> None:
    """A model within three of these of chance is not judged. No two samples are alike, and every order is as likely."""
    positive = {"auroc": [2], "macro_auroc": [2, 3, 0], "concordance": []}[metric]
    n, kind = 6, KINDS.get(metric, "classes")
    columns = [torch.arange(n) < p for p in positive]
    labels = (
        torch.stack([torch.arange(n), torch.ones(n)], 1) if metric == "concordance" else torch.stack(columns, 1).long()
    )
    outputs = {"auroc": 2, "macro_auroc": 3, "concordance": 1}[metric]
    scores = ConditionScores(Task(kind, metric, outputs), {"coalition.1": 1}, 1, n, 0)
    scores.add(
        0,
        {("coalition.1", 0): torch.zeros(n, outputs)},
        labels[:, 0] if metric == "auroc" else labels,
        torch.zeros(n).long(),
    )
    orders = [np.array(order) for order in itertools.permutations(range(n))]
    if metric == "concordance":
        expected = np.std([harrell(order, labels.numpy()) for order in orders])
    else:  # a label that nobody has says nothing
        expected = np.mean([np.std([roc_auc_score(c, order) for order in orders]) for c in columns if c.any()])
    assert scores.chance_error() == pytest.approx(expected, rel=1e-9)
    if metric == "concordance":  # a single event tells next to nothing
        one = ConditionScores(Task(kind, metric, outputs), {"coalition.1": 1}, 1, n, 0)
        labels[1:, 1] = 0
        one.add(0, {("coalition.1", 0): torch.zeros(n, outputs)}, labels, torch.zeros(n).long())
        assert 0.3 < one.chance_error() <= 0.5


def test_error_of_chance_of_sums(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = torch.from_numpy((random.random(400) < 0.3).astype(np.int64))
    found = ConditionScores(Task("classes", "accuracy", 2), {"coalition.1": 1}, 1, 400, seed)
    found.add(0, {("coalition.1", 0): torch.zeros(400, 2)}, labels, labels * 0)
    own = ConditionScores(
        Task("numbers", "own", 1, lambda y, t: float((y * t).mean())), {"coalition.1": 1}, 1, 400, seed
    )
    own.add(0, {("coalition.1", 0): torch.randn(400, 1)}, torch.randn(400, 1), labels * 0)
    assert own.chance_error() == pytest.approx(np.std(own._shuffled(), ddof=1))
    share = float((labels == 0).double().mean())
    assert found.chance_error() == pytest.approx(math.sqrt(share * (1 - share) / 400))


def test_a_model_at_chance_is_not_judged(seed: int) -> None:
    """Labels that nothing tells: what the model loses without a modality is noise."""
    planted = planted_head(seed, num_samples=600)
    random = torch.Generator().manual_seed(seed)
    rows = list(planted.features.values())
    undecided = 0
    for _ in range(5):
        labels = torch.randint(3, (600,), generator=random)
        d = diagnose(Toy(planted.head, planted.head), [(*rows, labels)], resamples=0, probes=False)
        undecided += {v.kind for v in d.verdicts} == {"undecided"}
    assert undecided >= 2  # one draw of labels in forty looks better than chance
    assert diagnose(planted, planted.batches(), resamples=0, probes=False).verdicts[0].kind != "undecided"
