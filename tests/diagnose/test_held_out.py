"""Which rows train and which judge: never the same, the same for what is compared, and those that the seed draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logit
from sklearn.linear_model import Ridge
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mmc_fast.diagnose.measures import probes, refitted, reliance
from mmc_fast.diagnose.tasks import Task
from mmc_fast.errors import InputError


def numbered(rows: int, generator: torch.Generator, width: int = 3) -> Tensor:
    """Rows that begin with their number."""
    return torch.cat([torch.arange(rows)[:, None].float(), torch.randn(rows, width, generator=generator)], 1)


def test_networks_are_judged_on_rows_that_did_not_train_them(generator: torch.Generator, seed: int) -> None:
    """Three tenths judge; the outputs are those of three networks, on features standardised by the other seven."""
    x, y = numbered(200, generator), torch.randint(3, (200,), generator=generator)
    seed %= 2**16
    found = reliance.train_afresh({"x": x, "unused": x * 0}, y, ["x"], seed=seed)
    judged = found.rows.numpy()
    assert len(np.unique(judged)) == 60
    train = torch.tensor(sorted(set(range(200)) - set(judged.tolist())))
    order = np.random.default_rng(seed).permutation(200)  # the networks depend on the order of their rows
    assert sorted(order[:140]) == train.tolist()
    scaler, chances = StandardScaler().fit(x[train].double()), []
    for start in (seed, seed + 1, seed + 2):
        network = MLPClassifier((64,), alpha=1.0, early_stopping=True, max_iter=60, random_state=start)
        network.fit(scaler.transform(x[order[:140]].double()), y[order[:140]])
        chances.append(network.predict_proba(scaler.transform(x[judged].double())))
    np.testing.assert_allclose(found.outputs, np.mean(chances, 0), atol=1e-6)
    assert found.score == pytest.approx(float((found.outputs.argmax(1) == y[judged]).double().mean()))
    other = reliance.train_afresh({"x": x}, y, ["x"], seed=seed + 1)
    assert set(other.rows.tolist()) != set(judged.tolist())
    assert len(reliance.train_afresh({"x": x}, y, ["x"], held_out=0.5).rows) == 100
    for part, metric in ((judged, "accuracy"), (train.numpy(), "auroc")):
        one = torch.zeros(200, dtype=torch.long)
        one[part[0]] = 1
        with pytest.raises(InputError, match="200 rows leave a single class in a part"):
            reliance.train_afresh({"x": x}, one, ["x"], seed=seed, task=Task("classes", metric, 2))
    numbers = torch.randn(200, 2, generator=generator) + 9
    mean = reliance.train_afresh({"x": x}, numbers, [], seed=seed, task=Task("numbers", "r2", 2))
    torch.testing.assert_close(mean.outputs, numbers[train].mean(0).expand(60, -1))
    line, fits = reliance.train_afresh({"x": x}, numbers, ["x"], seed=seed, task=Task("numbers", "r2", 2)), []
    target = StandardScaler().fit(numbers[order[:140]].double())
    for start in (seed, seed + 1, seed + 2):
        regression = MLPRegressor(
            hidden_layer_sizes=(64,), alpha=1.0, early_stopping=True, max_iter=60, random_state=start
        )
        regression.fit(scaler.transform(x[order[:140]].double()), target.transform(numbers[order[:140]].double()))
        fits.append(target.inverse_transform(regression.predict(scaler.transform(x[judged].double()))))
    np.testing.assert_allclose(line.outputs, np.mean(fits, 0), rtol=1e-5, atol=1e-5)
    several = (torch.rand(200, 2, generator=generator) < torch.tensor([0.8, 0.2])).long()
    odds, chances = reliance.train_afresh({"x": x}, several, ["x"], seed=seed, task=Task("labels", "f1", 2)), []
    for start in (seed, seed + 1, seed + 2):
        network = MLPClassifier((64,), alpha=1.0, early_stopping=True, max_iter=60, random_state=start)
        network.fit(scaler.transform(x[order[:140]].double()), several[order[:140]])
        chances.append(network.predict_proba(scaler.transform(x[order].double())))
    p = np.mean(chances, 0)
    cut = reliance._best_cut(p[:140], several[order[:140]].numpy())  # of the rows that train
    np.testing.assert_allclose(odds.outputs, logit(p[140:]) - logit(cut), rtol=1e-4, atol=1e-5)
    frequent = reliance.train_afresh({"x": x}, several, [], seed=seed, task=Task("labels", "f1", 2))
    assert (frequent.outputs > 0).tolist() == [[True, False]] * 60


def test_a_cut_for_several_labels_is_the_best_of_all(generator: torch.Generator) -> None:
    for _ in range(20):
        chance = torch.rand(30, 3, generator=generator).double().numpy()
        truth = (torch.rand(30, 3, generator=generator).numpy() < chance**3).astype(int)
        truth[0, 0] = 1

        def f1(cut: float, chance: np.ndarray = chance, truth: np.ndarray = truth) -> float:
            return 2 * ((chance > cut) & (truth > 0)).sum() / ((chance > cut).sum() + truth.sum())

        assert reliance._best_cut(chance, np.ones_like(truth)) == pytest.approx(max(chance.min(), 1e-6)), (
            "all are given"
        )
        cut = reliance._best_cut(chance, truth)
        ordered = np.sort(chance, axis=None)
        assert f1(cut) == pytest.approx(max(f1(c) for c in [0.0, *ordered[:-1]]))
        assert np.abs(ordered - cut).min() > 0 or cut == ordered[0], "between two probabilities"


def test_heads_refitted_are_judged_on_one_split(generator: torch.Generator, seed: int, monkeypatch) -> None:
    rows = 300
    y = torch.randint(2, (rows,), generator=generator)
    features = {name: numbered(rows, generator, 1) for name in ("a", "b", "c")}
    for x in features.values():
        x[:, 1] += 1.5 * y
    plain, runs = refitted.fitted_logistic, []

    def watched(x: Tensor, labels: Tensor, c: float) -> Any:
        model = plain(x, labels, c)
        runs.append((x[:, 0].long(), labels, x.shape[1], c))
        predict = model.predict
        model.predict = lambda z: runs.append((torch.from_numpy(z[:, 0]).long(), predict(z))) or predict(z)
        return model

    monkeypatch.setattr(refitted, "fitted_logistic", watched)
    found = refitted.conditional_utilisation(features, y, c=0.5, seed=seed)
    fits, judged = runs[::2], runs[1::2]
    assert [(width, c) for _, _, width, c in fits] == [(6, 0.5)] + [(4, 0.5)] * 3
    train, test = fits[0][0], judged[0][0]
    assert (len(train), len(test), len(torch.cat([train, test]).unique())) == (210, 90, rows)
    for (mine, labels, _, _), (theirs, _) in zip(fits, judged, strict=True):
        assert torch.equal(mine, train)
        assert torch.equal(theirs, test)
        assert torch.equal(labels, y[mine])
    hits = [(guess == y[rows].numpy()).astype(float) for rows, guess in judged]
    for name, without in zip(features, hits[1:], strict=True):
        lost = hits[0] - without
        assert found[name].value == pytest.approx(lost.mean() / hits[0].mean())
        assert found[name].error == pytest.approx(np.std(lost, ddof=1) / np.sqrt(90) / hits[0].mean())
    runs.clear()
    refitted.conditional_utilisation(features, y, held_out=0.5, seed=seed + 1)
    assert (len(runs[0][0]), set(runs[0][0].tolist()) <= set(train.tolist())) == (150, False)


def test_the_modality_probe_is_judged_on_samples_that_it_never_saw(generator: torch.Generator, monkeypatch) -> None:
    """Half of the samples train, all modalities of each; a fifth of those stop the training."""
    latents = {name: numbered(100, generator) + torch.tensor([0, k, 0, 0]) for k, name in enumerate("abc")}
    seen: list[Any] = []
    stops: list[Any] = []
    plain, fit = probes.fit_modality_probe, probes._fit
    monkeypatch.setattr(probes, "fit_modality_probe", lambda *a: seen.append(a) or plain(*a))
    monkeypatch.setattr(probes, "_fit", lambda network, *a: stops.append((*a, network)) or fit(network, *a))
    for options, count in (({}, 50), ({"rows": 30}, 30), ({"seed": 1}, 50)):
        found = probes.modality_probe(latents, hidden=(4,), **options)
        x, y, sample, held, held_y, hidden, classes, _ = seen[-1]
        assert (len(x), len(held), hidden, classes, found["rows"]) == (3 * count, 3 * count, (4,), 3, 3 * count)
        assert found["chance"] == pytest.approx(1 / 3)
        for mine, told in ((x, y), (held, held_y)):
            for k, name in enumerate("abc"):
                torch.testing.assert_close(mine[told == k], latents[name][mine[told == k][:, 0].long()])
        own, other = (set(t[:, 0].long().tolist()) for t in (x, held))
        assert (len(own), len(other), own & other) == (count, count, set())
        assert sample.tolist() == list(range(count)) * 3
        (train, train_y), (stop, stop_y), *_, network = stops[-1]
        assert [str(layer).split(", bias")[0] for layer in network] == [
            "Linear(in_features=4, out_features=4", "ReLU()", "Linear(in_features=4, out_features=3",
        ]  # fmt: skip
        assert (len(stop), len(train)) == (3 * (count // 5), 3 * (count - count // 5))
        whole = torch.cat([train, stop])
        torch.testing.assert_close(whole.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(whole.std(0), torch.ones(4))
        numbers = [set((t[:, 0] * x[:, 0].std() + x[:, 0].mean()).round().long().tolist()) for t in (train, stop)]
        assert not numbers[0] & numbers[1], "a sample stops or trains, with all of its modalities"
        assert len(train_y) + len(stop_y) == 3 * count
    drawn = [set(a[0][:, 0].long().tolist()) for a in seen]
    assert drawn[0] != drawn[2], "another seed, other samples"
    monkeypatch.setattr(probes, "fit_modality_probe", lambda *a: seen.append(a) or {})
    probes.modality_probe({name: torch.zeros(9000, 1) for name in "ab"})
    assert (len(seen[-1][0]), seen[-1][5]) == (2 * 4096, (512, 256)), "the documented defaults"
    probes.modality_probe({name: torch.zeros(20, 1) for name in "ab"})
    with pytest.raises(InputError, match="N >= 20"):
        probes.modality_probe({name: torch.zeros(19, 1) for name in "ab"})


def test_recalls_of_classes_weigh_the_same(generator: torch.Generator) -> None:
    """Balanced accuracy on held-out rows of very unequal classes, standardised by the training rows."""
    y = torch.arange(2).repeat(200)
    x = torch.randn(400, 3, generator=generator) + 6 * y[:, None] + 50
    held_y = torch.tensor([0] * 90 + [1] * 10)
    held = torch.randn(100, 3, generator=generator) + 50
    held[95:] += 6
    found = probes.fit_modality_probe(x, y, torch.arange(400), held, held_y, (8,), 2, 0)
    assert found["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2, abs=0.02)
    assert (found["rows"], found["chance"]) == (100, 0.5)
    only = probes.fit_modality_probe(x, y, torch.arange(400), held[95:], held_y[95:], (8,), 2, 0)
    assert only["balanced_accuracy"] == 1.0, "a class that nobody has does not count"
    first = probes.fit_modality_probe(x, y, torch.arange(400), held[:90], held_y[:90], (8,), 2, 0)
    assert first["balanced_accuracy"] == 1.0, "nor the last class"


def test_the_weights_kept_are_the_best_for_the_stopping_rows(generator: torch.Generator, monkeypatch) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    noise = torch.randn(64, 2, generator=generator)
    y = torch.randint(2, (64,), generator=generator)
    losses: list[float] = []
    plain = probes.F.cross_entropy

    def watched(logits: Tensor, labels: Tensor) -> Tensor:
        loss = plain(logits, labels)
        if not torch.is_grad_enabled():
            losses.append(float(loss))
        return loss

    monkeypatch.setattr(probes.F, "cross_entropy", watched)
    train, stop = (noise[:32], y[:32]), (noise[32:], y[32:])
    assert probes._fit(network, train, stop, generator, 3)[1] is False
    assert len(losses) == 3
    losses.clear()
    best, settled = probes._fit(network, train, stop, generator, 2000)
    with torch.no_grad():
        assert float(plain(network(noise[32:]), y[32:])) == pytest.approx(losses[best - 1])
    assert min(losses) > losses[best - 1] - 1e-3, "a fall by less than a thousandth is none"
    assert (settled, len(losses)) == (True, best + 8)


@pytest.mark.parametrize(("rows", "batch"), [(40, 32), (1600, 100), (1615, 100), (20_000, 512)])
def test_batches_of_the_probe(rows: int, batch: int, generator: torch.Generator, monkeypatch) -> None:
    """At least sixteen steps an epoch where there are rows for it; order by the generator that is given."""
    x, y = torch.randn(rows, 2, generator=generator), torch.randint(2, (rows,), generator=generator)
    sizes: list[int] = []
    plain = probes.F.cross_entropy
    monkeypatch.setattr(probes.F, "cross_entropy", lambda p, t: sizes.append(len(p)) or plain(p, t))
    found = []
    for start in (0, 1):
        network = torch.nn.Sequential(torch.nn.Linear(2, 2))
        network.load_state_dict({"0.weight": torch.eye(2), "0.bias": torch.zeros(2)})
        torch.manual_seed(start)
        probes._fit(network, (x, y), (x[:5], y[:5]), torch.Generator().manual_seed(3), 1)
        found.append(network[0].weight.detach().clone())
    assert torch.equal(*found)
    steps = -(-rows // batch)
    assert 1e-3 < float((found[0] - torch.eye(2)).abs().max()) <= 2.1e-3 * steps, "Adam's steps of 0.002"
    assert (sizes[0], sum(sizes)) == (batch, 2 * (rows + 5))


def test_denoising_is_scored_out_of_sample_by_folds(generator: torch.Generator, seed: int) -> None:
    """Against folds made by hand from any partition: the R² of rows that the ridge did not see."""
    from sklearn.model_selection import KFold

    x, w = (
        torch.randn(60, 4, generator=generator) * torch.tensor([1.0, 10, 0.1, 1]),
        torch.randn(4, 2, generator=generator),
    )
    y = x @ w + torch.randn(60, 2, generator=generator) * torch.tensor([1.0, 30])
    seed %= 2**31
    predicted = np.zeros((60, 2))
    for train, test in KFold(3, shuffle=True, random_state=seed).split(x):
        scaler = StandardScaler().fit(x[train].double())
        model = Ridge(alpha=7.0).fit(scaler.transform(x[train].double()), y[train].double())
        predicted[test] = model.predict(scaler.transform(x[test].double()))
    truth = y.double().numpy()
    expected = 1 - np.square(truth - predicted).sum() / np.square(truth - truth.mean(0)).sum()
    assert probes.denoising_r2(x, y, folds=3, ridge=7.0, seed=seed) == pytest.approx(expected, abs=1e-6)
    assert probes.denoising_r2(x, y, ridge=7.0) == probes.denoising_r2(x, y, folds=5, ridge=7.0, seed=0)
    assert probes.denoising_r2(x, y) == probes.denoising_r2(x, y, ridge=1.0)
    still = torch.cat([y, torch.ones(60, 1)], 1)
    assert probes.denoising_r2(x, still) == pytest.approx(probes.denoising_r2(x, y)), "a column that never moves"
