"""Scores under conditions, how far they move the outputs, and networks trained afresh, in a diagnosis."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diagnose_models import Toy, batches, chain, whole
from scipy.stats import entropy
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, r2_score, roc_auc_score
from torch import Tensor

from mmc_fast.diagnose import DiagnoseOptions, diagnose
from mmc_fast.diagnose.absence import Condition, Remover, coalitions_scored, conditions_of, draws_for
from mmc_fast.diagnose.collect import Collector
from mmc_fast.diagnose.measures import reliance
from mmc_fast.diagnose.passes import Batches, training_rows
from mmc_fast.diagnose.reservoir import Reservoir
from mmc_fast.diagnose.tasks import Task
from mmc_fast.errors import InputError
from mmc_fast.experiments import data
from mmc_fast.experiments.data import MultimodalDataset, Part
from mmc_fast.testing import planted_head


class Masked(Toy):
    """A toy that handles absence itself: minus one in place of what is absent."""

    def fuse(self, features: dict[str, Tensor], present: Tensor | None = None) -> Tensor:
        if present is not None:
            features = {n: torch.where(present[:, i, None], x, -1.0) for i, (n, x) in enumerate(features.items())}
        return super().fuse(features)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("absence", ["model", "mean"])
def test_scores_of_coalitions(absence: str, classes: int, generator: torch.Generator) -> None:
    head, loader = chain(generator, classes), batches(generator, classes=classes)
    image, audio, labels = whole(loader)
    toy = Masked(head, head)
    with torch.no_grad():
        p = toy.fuse({"image": image, "audio": audio}).softmax(1)
    d = diagnose(toy, loader, resamples=20, probes=False, absence=absence)

    def score(a: Tensor, b: Tensor) -> float:
        with torch.no_grad():
            y = toy.fuse({"image": a, "audio": b})
        if classes == 2:
            return float(roc_auc_score(labels, (y[:, 1] - y[:, 0]).numpy()))
        return float((y.argmax(1) == labels).double().mean())

    gone = [torch.full_like(x, -1.0) if absence == "model" else x.mean(0).expand_as(x) for x in (image, audio)]
    expected = [0.0, score(image, gone[1]), score(gone[0], audio), score(image, audio)]
    if classes == 2 or absence == "model":
        expected[0] = d.value("score.chance")  # nothing is left to ask, or all rows are alike
    else:
        expected[0] = score(*gone)
    found = [d.value(k) for k in ("score.none", "only.image", "only.audio", "score.all")]
    assert found == pytest.approx(expected, abs=5e-3)
    assert d.arrays["coalition_scores"] == found
    assert (d.value("without.audio"), d.value("without.image")) == (d.value("only.image"), d.value("only.audio"))
    assert d.value("shapley.image") == pytest.approx(reliance.shapley_values(found)[0])
    assert d.value("shapley.image") + d.value("shapley.audio") == pytest.approx(found[3] - found[0])
    assert d.metric == ("auroc" if classes == 2 else "accuracy")
    truth = torch.nn.functional.one_hot(labels, classes)
    assert d.value("brier.all") == pytest.approx(classes * brier_score_loss(truth.flatten(), p.flatten()), rel=1e-5)
    confidence, guess = p.max(1)
    binned = np.bincount((confidence * 15).ceil().int(), (guess == labels).double() - confidence)
    assert d.value("ece.all") == pytest.approx(np.abs(binned).sum() / 500, abs=1e-6)
    assert (d.settings["absence"], d.settings["own_mask"]) == (absence, True)
    assert ("robustness.image" in d.measures) == (absence == "model" and d.verdicts[0].evidence["ability"] > 0)


def test_the_default_is_what_the_model_can(generator: torch.Generator) -> None:
    head, loader = chain(generator), batches(generator)
    light: dict[str, Any] = {"resamples": 0, "probes": False, "agop": False}
    assert diagnose(Masked(head, head), loader, **light).settings["absence"] == "model"
    d = diagnose(Toy(head, head), loader, **light)
    assert d.settings["absence"] == "resample"
    assert "use_share.image" not in d.measures
    full = diagnose(Toy(head, head), loader, resamples=0, probes=False)
    assert {n: full.measures[n] for n in d.measures} == d.measures, "the scores do not depend on what else is summed"


def test_other_samples_stand_in(generator: torch.Generator) -> None:
    """Each absent modality comes from one other sample, the same for all that are absent together."""
    features = {"a": torch.arange(50.0)[:, None, None].expand(50, 2, 1), "b": torch.arange(50.0)[:, None] + 100}
    donors = torch.cat([x.flatten(1) for x in features.values()], 1)
    places = torch.arange(50) % 3
    places[7] = 3  # a group of its own
    kept = {"x": donors, "row": torch.arange(50), "place": places}
    remover = Remover(lambda f: torch.cat([x.flatten(1) for x in f.values()], 1), {"a": 2, "b": 1}, kept, 5)
    drawn = remover.drawn(torch.arange(50), places, generator)
    assert len(drawn.unique()) > 20
    assert not bool((drawn == torch.arange(50)).any()), "another sample"
    same = places[drawn] == places
    assert same.sum() == 49, "of the same group"
    assert not same[7]
    assert (drawn[:3] != torch.arange(3)).all()
    rows = torch.zeros(4000, dtype=torch.int64)
    often = remover.drawn(rows, rows, generator)
    assert set(often.unique().tolist()) == set(range(3, 50, 3)), "each of the group may be drawn"
    assert set(remover.drawn(rows + 7, rows + 3, generator).tolist()) == set(range(50)) - {7}, "alone in its group"
    again = [remover.drawn(rows + 7, rows + 3, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*again), "the generator decides"
    thirds = Remover(remover.fuse, {"a": 2, "b": 1}, kept | {"place": torch.arange(50) % 3}, 5)
    assert set(thirds.drawn(rows + 2, rows + 2, generator).tolist()) == set(range(5, 50, 3)), "of the last group too"
    assert set(thirds.drawn(rows + 2, rows + 4, generator).tolist()) == set(range(50)) - {2}, (
        "of any, where none is there"
    )
    two = Remover(
        remover.fuse, {"a": 2, "b": 1}, {"x": donors[:2], "row": torch.arange(2), "place": torch.arange(2)}, 2
    )
    for _ in range(9):
        assert two.drawn(torch.arange(2), torch.arange(2), generator).tolist() == [1, 0]
    pairs = Remover(
        remover.fuse, {"a": 2, "b": 1}, {"x": donors[:4], "row": torch.arange(4), "place": torch.arange(4) // 2}, 2
    )
    for _ in range(9):
        assert pairs.drawn(torch.arange(4), torch.arange(4) // 2, generator).tolist() == [1, 0, 3, 2], "the other one"
    none = remover.outputs(features, Condition((False, False), "resample"), drawn)
    torch.testing.assert_close(none, donors[drawn])
    one = remover.outputs(features, Condition((True, False), "resample"), drawn)
    torch.testing.assert_close(one, torch.cat([donors[:, :2], donors[drawn][:, 2:]], 1))
    assert [draws_for(n, None) for n in (0, 100, 600, 683, 2047, 2048, 10**6)] == [4, 4, 4, 3, 2, 1, 1]
    assert draws_for(10**6, 3) == 3
    assert [coalitions_scored(m) for m in (1, 3)] == [[0, 1], list(range(8))]
    assert coalitions_scored(7) == [0, *(2**i for i in range(7)), *(127 - 2**i for i in range(7)), 127]
    plan = conditions_of(2, "resample", 3)
    assert [len(plan[f"{kind}.{c}"]) for kind in ("coalition", "resampled") for c in range(4)] == [3, 3, 3, 1] * 2
    masked = conditions_of(2, "mean", 3)
    assert [len(masked[f"{kind}.{c}"]) for kind in ("coalition", "resampled") for c in range(4)] == [1] * 4 + [
        3,
        3,
        3,
        1,
    ]
    assert [c.draw for c in plan["shuffled.1"]] == [c.draw for c in masked["resampled.1"]] == [0, 1, 2]
    assert {c.absence for wanted in masked.values() for c in wanted} == {"mean", "resample"}
    assert [c.members for c in plan["resampled.1"]] == [(True, False)] * 3
    assert plan["shuffled.0"] == plan["coalition.2"]
    assert "coalition.0" not in conditions_of(2, "model", 3)


def test_no_sample_stands_in_for_itself_in_any_batch(generator: torch.Generator, monkeypatch) -> None:
    """Rows are numbered through all batches, of scores, of what remains, and of answers without labels."""
    seen: list[list[int]] = []
    plain = Remover.drawn
    monkeypatch.setattr(Remover, "drawn", lambda self, rows, *a: seen.append(rows.tolist()) or plain(self, rows, *a))
    head, loader = chain(generator), batches(generator, 100, 40)
    numbers = [rows.tolist() for rows in torch.arange(100).split(40)]
    toy: Any = Toy(head, head)
    diagnose(toy, loader, resamples=0, probes=False, draws=1, remaining=True)
    assert seen == numbers * 2
    toy.labels = lambda batch: None
    seen.clear()
    diagnose(toy, loader, resamples=0, probes=False)
    assert seen == numbers


@pytest.mark.parametrize("groups", [2, 3])
def test_three_groups_have_intervals_that_end_where_scores_do(groups: int, generator: torch.Generator) -> None:
    head, loader = chain(generator), batches(generator, 300)
    with torch.no_grad():
        right = [(a, b, head(torch.cat([a, b], 1)).argmax(1)) for a, b, _ in loader]
    right[0][2][:2] = (right[0][2][:2] + 1) % 3  # two of 300 are wrong, so the interval would end above 1
    d = diagnose(Toy(head, head), right, groups=groups, resamples=40, probes=False)
    for name in ("score.all", "without.audio", "shuffled.image", "use_share.image"):
        m = d[name]
        assert (m.low is None) == (groups == 2), name
        assert groups == 2 or 0 <= m.low <= m.value <= m.high <= 1, name


def test_progress_tells_each_batch_and_how_many_there_are(generator: torch.Generator) -> None:
    head, loader = chain(generator), batches(generator, 100, 40)

    class Stream:
        def __iter__(self) -> Any:
            return iter(loader)

    for given, total in ((loader, 3), (Stream(), None)):
        told: list[Any] = []
        diagnose(Toy(head, head), given, probe_data=loader, resamples=0, progress=lambda *a, told=told: told.append(a))
        passes = [(phase, done, total) for phase in ("collect", "score") for done in range(4)]
        assert told == [*passes, ("numbers", 0, None), *(("probes", done, 3) for done in range(4))]


def test_rows_that_train_probes_are_a_sample_that_the_seed_draws(generator: torch.Generator) -> None:
    loader = [(a, b, (a[:, 0] > 0).long()) for a, b, _ in batches(generator, 100, 40)]
    toy, kept = Toy(*[chain(generator)] * 2), []
    for seed in (1, 1, 2):
        collector = Collector(toy, 4, seed, 20)
        collector.start(loader[0])
        rows = training_rows(toy, Batches(loader), collector, lambda *a: None).columns
        assert torch.equal(rows["labels"], (rows["x"][:, 0] > 0).long())
        kept.append(set(rows["x"][:, 0].tolist()))
    assert [len(rows) for rows in kept] == [20] * 3
    assert (kept[0] == kept[1], len(kept[0] & kept[2]) < 15) == (True, True)
    assert kept[0] - set(loader[0][0][:20, 0].tolist()), "not the first ones"


def test_resampled_scores_and_total_effect_of_a_linear_model(generator: torch.Generator) -> None:
    """y = a + 2b of independent standard normal a, b: R² = 1 − 2 Var(part that is resampled) / 5, effects 1/5 and 4/5."""
    n = 6000
    image, audio = torch.randn(n, 1, generator=generator), torch.randn(n, 1, generator=generator)
    truth = image + 2 * audio
    fusion = torch.nn.Linear(2, 1, bias=False)
    fusion.weight.data = torch.tensor([[1.0, 2.0]])
    toy = Toy(fusion, fusion)
    loader = list(zip(image.split(1000), audio.split(1000), truth.split(1000), strict=True))
    d = diagnose(toy, loader, draws=4, emap=True)
    assert (d.metric, d.settings["task"], d.value("score.chance")) == ("r2", "numbers", 0.0)
    assert d.value("score.all") == pytest.approx(1)
    expected = {"image": 1 / 5, "audio": 4 / 5}
    for name, share in expected.items():
        assert d.value(f"shuffled.{name}") == pytest.approx(1 - 2 * share, abs=0.05)
        assert d.value(f"total_effect.{name}") == pytest.approx(share, abs=0.03)
        assert abs(d.value(f"total_effect.{name}") - share) < 5 * d[f"total_effect.{name}"].error
        assert d.value(f"alone.{name}") == pytest.approx(share, abs=0.05)
        assert d.value(f"resampled_shapley.{name}") == pytest.approx(2 * share, abs=0.06), "R² is additive here"
        assert d.value(f"output_share.{name}") == pytest.approx(share, abs=0.03)
    assert (d.value("emap.score"), d.value("emap.interaction")) == pytest.approx((1, 0), abs=1e-5)
    assert {v.kind for v in d.verdicts} == {"relied on"}
    own = diagnose(toy, loader, metric=lambda y, t: -float((y - t).square().mean()), resamples=10, probes=False)
    assert own.value("score.all") == pytest.approx(0, abs=1e-9)
    assert own.value("score.chance") == pytest.approx(-10, rel=0.05)
    assert own.value("shuffled.audio") == pytest.approx(-8, rel=0.1)


def test_a_product_is_all_interaction(generator: torch.Generator) -> None:
    image, audio = torch.randn(2, 1000, 1, generator=generator)

    class Product(Toy):
        def fuse(self, features: dict[str, Tensor]) -> Tensor:
            return features["image"] * features["audio"]

    data, options = [(image, audio, image * audio)], {"emap": True, "remaining": True}
    d = diagnose(Product(torch.nn.Identity()), data, resamples=0, probes=False, **options)
    assert ("remaining.rank.all" in d.measures, "remaining.eta2.all" in d.measures) == (True, False), "no classes"
    assert (d.value("emap.all"), d.value("emap.score")) == pytest.approx((1, 0), abs=0.1)
    assert d.value("emap.interaction") == pytest.approx(1 - d.value("emap.score"))


def test_what_remains_of_the_representation_and_modality_probe(generator: torch.Generator) -> None:
    """Features side by side: without one, its part of the variance between classes is gone, and ranks are those of the parts."""
    labels = torch.randint(3, (2000,), generator=generator)
    image, audio = (
        c[labels] + torch.randn(2000, 4, generator=generator) for c in torch.randn(2, 3, 4, generator=generator)
    )

    class Sides(Toy):
        def represent(self, features: dict[str, Tensor]) -> Tensor:
            return torch.cat(list(features.values()), 1)

        def latents(self, batch: Any) -> dict[str, Tensor]:
            return {"image": batch[0], "audio": batch[1].masked_fill(batch[2][:, None] == 0, math.nan)}

    chain4 = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 3))
    d = diagnose(
        Sides(torch.nn.Identity(), chain4), [(image, audio, labels)], resamples=0, probes=False, remaining=True
    )
    x = torch.cat([image, audio], 1).double().numpy()
    means = np.stack([x[labels == c].mean(0) for c in range(3)])[labels]
    assert d.value("remaining.eta2.all") == pytest.approx(r2_score(x, means, multioutput="variance_weighted"))
    means[:, 4:] = x[:, 4:].mean(0)
    assert d.value("remaining.eta2.audio") == pytest.approx(
        r2_score(x, means, multioutput="variance_weighted"), abs=0.01
    )
    covariance = np.cov(x.T)
    for name, sigma in (("all", covariance), ("audio", covariance * np.kron(np.eye(2), np.ones((4, 4))))):
        rank = np.exp(entropy(np.sqrt(np.linalg.eigvalsh(sigma))))
        assert d.value(f"remaining.rank.{name}") == pytest.approx(rank, rel=1e-4 if name == "all" else 0.02)
    kept = labels != 0
    rows = np.concatenate([image[kept], audio[kept]])
    own = np.arange(len(rows)) < len(rows) // 2
    best = LogisticRegression().fit(rows, own).score(rows, own)
    assert d.value("modality_probe.chance") == 0.5
    assert d.value("modality_probe.balanced_accuracy") > best - 0.05


def test_labels_in_every_form(generator: torch.Generator) -> None:
    head, loader = chain(generator), batches(generator)
    plain = diagnose(Toy(head, head), loader, resamples=0, probes=False)
    one_hot = [(a, b, torch.eye(3)[y]) for a, b, y in loader]
    assert diagnose(Toy(head, head), one_hot, resamples=0, probes=False).measures == plain.measures
    text = [(a, b, [("cat", "dog", "eel")[i] for i in y]) for a, b, y in loader]
    toy = Toy(head, head)
    toy.classes = ["cat", "dog", "eel"]  # type: ignore[attr-defined]
    assert diagnose(toy, text, resamples=0, probes=False).measures == plain.measures
    toy.classes = ["cat", "dog", "seal"]  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="Unknown class 'eel'"):
        diagnose(toy, text, resamples=0, probes=False)
    several = [(a, b, torch.stack([y > 0, y > 1, y == 0], 1).long()) for a, b, y in loader]
    d = diagnose(Toy(head, head), several, resamples=10)
    assert (d.metric, d.settings["task"]) == ("f1", "labels")
    assert "alone.image" in d.measures
    towers = Toy(torch.nn.Identity())
    towers.fuse = lambda f: (f["image"][:, :4] * f["audio"]).sum(1, keepdim=True)  # type: ignore[method-assign]
    pairs = [(b + 0.1 * torch.randn(b.shape, generator=generator), b) for _, b, _ in loader]
    match = [
        (torch.cat([a, a]), torch.cat([b, b.roll(1, 0)]), 1 - torch.arange(2).repeat_interleave(len(a)))
        for a, b in pairs
    ]
    d = diagnose(towers, match, resamples=0, probes=False)
    assert (d.metric, {v.kind for v in d.verdicts}) == ("auroc", {"relied on"}), (
        "each tower counts beside the other alone"
    )


def test_what_is_put_together_from_other_measures(generator: torch.Generator) -> None:
    """Need, robustness, index and margin of distillation, each by its formula from scores worked out here."""
    image, audio = torch.randn(1200, 6, generator=generator), torch.randn(1200, 4, generator=generator)
    audio[:, 0] += image[:, 0]
    head = chain(generator, 2)
    toy = Masked(head, head)
    with torch.no_grad():
        y = toy.fuse({"image": image, "audio": audio})
    margin = y[:, 1] - y[:, 0]
    labels = (margin + 0.5 * margin.std() * torch.randn(1200, generator=generator) > margin.median()).long()
    d = diagnose(toy, [(image, audio, labels)], resamples=20, control=True)
    truth, features = labels.numpy(), {"image": image, "audio": audio}
    with torch.no_grad():
        y = toy.fuse(features, torch.tensor([[True, False]]).expand(1200, 2))
    only = roc_auc_score(truth, (y[:, 1] - y[:, 0]).numpy())
    able = {n: max(d.value(f"alone.{n}"), d.value(f"only.{n}")) - 0.5 for n in features}
    assert d.value("robustness.image") == pytest.approx((only - 0.5) / able["image"], abs=1e-4)
    used = {n: max(d.value(f"resampled_shapley.{n}"), 0.0) for n in features}
    index = d.value("resampled_shapley.image") / sum(used.values()) * sum(able.values()) / able["image"]
    assert d.value("use_index.image") == pytest.approx(index)
    assert d.settings["sample_rows"] == 1200, "all rows are kept, in another order"
    kept = Reservoir(4096, 0)
    kept.add(0, {"row": torch.arange(1200)})
    order = kept.columns["row"]
    task, shuffled = Task("classes", "auroc", 2), {n: x[order] for n, x in features.items()}
    whole_score, without = (
        reliance.train_afresh(shuffled, labels[order], names, task=task) for names in (("image", "audio"), ("audio",))
    )
    need = d["need.image"]
    assert need.value == pytest.approx(whole_score.score - without.score)
    half = 1.959964 * math.hypot(whole_score.error, without.error)
    assert (need.low, need.high) == pytest.approx((need.value - half, need.value + half))
    centred = [x.double() - x.double().mean(0) for x in (image, audio, labels[:, None])]

    def log_det(*chosen: int) -> float:
        x = torch.cat([centred[i] for i in chosen], 1)
        return float(torch.logdet(x.t() @ x / 1199))

    def told(*chosen: int, of: int = 2) -> float:
        return (log_det(*chosen) + log_det(of) - log_det(*chosen, of)) / 2

    near = {"abs": 0.02}  # the correction of the bias is about d/N
    assert d.value("distillation.image") == pytest.approx(told(1, of=0) - told(0), **near)
    less, parts = (
        min(told(0), told(1)),
        {k: d.value(f"pid.{k}.image") for k in ("redundancy", "unique", "unique_rest", "synergy")},
    )
    assert parts["redundancy"] == pytest.approx(less, **near)
    assert parts["unique"] == pytest.approx(told(0) - less, **near)
    assert parts["unique_rest"] == pytest.approx(told(1) - less, **near)
    assert parts["synergy"] == pytest.approx(told(0, 1) - max(told(0), told(1)), **near)


def test_scores_of_unimodal_models_take_the_place_of_probes() -> None:
    planted = planted_head(4, ignored=1)
    lost = diagnose(planted, planted.batches(), resamples=0, probes=False, alone={"a": 0.9, "b": 0.8})
    assert (lost.value("alone.a"), lost.value("alone.b")) == (0.9, 0.8)
    assert [v.kind for v in lost.verdicts] == ["relied on", "collapsed"]
    nothing = diagnose(planted, planted.batches(), resamples=0, alone={"b": lost.value("score.chance")})
    assert nothing.verdicts[1].kind == "uninformative"
    assert nothing.value("alone.a") != 0.9
    for bad in ({"c": 0.5}, {"a": 0.5}):
        with pytest.raises(InputError, match="alone has scores"):
            diagnose(planted, planted.batches(), resamples=0, probes=False, alone=bad)


def test_ability_from_raw_inputs_and_from_models_of_the_adapter(generator: torch.Generator) -> None:
    """An encoder that never learned hides what its inputs know; the inputs themselves, or a model of them, tell."""
    image, audio = torch.randn(1500, 6, generator=generator), torch.randn(1500, 4, generator=generator)
    labels = (image[:, 0] > 0).long()
    head = chain(generator, 2)

    class Untrained(Toy):
        def encode(self, batch: Any) -> dict[str, Tensor]:
            return {"image": batch[0][:, 1:].repeat(1, 2)[:, :6], "audio": batch[1]}

    class Known(Untrained):
        def inputs(self, batch: Any) -> dict[str, Tensor]:
            return {"image": batch[0]}

    class Modelled(Untrained):
        def unimodal(self, batch: Any) -> dict[str, Tensor]:
            return {"image": batch[0][:, :1], "audio": batch[1][:, :1]}

    loader = list(zip(image.split(500), audio.split(500), labels.split(500), strict=True))
    blind, seeing, told = (diagnose(kind(head, head), loader, resamples=20) for kind in (Untrained, Known, Modelled))
    assert blind.value("alone.image") < 0.65
    assert "bounds it from below" in blind.summary()
    assert seeing.value("alone.image") == seeing.value("probe_inputs.image") > 0.9
    assert seeing.value("probe_features.image") == blind.value("alone.image")
    assert told.value("alone.image") == pytest.approx(1)
    assert told.value("alone.audio") == pytest.approx(roc_auc_score(labels, audio[:, 0]))
    found = told.verdicts[0].evidence["alignment"]
    assert found == told.value("alignment.image"), "it is evidence of the verdict"


def test_what_is_asked_for_comes_before_what_the_adapter_brings(generator: torch.Generator) -> None:
    head, loader = chain(generator, 2), batches(generator, classes=2)
    toy: Any = Toy(head, head)
    light: dict[str, Any] = {"resamples": 0, "probes": False, "agop": False}
    toy.metric = "accuracy"
    assert diagnose(toy, loader, **light).metric == "accuracy"
    assert diagnose(toy, loader, metric="auroc", **light).metric == "auroc"
    options = DiagnoseOptions(metric="auroc", seed=3, groups=5, **light)
    d = diagnose(toy, loader, options=options, seed=4)
    assert (d.metric, d.settings["seed"], d.settings["groups"]) == ("auroc", 4, 5)
    toy.unimodal = lambda batch: {"image": batch[0][:, :1], "audio": batch[1][:, :1]}
    told, given = (
        diagnose(toy, loader, **light),
        diagnose(toy, loader, alone={"image": 0.9}, **light | {"probes": True}),
    )
    assert given.value("alone.image") == 0.9 != told.value("alone.image")
    assert given.value("alone.audio") == told.value("alone.audio"), "the adapter's own model, no probe"
    assert "probe_features.audio" not in given.measures

    class Unread(list):
        def __iter__(self) -> Any:
            raise AssertionError("all abilities are known")

    assert diagnose(toy, loader, probe_data=Unread(), **light | {"probes": True}).measures == told.measures
    whole = {"resamples": 0, "probes": False, "reliance": False}
    weights = [{n: torch.randn(20, w, generator=generator) for n, w in (("image", 6), ("audio", 4))} for _ in range(2)]
    name = "weight_classifier.cross_entropy"
    assert name not in diagnose(toy, loader, **whole).measures
    plain = diagnose(toy, loader, unimodal_weights=weights[0], **whole).value(name)
    toy.unimodal_weights = weights[1]
    assert diagnose(toy, loader, **whole).value(name) != plain
    assert diagnose(toy, loader, unimodal_weights=weights[0], **whole).value(name) == plain

    class Brings(list):
        def training_batches(self) -> list[Any]:
            raise AssertionError("other rows were given")

    probed = {"resamples": 0, "agop": False, "alone": {"image": 0.9}}
    toy.unimodal = None
    assert diagnose(toy, Brings(loader), probe_data=loader[:2], **probed).settings["probe_data"]


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
