"""Losses, answers and scores of every kind of task against scikit-learn, torch distributions and counting."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from sklearn.metrics import average_precision_score, f1_score, mean_absolute_error, r2_score, roc_auc_score
from sklearn.utils.class_weight import compute_class_weight
from torch.distributions import Bernoulli, Categorical, kl_divergence

from mmc_fast.diagnose.statistics import weighted_scores
from mmc_fast.errors import InputError
from mmc_fast.experiments.tasks import Classification, MultiLabel, Regression, Survival, task_from_dict
from mmc_fast.experiments.training.experts import ExpertProduct

NAMES = ("u", "v", "w")


def draw(seed: int, rows: int = 60):
    g = torch.Generator().manual_seed(seed)
    outputs, labels = torch.randn(rows, 3, generator=g), (torch.rand(rows, 3, generator=g) < 0.4).long()
    labels[:2] = torch.tensor([[0, 0, 0], [1, 1, 1]])
    return g, outputs, labels


def test_class_weights_are_those_of_scikit_learn(seed):
    g, outputs, _ = draw(seed)
    labels = torch.cat([torch.arange(3), torch.randint(3, (57,), generator=g)])
    task = Classification(NAMES).weighted(labels)
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    assert task.weights == pytest.approx(wanted.tolist())
    each = -outputs.log_softmax(1)[torch.arange(60), labels] * torch.tensor(wanted, dtype=torch.float32)[labels]
    torch.testing.assert_close(task.loss(outputs, labels), each.sum())
    torch.testing.assert_close(task.loss(outputs, labels, "mean"), each.mean())
    torch.testing.assert_close(task.loss(outputs, labels, "none"), each)


def test_several_labels_have_the_loss_and_scores_of_their_own_classifiers(seed):
    _, outputs, labels = draw(seed)
    task = MultiLabel(NAMES)
    p, y = task.answers(outputs), labels.numpy()
    each = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean(1)
    torch.testing.assert_close(task.loss(outputs, labels), each.sum())
    found = task.scores(p, labels)
    auc = [roc_auc_score(y[:, j], p[:, j]) for j in range(3)]
    assert found["score"] == pytest.approx(np.mean(auc))
    assert found["macro_auprc"] == pytest.approx(np.mean([average_precision_score(y[:, j], p[:, j]) for j in range(3)]))
    assert found["micro_auprc"] == pytest.approx(average_precision_score(y.ravel(), p.numpy().ravel()))
    assert found["f1"] == pytest.approx(f1_score(y, outputs.numpy() > 0, average="micro"))
    without = labels.clone()
    without[:, 1] = 0  # a label without positives has no AUC
    assert task.score(p, without) == pytest.approx((auc[0] + auc[2]) / 2)
    weights = np.stack([np.ones(60), np.arange(60.0)])
    each_label = [[roc_auc_score(y[:, j], p[:, j], sample_weight=w) for j in range(3)] for w in weights]
    np.testing.assert_allclose(weighted_scores("macro_auroc", y, p.numpy(), weights), np.mean(each_label, 1))


def test_weights_of_several_labels_make_positives_count_as_much_as_negatives(seed):
    _, _, labels = draw(seed)
    task = MultiLabel(NAMES).weighted(labels)
    even = torch.zeros(60, 3)  # every entry costs log 2
    for j in range(3):
        task_j = MultiLabel(("u",), (task.weights[j],))
        cost = task_j.loss(even[:, :1], labels[:, j : j + 1], "none")
        assert float(cost[labels[:, j] == 1].sum()) == pytest.approx(float(cost[labels[:, j] == 0].sum()), rel=1e-5)


def test_the_divergence_of_labels_is_that_of_bernoulli_distributions(seed):
    g, outputs, _ = draw(seed)
    target = torch.randn(60, 3, generator=g)
    wanted = kl_divergence(Bernoulli(logits=target), Bernoulli(logits=outputs)).mean(1).sum()
    torch.testing.assert_close(MultiLabel(NAMES).divergence(outputs, target), wanted)


def test_a_regression_is_standardised_by_its_training_rows(seed):
    g, outputs, _ = draw(seed)
    labels = torch.randn(60, 3, generator=g, dtype=torch.float64) * torch.tensor([1.0, 1e6, 1e-6]) + 1e3
    task = Regression(NAMES).fit(labels[:40])
    answers = task.answers(outputs)
    mean, std = labels[:40].numpy().mean(0), labels[:40].numpy().std(0)
    np.testing.assert_allclose(answers.numpy(), outputs.double().numpy() * std + mean)
    wanted = (((answers - labels) / torch.tensor(std)) ** 2).mean(1).sum()
    torch.testing.assert_close(task.loss(outputs, labels).double(), wanted, rtol=1e-4, atol=1e-4)
    found = task.scores(answers, labels)
    assert found["score"] == pytest.approx(r2_score(labels, answers))
    assert found["mae"] == pytest.approx(mean_absolute_error(labels, answers))
    assert found["rmse"] == pytest.approx(float((answers - labels).square().mean(0).sqrt().mean()))
    torch.testing.assert_close(task.answers(task.prior(labels[:40])[None])[0], torch.tensor(mean))
    weights = np.stack([np.ones(60), np.arange(60.0)])
    wanted = [r2_score(labels, answers, sample_weight=w) for w in weights]
    np.testing.assert_allclose(weighted_scores("r2", labels.numpy(), answers.numpy(), weights), wanted, rtol=1e-3)


def test_the_prior_of_classes_and_labels_is_their_share(seed):
    _, _, labels = draw(seed)
    task = MultiLabel(NAMES)
    torch.testing.assert_close(task.answers(task.prior(labels)), labels.float().mean(0))
    classes = labels[:, 0]
    task = Classification(("no", "yes"))
    share = classes.float().mean()
    torch.testing.assert_close(task.answers(task.prior(classes)), torch.stack([1 - share, share]))


def times(seed: int, rows: int = 80) -> torch.Tensor:
    """Times in steps, so that some are equal, and about a third censored."""
    g = torch.Generator().manual_seed(seed)
    time = (torch.rand(rows, generator=g, dtype=torch.float64) * 30).round() / 2 + 0.5
    return torch.stack([time, (torch.rand(rows, generator=g) < 0.65).double()], 1)


def test_the_loss_of_survival_is_the_likelihood_row_by_row(seed):
    labels = times(seed)
    labels[0] = torch.tensor([0.0, 1.0])  # the first interval holds an event at time 0
    task = Survival(("days", "died")).fit(labels)
    g = torch.Generator().manual_seed(seed)
    outputs = torch.randn(80, task.outputs, generator=g)
    assert task.edges[-1] == float(labels[labels[:, 1] == 1, 0].max())
    hazard, wanted = outputs.double().sigmoid(), []
    for row, (time, event) in enumerate(labels.tolist()):
        log, begin = 0.0, -1.0
        for k, end in enumerate(task.edges):
            if event and begin < time <= end:
                log += float(hazard[row, k].log())
                break
            if time < end:
                break
            log += float((1 - hazard[row, k]).log())
            begin = end
        wanted.append(-log)
    np.testing.assert_allclose(task.loss(outputs, labels, "none").numpy(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(task.answers(outputs), (1 - hazard).cumprod(1))
    prior = task.prior(labels)[None].repeat(80, 1).requires_grad_()
    task.loss(prior, labels).backward()  # the prior is the best answer that is the same for all rows
    assert prior.grad is not None
    torch.testing.assert_close(prior.grad.sum(0), torch.zeros(task.outputs), rtol=0, atol=1e-3)


def test_the_divergence_of_survival_is_that_of_the_interval_of_the_event(seed):
    task = Survival(("days", "died")).fit(times(seed))
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 9, task.outputs, generator=g, dtype=torch.float64)

    def shares(outputs):
        curve = torch.cat([torch.ones(9, 1, dtype=torch.float64), (1 - outputs.sigmoid()).cumprod(1)], 1)
        return torch.cat([curve[:, :-1] - curve[:, 1:], curve[:, -1:]], 1)

    wanted = (shares(b) * (shares(b).log() - shares(a).log())).sum()
    torch.testing.assert_close(task.divergence(a, b), wanted)


def test_concordance_by_counting_pairs_also_with_weights(seed):
    labels = times(seed, 40)
    task = Survival(("days", "died")).fit(labels)
    answers = task.answers(torch.randn(40, task.outputs, generator=torch.Generator().manual_seed(seed)))
    curves = np.concatenate([np.ones((40, 1)), answers.numpy()], 1)
    risk = -torch.tensor(trapezoid(curves, [0.0, *task.edges]))
    torch.testing.assert_close(task.scored(answers), risk)  # short lives are high risks
    plain = risk.numpy().copy()
    risk[:10] = risk[10:20]  # ties
    weights = np.stack([np.ones(40), np.arange(40.0)])
    wanted = []
    for w in weights:
        right = pairs = 0.0
        for i in range(40):
            for j in range(40):
                (t, event), (u, other) = labels[i].tolist(), labels[j].tolist()
                if event and (t < u or (t == u and not other)):
                    pairs += w[i] * w[j]
                    right += w[i] * w[j] * (float(risk[i] > risk[j]) + 0.5 * float(risk[i] == risk[j]))
        wanted.append(right / pairs)
    found = weighted_scores("concordance", labels.numpy(), risk.numpy(), weights)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert task.score(answers, labels) == pytest.approx(
        float(weighted_scores("concordance", labels.numpy(), plain, np.ones((1, 40)))[0]),
        rel=1e-5,
    )
    with pytest.raises(InputError, match="nobody outlived an event"):
        task.score(answers[:2], torch.tensor([[3.0, 0.0], [1.0, 0.0]], dtype=torch.float64))


def fitted(kind: str, seed: int):
    """A task, its labels and outputs of two models."""
    g, outputs, several = draw(seed)
    task, labels = {
        "classes": (Classification(NAMES), several.argmax(1)),
        "labels": (MultiLabel(NAMES), several),
        "numbers": (Regression(NAMES), outputs.double() * 3 + 5 + torch.randn(60, 3, generator=g)),
        "times": (Survival(("days", "died")), times(seed, 60)),
    }[kind]
    task = task.fit(labels)
    return task, labels, torch.randn(2, 60, task.outputs, generator=g)


@pytest.mark.parametrize("kind", ["classes", "labels", "numbers", "times"])
def test_a_divergence_is_summed_over_rows_and_zero_from_itself(kind, seed):
    task, _, outputs = fitted(kind, seed)
    assert float(task.divergence(outputs[0], outputs[0])) == pytest.approx(0, abs=1e-4)
    parts = [float(task.divergence(outputs[0, n : n + 1], outputs[1, n : n + 1])) for n in range(60)]
    assert min(parts) > 0
    assert float(task.divergence(*outputs)) == pytest.approx(sum(parts), rel=1e-4)
    if kind == "classes":
        wanted = kl_divergence(Categorical(logits=outputs[1]), Categorical(logits=outputs[0])).sum()
        assert sum(parts) == pytest.approx(float(wanted), rel=1e-4)
    if kind == "numbers":
        assert sum(parts) == pytest.approx(float(np.square(np.subtract(*outputs.numpy())).mean(1).sum()), rel=1e-4)


def test_what_a_drawn_split_holds_in_equal_shares(seed):
    task, labels, _ = fitted("numbers", seed)
    fifths = task.strata(labels.numpy())
    assert np.bincount(fifths).tolist() == [12] * 5
    assert (np.diff(fifths[np.argsort(labels[:, 0].numpy())]) >= 0).all()
    task, labels, _ = fitted("labels", seed)
    y = labels.numpy() * np.array([1, 0, 1]) + np.eye(60, 3, dtype=int)[:, [1, 0, 2]] * np.array([0, 1, 0])
    rare = sorted(range(3), key=lambda j: (y[:, j].sum(), j))
    wanted = [next((n for n, j in enumerate(rare, start=1) if row[j]), 0) for row in y]
    assert task.strata(y).tolist() == wanted
    assert fitted("times", seed)[0].strata(np.array([[3.0, 1.0], [1.0, 0.0]])).tolist() == [1, 0]


@pytest.mark.parametrize("kind", ["classes", "labels", "numbers", "times"])
def test_columns_of_a_table_are_named_and_in_order(kind, seed):
    task, _, outputs = fitted(kind, seed)
    answers = task.answers(outputs[0])
    found = task.columns(answers)
    p = answers.numpy()
    if kind == "times":
        assert found["prediction"].tolist() == pytest.approx((-task.scored(answers)).tolist())
        assert list(found)[1:] == [f"s_{edge:g}" for edge in task.edges]
    elif kind == "numbers":
        assert list(found) == [f"prediction_{name}" for name in NAMES]
        assert list(Regression(("y",)).columns(answers[:, :1])) == ["prediction"]
    else:
        assert list(found) == ["prediction", *(f"p_{name}" for name in NAMES)]
        guess = {
            "classes": [NAMES[n] for n in p.argmax(1)],
            "labels": ["+".join(np.array(NAMES)[row > 0.5]) for row in p],
        }[kind]
        assert found["prediction"] == guess
    values = list(found.values())[0 if kind == "numbers" else 1 :]
    np.testing.assert_array_equal(np.stack(values, 1), p)


def test_a_probability_of_one_half_is_no_label():
    p, y = torch.tensor([[0.5, 0.6, 0.5], [0.7, 0.4, 0.5]]), torch.tensor([[0, 1, 0], [1, 0, 1]])
    assert MultiLabel(NAMES).columns(p)["prediction"] == ["v", "u"]
    assert MultiLabel(NAMES).scores(p, y)["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1))  # two hits, one label missed


def test_a_model_fits_data_of_its_kind_with_the_same_names_in_order():
    assert MultiLabel(NAMES).fits(MultiLabel(NAMES, (1.0, 2.0, 3.0)))
    assert not MultiLabel(NAMES).fits(MultiLabel(NAMES[::-1]))
    assert not MultiLabel(NAMES).fits(Regression(NAMES))


def test_where_a_score_is_defined():
    yes = torch.tensor
    assert [Classification.of(2).scorable(yes(y).long()) for y in ([], [1], [1, 1], [0, 1])] == [
        False,
        False,
        False,
        True,
    ]
    assert [Classification.of(3).scorable(yes(y).long()) for y in ([], [1])] == [False, True]
    assert [t.unscored for t in (Classification.of(2), Classification.of(3), Regression(("y",)), MultiLabel(NAMES))] == [
        0.5, 0.0, 0.0, 0.5
    ]  # fmt: skip
    both, one = yes([[0, 1], [1, 1]]), yes([[0, 1], [0, 1]])
    assert [MultiLabel(("u", "v")).scorable(y) for y in (both, one)] == [True, False]
    assert [Regression(("y", "z")).scorable(y.double()) for y in (both, both.t(), yes([[0, 1], [1, 0]]))] == [
        False, False, True
    ]  # fmt: skip
    survival = Survival(("t", "e"))
    for rows, defined in (
        ([[1, 1], [2, 0]], True), ([[1, 1], [1, 0]], True), ([[1, 1], [1, 1]], False), ([[2, 1], [1, 0]], False),
        ([[1, 0], [2, 0]], False), ([[1, 1], [2, 1]], True),
    ):  # fmt: skip
        assert survival.scorable(yes(rows).double()) == defined, rows


def test_labels_at_the_ends_of_their_range():
    three = Classification.of(3)
    three.check(torch.tensor([0, 2]), "d")
    Classification.of(2, "auroc").check(torch.tensor([0, 1]), "d")
    for wrong in ([0, 3], [-1, 2]):
        with pytest.raises(InputError, match="is out of range; allowed are 0 to 2"):
            three.check(torch.tensor(wrong), "d")
    with pytest.raises(InputError, match="needs at least 2"):
        Classification.of(1).check(torch.tensor([0]), "d")
    with pytest.raises(InputError, match="is for 2 classes and there are 3"):
        Classification.of(3, "auroc").check(torch.tensor([0]), "d")
    survival = Survival(("t", "e"))
    survival.check(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64), "d")
    for wrong in ([1.0, 0.5], [-0.1, 1.0], [1.0, 2.0]):
        with pytest.raises(InputError, match="in row 1; a time is at least 0"):
            survival.check(torch.tensor([[0.0, 1.0], wrong], dtype=torch.float64), "d")
    three.check_part(torch.tensor([0, 2]), "test", "d")
    for task, part in ((three, "train"), (Classification.of(2, "auroc"), "test")):
        with pytest.raises(InputError, match=f"class 1 has no row in the {part} part"):
            task.check_part(torch.tensor([0, 0]), part, "d")
    absent = Classification.of(3).prior(torch.tensor([0, 0, 2]))  # a class without rows is improbable, not impossible
    assert torch.isfinite(absent).all()
    assert Classification.of(3).answers(absent).tolist() == pytest.approx([2 / 3, 0, 1 / 3], abs=1e-6)
    assert torch.isfinite(MultiLabel(("u", "v")).prior(torch.tensor([[0, 1], [0, 1]]))).all()


def test_the_first_bad_row_is_told_and_every_condition_counts():
    with pytest.raises(InputError, match="label 7 in row 1 is out of range"):
        Classification.of(3).check(torch.tensor([0, 7, 1, 9]), "d")
    for wrong in (torch.tensor([0.0, 1.0]), torch.tensor([[0], [1]])):
        with pytest.raises(InputError, match="labels must be int64"):
            Classification.of(3).check(wrong, "d")
    number = Regression(("y", "z"))
    number.check(torch.zeros(3, 2, dtype=torch.float64), "d")
    for wrong in (torch.zeros(3, 2), torch.zeros(6, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)):
        with pytest.raises(InputError, match=r"labels must be float64 of shape \[any, 2\]"):
            number.check(wrong, "d")
    labels = MultiLabel(("u", "v"))
    labels.check_part(torch.tensor([[0, 1], [1, 0]]), "train", "d")
    labels.check_part(torch.tensor([[0, 1], [1, 1]]), "test", "d")
    with pytest.raises(InputError, match="macro_auroc is undefined on the labels of the test part"):
        labels.check_part(torch.tensor([[0, 1], [0, 1]]), "test", "d")


def test_rows_without_labels_have_labels_of_the_same_form(seed):
    for kind in ("classes", "labels", "numbers", "times"):
        task, labels, _ = fitted(kind, seed)
        none = task.tensor(task.unknown(4))
        assert (none.dtype, none.shape[1:], len(none)) == (labels.dtype, labels.shape[1:], 4)
    assert (Classification.of(2).unknown(3) < 0).all()  # no class


def test_intervals_of_survival_hold_about_as_many_events(seed):
    time = torch.rand(200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    event = (torch.arange(200) % 2).double()
    task = Survival(("t", "e")).fit(torch.stack([time, event], 1))
    deaths = np.histogram(time[event == 1], [0.0, *np.nextafter(task.edges, 2)])[0]
    assert (len(deaths), deaths.sum()) == (20, 100)
    assert abs(deaths - 5).max() <= 1
    assert set(task.edges) < set(time[event == 1].tolist())
    few = Survival(("t", "e")).fit(torch.tensor([[1.0, 1], [3, 1], [1, 1], [1, 1], [9, 0]], dtype=torch.float64))
    assert few.edges == (1.0, 3.0)


@pytest.mark.parametrize(
    "task", [Classification(("a", "b"), "accuracy", (0.5, 1.5)), MultiLabel(NAMES, (1.0, 2.0, 0.1)), Regression(NAMES)]
)
def test_a_task_survives_json(task):
    if isinstance(task, Regression):
        task = task.fit(torch.rand(9, 3, dtype=torch.float64))
    assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_what_a_task_refuses():
    with pytest.raises(InputError, match=r"time and event are \[-1.0, 1.0\] in row 0"):
        Survival(("t", "e")).check(torch.tensor([[-1.0, 1.0]], dtype=torch.float64), "d")
    with pytest.raises(InputError, match="class_weights 'balanced' is for classes"):
        Regression(("y",)).weighted(torch.zeros(3, 1))
    with pytest.raises(InputError, match=r"labels \[0, 2, 0\] in row 1; each label is 0 or 1"):
        MultiLabel(NAMES).check(torch.tensor([[0, 1, 0], [0, 2, 0], [0, 0, 3]]), "d")
    with pytest.raises(InputError, match="label of row 1 is NaN"):
        Regression(("y", "z")).check(torch.tensor([[0.0, 1.0], [2.0, float("nan")]], dtype=torch.float64), "d")
    with pytest.raises(InputError, match="'y' has fewer than two values in the test part"):
        Regression(("y",)).check_part(torch.ones(3, 1, dtype=torch.float64), "test", "d")
    with pytest.raises(InputError, match="'u' is 1 in every training row"):
        MultiLabel(NAMES).check_part(torch.ones(3, 3).long(), "train", "d")


@pytest.mark.parametrize("kind", ["classes", "labels", "numbers", "times"])
def test_experts_are_pooled_in_the_outputs_of_the_task(kind, seed):
    """o = prior + sum_i w_i s (o_i - prior) + f (o - prior) by hand; fitted weights have the least loss nearby."""
    g, outputs, _ = draw(seed)
    task, labels, _ = fitted(kind, seed)
    votes = torch.randn(3, 60, task.outputs, generator=g, dtype=torch.float64) / 2
    if kind == "numbers":
        votes = votes + outputs
    answers = task.answers(votes[0])
    torch.testing.assert_close(task.answers(task.inverse(answers)), answers, rtol=1e-5, atol=1e-5)
    votes = torch.stack([task.pooled(v) for v in votes])
    present = torch.rand(60, 2, generator=g) < 0.7
    present[~present.any(1)] = True
    prior = task.pooled(task.prior(labels).double())
    product = ExpertProduct(2, torch.full((task.outputs,), 0.5), True, task)
    product.log_prior.copy_(prior)
    product.fit(votes[:2], votes[2], present, labels, 0.01)
    weight, size, fused = (p.detach().exp() for p in (product.weight, product.size, product.fused))
    wanted = torch.empty_like(votes[2])
    for n in range(60):
        here = present[n].nonzero().flatten().tolist()
        wanted[n] = prior + fused[len(here) - 1] * (votes[2, n] - prior)
        for i in here:
            wanted[n] += weight[i] * size[len(here) - 1] * (votes[i, n] - prior)
    with torch.no_grad():
        found = product(votes[:2], votes[2], present)
        torch.testing.assert_close(task.answers(found), task.answers(wanted))

        def cost() -> float:
            return float(task.loss(product(votes[:2], votes[2], present), labels, "mean") + 0.01 * product.penalty())

        least = cost()
        for p in product.parameters():
            for step in (0.05, -0.05):
                p += step
                assert cost() > least
                p -= step
