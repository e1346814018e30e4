"""Measures that train a small model, and the exact Shapley values, on data whose answer is known."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, r2_score, roc_auc_score
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mmc_fast.diagnose.measures import polysemanticity, probes, reliance
from mmc_fast.diagnose.statistics import resample_counts
from mmc_fast.diagnose.tasks import Task
from mmc_fast.errors import InputError


def classes(n: int, generator: torch.Generator, strength: float = 2.0, noise: int = 6) -> tuple[Tensor, Tensor]:
    """Two predictive columns and some of noise, three classes."""
    y = torch.randint(3, (n,), generator=generator)
    corners = torch.tensor([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]])
    x = torch.randn(n, 2 + noise, generator=generator)
    x[:, :2] += strength * corners[y]
    return x, y


def test_linear_probe_is_logistic_regression(generator: torch.Generator) -> None:
    x, y = classes(600, generator)
    found = probes.linear_probe(x[:400], y[:400], x[400:], y[400:])
    scaler = StandardScaler().fit(x[:400].double())
    model = LogisticRegression(max_iter=300).fit(scaler.transform(x[:400].double()), y[:400])
    accuracy = model.score(scaler.transform(x[400:].double()), y[400:])
    assert found.accuracy == pytest.approx(accuracy)
    assert found.standard_error == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 200))
    assert found.chance == pytest.approx(float(torch.bincount(y[400:]).max()) / 200)
    assert found.accuracy > 0.8
    weak = LogisticRegression(C=1e-4, max_iter=300).fit(scaler.transform(x[:400].double()), y[:400])
    accuracy = weak.score(scaler.transform(x[400:].double()), y[400:])
    assert probes.linear_probe(x[:400], y[:400], x[400:], y[400:], c=1e-4).accuracy == pytest.approx(accuracy)
    gap = probes.prefix_gap(x[:400], x[400:], x[:400], x[400:], y[:400], y[400:], c=1e-4)
    assert (gap.fused.accuracy, gap.own.accuracy) == pytest.approx((accuracy, accuracy))


def test_prefix_gap_sees_a_starved_encoder(generator: torch.Generator) -> None:
    x, y = classes(900, generator, strength=2.5)
    starved = x.clone()
    starved[:, :2] = torch.randn(900, 2, generator=generator)
    gap = probes.prefix_gap(starved[:600], starved[600:], x[:600], x[600:], y[:600], y[600:])
    assert gap.gap > 0.3
    assert gap.gap == pytest.approx(gap.own.accuracy - gap.fused.accuracy)
    assert 0 < gap.standard_error < 0.08
    same = probes.prefix_gap(x[:600], x[600:], x[:600], x[600:], y[:600], y[600:])
    assert (same.gap, same.standard_error) == (0, 0)
    difference = [
        LogisticRegression(max_iter=300).fit(t[:600], y[:600]).predict(t[600:]) == y[600:].numpy()
        for t in ((s - s[:600].mean(0)) / s[:600].std(0, correction=0) for s in (starved.double(), x.double()))
    ]
    error = np.std(difference[1].astype(float) - difference[0], ddof=1) / math.sqrt(300)
    assert gap.standard_error == pytest.approx(error)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = probes.prefix_gap(starved[:600], starved[600:601], x[:600], x[600:601], y[:600], y[600:601])
    assert math.isnan(one.standard_error), "one row has no spread"


def test_denoising_r2(generator: torch.Generator) -> None:
    labels = torch.randint(4, (500,), generator=generator)
    means = torch.randn(4, 6, generator=generator) * 5
    noise = torch.randn(500, 6, generator=generator)
    student = probes.noise_component(means[labels] + noise, labels)
    assert float(student.mean(0).abs().max()) < 1e-6
    torch.testing.assert_close(
        student[labels == 2], (noise[labels == 2] - noise[labels == 2].mean(0)).double(), rtol=0, atol=1e-5
    )
    teacher = student @ torch.randn(6, 3, generator=generator, dtype=torch.float64)
    assert probes.denoising_r2(student, teacher) > 0.99
    spread = teacher.std(0) * torch.randn(500, 3, generator=generator)
    assert probes.denoising_r2(student, teacher + spread) == pytest.approx(0.5, abs=0.12)
    assert probes.denoising_r2(student, torch.randn(500, 3, generator=generator)) < 0.05
    many = torch.randn(500, 100, generator=generator)  # in sample these would explain a fifth
    assert probes.denoising_r2(many, torch.randn(500, 3, generator=generator)) < 0.05
    assert math.isnan(probes.denoising_r2(student, torch.ones(500, 2)))


def test_modality_probe(generator: torch.Generator) -> None:
    same = {name: torch.randn(600, 8, generator=generator) for name in "ab"}
    found = probes.modality_probe(same, hidden=(32,), seed=1)
    assert abs(found["balanced_accuracy"] - 0.5) < 0.1
    assert found["chance"] == 0.5
    assert found["rows"] == 600
    torch.manual_seed(8)
    assert probes.modality_probe(same, hidden=(32,), seed=1) == found, "the seed alone decides"
    apart = {"a": same["a"], "b": same["b"] + 2}
    assert probes.modality_probe(apart, hidden=(32,), seed=1)["balanced_accuracy"] > 0.95


# Cross-modal polysemanticity


def unimodal_weights(generator: torch.Generator) -> dict[str, Tensor]:
    """Neurons of "a" read its first columns, those of "b" its last ones."""
    a, b = torch.randn(160, 10, generator=generator), torch.randn(160, 8, generator=generator)
    a[:, 4:] *= 0.1
    b[:, :4] *= 0.1
    return {"a": a, "b": b}


def test_weight_classifier_tells_pure_from_mixed_neurons(generator: torch.Generator) -> None:
    unimodal, blocks = unimodal_weights(generator), {"a": 10, "b": 8}
    pure = torch.zeros(80, 18)
    pure[:40, :10], pure[40:, 10:] = unimodal["a"][:40], unimodal["b"][:40]
    mixed = torch.cat([unimodal["a"], unimodal["b"]], 1)
    found = {
        n: polysemanticity.cross_modal_polysemanticity(w, blocks, unimodal)
        for n, w in (("pure", pure), ("mixed", mixed))
    }
    print(found)
    assert found["pure"].accuracy > 0.8
    assert found["pure"].width == 8
    assert found["pure"].cross_entropy < 0.4
    assert found["mixed"].cross_entropy > found["pure"].cross_entropy + 0.25
    assert found["mixed"].entropy > found["pure"].entropy + 0.05


def test_weight_classifier_is_not_told_by_position(generator: torch.Generator) -> None:
    """Modalities whose neurons look alike cannot be told, though their columns stand in different places."""
    unimodal = {"a": torch.randn(150, 10, generator=generator), "b": torch.randn(150, 10, generator=generator)}
    found = polysemanticity.cross_modal_polysemanticity(torch.randn(30, 20), {"a": 10, "b": 10}, unimodal)
    assert abs(found.accuracy - 0.5) < 0.25
    missing = polysemanticity.cross_modal_polysemanticity(torch.randn(30, 20), {"a": 10, "b": 10}, None)
    assert missing.cross_entropy is None
    assert "no unimodal" in missing.not_applicable
    with pytest.raises(InputError, match=r"\[h, 10\]"):
        polysemanticity.cross_modal_polysemanticity(
            torch.randn(30, 20), {"a": 10, "b": 10}, {"a": torch.ones(9, 10), "b": torch.ones(9, 4)}
        )


def test_neuron_responses(generator: torch.Generator) -> None:
    predictive, noisy, other = torch.randn(3, 20000, generator=generator, dtype=torch.float64)
    pure = polysemanticity.neuron_response(predictive.relu(), predictive, noisy)
    mixed = polysemanticity.neuron_response((predictive + noisy).relu(), predictive, noisy)
    assert not pure.entangled
    assert mixed.entangled
    assert mixed.overlap > 0.75 > pure.overlap + 0.2
    middle = pure.centres.index(min(pure.centres, key=abs))
    inside = (predictive / predictive.std()).sub(predictive.mean()).abs() < 1 / 6
    assert pure.predictive[middle] == pytest.approx(float(predictive.relu()[inside].mean()), abs=0.02)
    correlation = np.corrcoef(predictive.relu(), predictive)[0, 1]
    assert pure.slopes[0] == pytest.approx(correlation)
    dead = polysemanticity.neuron_response(torch.zeros(20000), predictive, other)
    assert math.isnan(dead.overlap)
    assert not dead.entangled


def test_neuron_response_by_hand(generator: torch.Generator) -> None:
    """Means over equal bins of standardised features; active is what rises above a share of the way to the highest bin."""
    predictive, noisy = torch.randn(2, 400, generator=generator, dtype=torch.float64)
    predictive, noisy = 0.2 * predictive + 7, 3 * noisy + 7
    activation = 15 * (predictive - 6.93).relu() + 0.6 * (noisy - 7)
    for options in ({}, {"bins": 6, "active": 0.3}):
        bins, active = options.get("bins", 15), options.get("active", 0.5)
        found = polysemanticity.neuron_response(activation, predictive, noisy, **options)
        width = 5 / bins
        curves = []
        for feature in (predictive, noisy):
            z = (feature - feature.mean()) / feature.std(correction=0)
            inside = [(z >= -2.5 + k * width) & (z < -2.5 + (k + 1) * width) for k in range(bins)]
            curves.append([float(activation[rows].mean()) for rows in inside])
        np.testing.assert_allclose((found.predictive, found.noisy), curves)
        assert found.centres == pytest.approx([-2.5 + (k + 0.5) * width for k in range(bins)])
        low, high = np.nanmin(curves), np.nanmax(curves)
        on = [np.array(curve) > low + active * (high - low) for curve in curves]
        assert found.overlap == pytest.approx((on[0] & on[1]).sum() / (on[0] | on[1]).sum())
        assert found.slopes == pytest.approx([np.corrcoef(activation, f)[0, 1] for f in (predictive, noisy)])
    ends = {"centres": (), "predictive": (), "noisy": (), "overlap": 0.0}
    for slopes, entangled in (
        ((0.224, -0.224), True),
        ((0.223, 0.9), False),
        ((-0.9, -0.223), False),
    ):  # √0.05 is 0.2236
        assert polysemanticity.NeuronResponse(**ends, slopes=slopes).entangled == entangled
    constant = polysemanticity.neuron_response(activation, predictive, torch.ones(400))
    assert constant.slopes[1] == 0
    with pytest.raises(InputError, match=r"give three \[N\] with N >= 30"):
        polysemanticity.neuron_response(activation[:29], predictive[:29], noisy[:29])
    polysemanticity.neuron_response(activation[:30], predictive[:30], noisy[:30])


def test_what_the_weight_classifier_learns_and_is_asked(generator: torch.Generator, monkeypatch) -> None:
    """Unit rows of unimodal neurons by one projection, a quarter held out by class; the target is the largest block."""
    made: list[Any] = []

    class Watched:
        def __init__(self, hidden: Any, **options: Any) -> None:
            self.options = {"hidden": hidden} | options
            made.append(self)

        def fit(self, x: np.ndarray, y: np.ndarray) -> None:
            self.given = x, y

        def score(self, x: np.ndarray, y: np.ndarray) -> float:
            self.held = x, y
            return 0.7

        def predict_proba(self, x: np.ndarray) -> np.ndarray:
            self.asked = x
            share = np.abs(np.c_[x[:, :2], x[:, 0] - x[:, 1]]) + 0.1
            return share / share.sum(1, keepdims=True)

    monkeypatch.setattr("sklearn.neural_network.MLPClassifier", Watched)
    widths = {"a": 5, "b": 4, "c": 7}
    unimodal = {
        name: torch.randn(rows, widths[name], generator=generator) for name, rows in (("a", 20), ("b", 12), ("c", 8))
    }
    weight = torch.randn(30, 16, generator=generator)
    weight[4] = 0
    found = polysemanticity.cross_modal_polysemanticity(weight, widths, unimodal)
    (x, y), asked = made[0].given, made[0].asked
    assert found.width == x.shape[1] == 4, "the narrowest modality"
    assert np.bincount(y).tolist() == [15, 9, 6]
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([x, asked]), axis=1), 1)
    assert len(asked) == 29, "a neuron of zeros is not asked"
    parts = weight.split([5, 4, 7], 1)
    largest = torch.stack([part.square().sum(1) for part in parts], 1).argmax(1)[weight.any(1)].numpy()
    p = made[0].predict_proba(asked)
    assert found.cross_entropy == pytest.approx(-np.log(p[np.arange(29), largest]).mean())
    assert found.entropy == pytest.approx(-(p * np.log(p)).sum(1).mean() / math.log(3))
    assert found.accuracy == 0.7
    assert made[0].options == {"hidden": (64,), "alpha": 1e-3, "max_iter": 400, "random_state": 0}
    assert np.bincount(made[0].held[1]).tolist() == [5, 3, 2]
    assert not {tuple(row) for row in x} & {tuple(row) for row in made[0].held[0]}
    alone = {"a": weight[:, :5].clone(), "b": torch.zeros(30, 4), "c": torch.zeros(30, 7)}
    polysemanticity.cross_modal_polysemanticity(
        torch.cat(list(alone.values()), 1), widths, unimodal | {"a": weight[weight.any(1), :5]}
    )
    (x, y), asked = made[1].given, made[1].asked
    rows = {tuple(np.round(row, 9)) for row in asked}
    assert all(tuple(np.round(row, 9)) in rows for row in x[y == 0]), "one projection for fused and unimodal neurons"
    other = polysemanticity.cross_modal_polysemanticity(weight, widths, unimodal, width=2, seed=1)
    assert other.width == made[2].given[0].shape[1] == 2
    none = polysemanticity.cross_modal_polysemanticity(weight * 0, widths, unimodal)
    assert "all neurons of the fused layer are zero" in none.not_applicable
    few = polysemanticity.cross_modal_polysemanticity(weight, widths, unimodal | {"c": unimodal["c"][:7]})
    assert "fewer than 8 neurons" in few.not_applicable
    with pytest.raises(InputError, match="two or more"):
        polysemanticity.cross_modal_polysemanticity(weight[:, :5], {"a": 5}, {"a": unimodal["a"]})
    monkeypatch.setattr(Watched, "predict_proba", lambda self, x: np.tile([1.0, 0, 0], (len(x), 1)))
    certain = polysemanticity.cross_modal_polysemanticity(weight, widths, unimodal)
    assert certain.cross_entropy == pytest.approx(-math.log(1e-12) * (largest > 0).mean()), "wrong, but no infinity"


# Reliance


def shapley_by_orders(scores: np.ndarray, m: int) -> np.ndarray:
    """The definition by all m! orders of arrival."""
    values = np.zeros(m)
    for order in itertools.permutations(range(m)):
        members = 0
        for i in order:
            values[i] += scores[members | 1 << i] - scores[members]
            members |= 1 << i
    return values / math.factorial(m)


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_shapley_values(m: int, seed: int) -> None:
    scores = np.random.default_rng(seed).random(2**m)
    found = reliance.shapley_values(scores)
    np.testing.assert_allclose(found, shapley_by_orders(scores, m), rtol=1e-10, atol=1e-12)
    assert found.sum() == pytest.approx(scores[-1] - scores[0])
    many = np.random.default_rng(seed).random((2**m, 3))
    np.testing.assert_allclose(reliance.shapley_values(many)[:, 1], reliance.shapley_values(many[:, 1]))


def test_networks_trained_afresh_on_some_modalities(generator: torch.Generator) -> None:
    informative, y = classes(1500, generator, strength=3)
    features = {"good": informative, "noise": torch.randn(1500, 5, generator=generator)}
    both = reliance.train_afresh(features, y, ["good", "noise"])
    assert both.score > 0.9
    assert both.error == pytest.approx(math.sqrt(both.score * (1 - both.score) / 450), rel=0.4)  # binomial
    counts = resample_counts(450, 100, np.random.default_rng([0, 1])).astype(int)
    drawn = [np.repeat(np.arange(450), c) for c in counts]
    hits = (both.outputs.argmax(1) == y[both.rows]).double().numpy()
    assert both.error == pytest.approx(np.std([hits[i].mean() for i in drawn], ddof=1))
    assert reliance.train_afresh(features, y, ["good"]).score > 0.9
    assert reliance.train_afresh(features, y, ["noise"]).score < 0.5
    assert reliance.train_afresh(features, y, []).score < 0.5
    assert reliance.train_afresh(features, (y == 0).long(), ["good"], task=Task("classes", "auroc", 2)).score > 0.95
    numbers = informative[:, :2] @ torch.tensor([[1.0], [0.5]]) + 3
    regression = Task("numbers", "r2", 1)
    line = reliance.train_afresh(features, numbers, ["good"], task=regression)
    assert line.score > 0.95
    pairs = [(numbers[line.rows[i]], line.outputs[i]) for i in drawn]
    assert line.error == pytest.approx(np.std([r2_score(*pair) for pair in pairs], ddof=1), rel=1e-4)
    assert reliance.train_afresh(features, numbers, ["noise"], task=regression).score < 0.1
    labels = (informative[:, :3] > 0.5).long()
    assert reliance.train_afresh(features, labels, ["good"], task=Task("labels", "f1", 3)).score > 0.9
    rare = ((informative[:, :3] + 2 * torch.randn(1500, 3, generator=generator)) > 3).long()
    several = reliance.train_afresh(features, rare, ["good"], task=Task("labels", "f1", 3))
    given, truth = several.outputs > 0, rare[several.rows]
    assert several.score == pytest.approx(f1_score(truth, given, average="micro"))
    assert given.sum() > truth.sum() / 2, "the cut is that of the best F1: few of such labels reach one half"
    own = Task("numbers", "mse", 1, lambda outputs, truth: -float((outputs - truth).square().mean()))
    assert -0.2 < reliance.train_afresh(features, numbers, ["good"], task=own).score < 0


def test_networks_judged_on_other_rows(generator: torch.Generator) -> None:
    x, y = classes(1200, generator)
    train, judged = {"x": x[:900]}, {"x": x[900:]}
    found = reliance.train_afresh(train, y[:900], ["x"], judged=(judged, y[900:]), seed=3)
    scaler = StandardScaler().fit(x[:900].double())
    chances = []
    for start in (3, 4, 5):
        network = MLPClassifier((64,), alpha=1.0, early_stopping=True, max_iter=60, random_state=start)
        network.fit(scaler.transform(x[:900].double()), y[:900])
        chances.append(network.predict_proba(scaler.transform(x[900:].double())))
    guess = np.mean(chances, 0).argmax(1)
    assert found.score == pytest.approx(accuracy_score(y[900:], guess))
    assert found.rows.tolist() == list(range(300)), "of the rows that judge"
    labels = torch.stack([y > 0, y > 1], 1).long()
    ranked = reliance.train_afresh({"x": x}, labels, ["x"], task=Task("labels", "macro_auroc", 2))
    assert ranked.score == pytest.approx(roc_auc_score(labels[ranked.rows], ranked.outputs, average="macro"))
    assert float(((ranked.outputs > 0) == labels[ranked.rows]).double().mean()) > 0.8, (
        "log-odds: above 0 is more likely"
    )
    frequent = float((y[900:] == y[:900].bincount().argmax()).double().mean())
    nothing = reliance.train_afresh(train, y[:900], [], judged=(judged, y[900:]), seed=3)
    assert nothing.score == pytest.approx(frequent)
    torch.testing.assert_close(nothing.outputs, (y[:900].bincount() / 900).expand(300, -1))
    two = reliance.train_afresh({"x": x}, (y > 0).long(), ["x"], task=Task("classes", "auroc", 1))
    torch.testing.assert_close(two.outputs.sum(1), torch.ones(len(two.rows)))
    assert two.outputs.shape[1] == 2


def test_bad_input() -> None:
    x = torch.randn(40, 3)
    with pytest.raises(InputError, match="single class"):
        probes.linear_probe(x, torch.zeros(40), x, torch.zeros(40))
    with pytest.raises(InputError, match="NaN"):
        probes.linear_probe(x * math.nan, torch.arange(40) % 2, x, torch.zeros(40))
    with pytest.raises(InputError, match="two or more"):
        probes.modality_probe({"a": x})
    with pytest.raises(InputError, match="same rows"):
        probes.denoising_r2(x, x[:30])
    with pytest.raises(InputError, match=r"2\^m"):
        reliance.shapley_values([1.0, 2.0, 3.0])
    for count in (0, 1, 2**7):
        with pytest.raises(InputError, match=f"got {count} scores"):
            reliance.shapley_values([0.0] * count)
    with pytest.raises(InputError, match="40 rows and 30 labels"):
        probes.noise_component(x, torch.zeros(30))
    with pytest.raises(InputError, match="single class"):
        reliance.train_afresh({"a": x}, torch.zeros(40, dtype=torch.int64), ["a"])
