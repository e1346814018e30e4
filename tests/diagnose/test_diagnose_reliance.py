"""Scores of coalitions and of networks trained afresh, in a diagnosis."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diagnose_models import Toy, batches, chain, whole
from sklearn.metrics import roc_auc_score
from torch import Tensor

from mmc_fast.diagnose import diagnose
from mmc_fast.diagnose.measures import reliance
from mmc_fast.diagnose.predictions import CoalitionScores
from mmc_fast.errors import InputError
from mmc_fast.experiments import data
from mmc_fast.experiments.data import MultimodalDataset, Part
from mmc_fast.testing import planted_head


def plain_scores(fuse: Any, image: Tensor, audio: Tensor, score: Any) -> list[float]:
    """none, only image, only audio, all."""
    means = [image.mean(0).expand_as(image), audio.mean(0).expand_as(audio)]
    pairs = [(means[0], means[1]), (image, means[1]), (means[0], audio), (image, audio)]
    with torch.no_grad():
        return [score(fuse({"image": a, "audio": b})) for a, b in pairs]


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_of_coalitions(classes: int, generator: torch.Generator) -> None:
    head = chain(generator, classes)
    loader = batches(generator, classes=classes)
    image, audio, labels = whole(loader)
    toy = Toy(head, head)
    d = diagnose(toy, loader, resamples=20, probes=False)

    def score(y: Tensor) -> float:
        if classes == 2:
            return float(roc_auc_score(labels, (y[:, 1] - y[:, 0]).numpy()))
        return float((y.argmax(1) == labels).double().mean())

    expected = plain_scores(toy.fuse, image, audio, score)
    if classes == 2:
        expected[0] = 0.5  # all rows alike; the last digits of a product may still tell them apart
    assert d.metric == ("auroc" if classes == 2 else "accuracy")
    assert [d.value(k) for k in ("score.none", "only.image", "only.audio", "score.all")] == pytest.approx(
        expected, abs=5e-3
    )
    assert d.arrays["coalition_scores"] == pytest.approx(expected, abs=5e-3)
    assert (d.value("without.audio"), d.value("without.image")) == (d.value("only.image"), d.value("only.audio"))
    assert d.value("shapley.image") == pytest.approx(reliance.shapley_values(d.arrays["coalition_scores"])[0])
    total = d.value("shapley.image") + d.value("shapley.audio")
    assert total == pytest.approx(d.value("score.all") - d.value("score.none"))


def test_weighted_auroc_of_groups_is_that_of_the_repeated_rows(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = torch.from_numpy(random.integers(2, size=300))
    logits = torch.from_numpy(random.integers(-5, 5, size=(2, 300, 2)).astype(np.float32))  # ties
    places = torch.from_numpy(random.integers(4, size=300))
    scores = CoalitionScores("auroc", 1, 4)
    for rows in torch.arange(300).split(70):
        scores.add(logits[:, rows], labels[rows], places[rows])
    weights = np.array([[2.0, 0, 1, 1], [1, 1, 1, 1]])
    found = scores.scores(weights)
    for r, w in enumerate(weights):
        rows = np.concatenate([np.flatnonzero(places.numpy() == k).repeat(int(w[k])) for k in range(4)])
        for c in range(2):
            margin = (logits[c, :, 1] - logits[c, :, 0]).numpy()[rows]
            assert found[c, r] == pytest.approx(roc_auc_score(labels.numpy()[rows], margin))


def test_scores_of_unimodal_models_take_the_place_of_probes() -> None:
    planted = planted_head(4, ignored=1)
    lost = diagnose(planted, planted.batches(), resamples=0, probes=False, alone={"a": 0.9, "b": 0.8})
    assert (lost.value("alone.a"), lost.value("alone.b")) == (0.9, 0.8)
    assert [v.kind for v in lost.verdicts] == ["relied on", "collapsed"]
    nothing = diagnose(planted, planted.batches(), resamples=0, alone={"b": lost.value("score.chance")})
    assert nothing.verdicts[1].kind == "ignored"
    assert nothing.value("alone.a") != 0.9
    for bad in ({"c": 0.5}, {"a": 0.5}):
        with pytest.raises(InputError, match="alone has scores"):
            diagnose(planted, planted.batches(), resamples=0, probes=False, alone=bad)


def test_error_of_chance_is_that_of_drawn_guesses(seed: int) -> None:
    """A model within two of these of chance is not judged."""
    random = np.random.default_rng(seed)
    labels = torch.from_numpy((random.random(400) < 0.3).astype(np.int64))
    places = torch.zeros(400, dtype=torch.int64)
    found = CoalitionScores("auroc", 1, 1)
    found.add(torch.zeros(2, 400, 2), labels, places)
    drawn = [roc_auc_score(labels, random.random(400)) for _ in range(400)]
    assert found.chance_error() == pytest.approx(np.std(drawn), rel=0.15)
    found = CoalitionScores("accuracy", 1, 1)
    found.add(torch.zeros(2, 400, 3), labels, places)
    share = float((labels == 0).double().mean())
    assert found.chance_error() == pytest.approx(math.sqrt(share * (1 - share) / 400))


def test_a_model_at_chance_is_not_judged(seed: int) -> None:
    """Labels that nothing tells: what the model loses without a modality is noise."""
    planted = planted_head(seed, num_samples=600)
    random = torch.Generator().manual_seed(seed)
    rows = list(planted.features.values())
    kinds, words, undecided = [], "", 0
    for _ in range(5):
        labels = torch.randint(3, (600,), generator=random)
        d = diagnose(Toy(planted.head, planted.head), [(*rows, labels)], resamples=0, probes=False)
        found = [v.kind for v in d.verdicts]
        kinds.append(found)
        if "undecided" in found:  # a modality without any use may be called ignored all the same
            undecided += 1
            words = d.summary()
            assert "relied on" not in found, kinds
    assert undecided >= 2, kinds  # one draw of labels in forty looks better than chance
    assert "The fused model is not above chance" in words
    assert diagnose(planted, planted.batches(), resamples=0, probes=False).verdicts[0].kind != "undecided"


class SideBySide:
    """A head on the features themselves; batches are parts of a data set."""

    def __init__(self, dataset: MultimodalDataset) -> None:
        self.names = dataset.modalities
        self.head = torch.nn.Linear(sum(dataset.dims.values()), dataset.num_classes)

    def encode(self, batch: Part) -> dict[str, Tensor]:
        return dict(zip(self.names, batch.features, strict=True))

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        return self.head(torch.cat(list(features.values()), 1))

    def labels(self, batch: Part) -> Tensor:
        return batch.labels


def test_probes_train_on_the_rows_given_for_them() -> None:
    """A modality that is hard to learn is found with the training part and missed on the diagnosed rows alone."""
    dataset = data.planted_collapse(3)
    model, test, train = SideBySide(dataset), dataset.part("test"), dataset.part("train")
    options: dict[str, Any] = {"resamples": 0, "metric": "accuracy"}
    few = diagnose(model, test, **options)
    many = diagnose(model, test, probe_data=train, **options)
    assert few.value("alone.hard") < 0.45
    assert many.value("alone.hard") > 0.75
    assert (few.settings["probe_data"], many.settings["probe_data"]) == (False, True)
    assert diagnose(model, dataset, **options) == many, "a data set brings its training part"
    control = diagnose(model, test, probe_data=train, control=True, **options)
    assert control.value("alone.hard") == many.value("alone.hard")
    assert control.value("retrained_all") > 0.8
    shuffled = Part(**(vars(train) | {"labels": train.labels[torch.randperm(len(train))]}))
    assert diagnose(model, test, probe_data=shuffled, **options).value("alone.easy") < 0.45


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda l: [(a, b, None) for a, b, _ in l], "probe_data has no labels"),
        (lambda l: [(a[:, :3], b, y) for a, b, y in l], "widths must not change"),
        (lambda l: [(a * math.nan, b, y) for a, b, y in l], "hold NaN"),
        (lambda l: [], "probe_data gave no sample"),
        (lambda l: iter(l), "iterator"),
    ],
)
def test_bad_rows_for_probes(change, message: str, generator: torch.Generator) -> None:
    head, loader = chain(generator), batches(generator)
    with pytest.raises(InputError, match=message) as caught:
        diagnose(Toy(head, head), loader, resamples=0, probe_data=change(loader))
    assert "\n" not in str(caught.value)
