"""Distillation: the loss, who teaches whom, and who may move."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from training_data import small, tiny

from mmc_fast._util.seeds import seeded_init
from mmc_fast.errors import InputError
from mmc_fast.experiments.data import MultimodalDataset
from mmc_fast.experiments.tasks import Classification
from mmc_fast.experiments.training import KDConfig, UnimodalModels
from mmc_fast.experiments.training.distillation import distil, info_nce, teaching_plan
from mmc_fast.experiments.training.model import MultimodalModel
from mmc_fast.experiments.training.parts import fingerprint
from mmc_fast.experiments.training.unimodal import train_unimodal

KD = KDConfig(epochs=4, batch_size=16, embedding_dim=4)


def prepared(seed: int, dataset: MultimodalDataset, **changes):
    config = small("vanilla", **changes)
    unimodal = train_unimodal(dataset, config, seed=seed, fingerprint=fingerprint(dataset))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MultimodalModel(dataset.dims, dataset.num_classes, config), unimodal


def test_info_nce_pair_by_pair(seed):
    g = torch.Generator().manual_seed(seed)
    a, b = (F.normalize(torch.randn(7, 5, generator=g, dtype=torch.float64), dim=1) for _ in range(2))
    total = 0.0
    for x, y in ((a, b), (b, a)):
        for n in range(7):
            scores = [math.exp(float(x[n] @ y[k]) / 0.07) for k in range(7)]
            total -= math.log(scores[n] / sum(scores)) / 14
    assert float(info_nce(a, b, 0.07)) == pytest.approx(total, rel=1e-9)


def test_teaching_plans():
    unimodal = UnimodalModels({}, {"a": 0.9, "b": 0.3, "c": 0.5, "d": 0.7}, {}, Classification.of(2))
    assert teaching_plan(unimodal, KD, 0) == [("a", "b"), ("a", "c"), ("a", "d")]
    several = replace(KD, teachers="stronger")
    expected = [("c", "b"), ("d", "b"), ("a", "b"), ("d", "c"), ("a", "c"), ("a", "d")]
    assert teaching_plan(unimodal, several, 0) == expected
    reverse = teaching_plan(unimodal, replace(several, order="strongest_first"), 0)
    assert reverse == [("a", "b"), ("d", "b"), ("c", "b"), ("a", "c"), ("d", "c"), ("a", "d")]
    shuffled = [teaching_plan(unimodal, replace(several, order="random"), s) for s in range(12)]
    assert all(sorted(p) == sorted(expected) for p in shuffled)
    assert len({tuple(p) for p in shuffled}) > 1


def test_only_students_move(seed):
    dataset = tiny(seed)
    model, unimodal = prepared(seed, dataset)
    teacher = unimodal.strongest
    teachers = {n: [p.clone() for p in m.parameters()] for n, m in unimodal.models.items()}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    done = distil(model, dataset, unimodal, replace(KD, epochs=15, lr=0.01), seed=seed)
    assert [d["teacher"] for d in done] == [teacher, teacher]
    for name, params in teachers.items():
        assert all(torch.equal(p, q) for p, q in zip(params, unimodal.models[name].parameters(), strict=True))
    strongest = dataset.modalities.index(teacher)
    for name, p in model.named_parameters():
        student = name.startswith("encoders.") and not name.startswith(f"encoders.{strongest}.")
        assert torch.equal(p, before[name]) != student, name
    assert all(d["loss"][-1] < d["loss"][0] for d in done)


def test_only_train_rows_with_both_modalities_are_used(seed):
    dataset = tiny(seed, absent=0.4)
    outcomes = []
    for poisoned in (False, True):
        data = dataset
        if poisoned:
            unused = (dataset.split != 0)[:, None] | ~dataset.present
            changed = {k: torch.where(unused[:, i, None], 1e6, x) for i, (k, x) in enumerate(dataset.features.items())}
            data = replace(dataset, features=changed)
        model, unimodal = prepared(seed, dataset)
        distil(model, data, unimodal, KD, seed=seed)
        outcomes.append(model.state_dict())
    assert all(torch.equal(outcomes[0][k], outcomes[1][k]) for k in outcomes[0])


def test_refusals(seed):
    single = tiny(seed, dims=(5,))
    model, unimodal = prepared(seed, single)
    with pytest.raises(InputError, match="at least 2 modalities"):
        distil(model, single, unimodal, KD, seed=seed)
    dataset = tiny(seed, dims=(5, 3))
    never = dataset.present.clone()
    never[::2, 0], never[1::2, 1] = False, False
    apart = replace(dataset, present=never)
    model, unimodal = prepared(seed, apart)
    with pytest.raises(InputError, match="0 train row"):
        distil(model, apart, unimodal, KD, seed=seed)


@pytest.mark.parametrize("loss", ["info_nce", "kl", "mse"])
def test_every_loss_brings_the_student_to_a_frozen_teacher(loss, seed):
    dataset = tiny(seed)
    model, unimodal = prepared(seed, dataset)
    before = {n: [p.clone() for p in m.parameters()] for n, m in unimodal.models.items()}
    kd = replace(KD, epochs=30, lr=1e-2, loss=loss, teachers="stronger")
    done = distil(model, dataset, unimodal, kd, seed=seed)
    assert len(done) == 3
    assert all(pair["loss"][-1] < pair["loss"][0] for pair in done), [pair["loss"] for pair in done]
    for name, m in unimodal.models.items():
        assert all(torch.equal(a, b) for a, b in zip(before[name], m.parameters(), strict=True)), (
            f"teacher {name} moved"
        )


@pytest.mark.parametrize("loss", ["info_nce", "kl", "mse"])
def test_simultaneous_teachers_are_the_mean_of_their_lessons_on_the_rows_that_have_them(loss, seed):
    dataset = tiny(seed, absent=0.4)
    model, unimodal = prepared(seed, dataset)
    kd = replace(KD, epochs=1, batch_size=500, loss=loss, teachers="stronger", order="simultaneous")
    weakest, *stronger = unimodal.weakest_first()
    column = {n: i for i, n in enumerate(dataset.modalities)}
    train = dataset.part("train")
    start = {k: v.clone() for k, v in model.state_dict().items()}
    done = distil(model, dataset, unimodal, kd, seed=seed)
    assert [(d["teacher"], d["student"]) for d in done] == [(" + ".join(stronger), weakest), (stronger[1], stronger[0])]

    model.load_state_dict(start)
    lessons = []
    for teacher in stronger:
        both = train.present[:, column[teacher]] & train.present[:, column[weakest]]
        x, y = train.features[column[weakest]][both], train.features[column[teacher]][both]
        z, source = model.encoders[column[weakest]](x), unimodal.models[teacher]
        with seeded_init(seed, "kd", "init", teacher, weakest):
            out = {"info_nce": kd.embedding_dim, "kl": 3, "mse": source.encoder.out_dim}[loss]
            student = torch.nn.Linear(model.widths[column[weakest]], out)
            reader = torch.nn.Linear(source.encoder.out_dim, out)
        if loss == "info_nce":
            a, b = F.normalize(student(z), dim=1), F.normalize(reader(source.encoder(y)), dim=1)
            order = torch.arange(len(a))
            logits = a @ b.t() / kd.temperature
            lessons.append((F.cross_entropy(logits, order) + F.cross_entropy(logits.t(), order)) / 2)
        elif loss == "mse":
            lessons.append((student(z) - source.encoder(y)).square().mean())
        else:
            p, q = torch.softmax(source(y) / 4, 1), torch.softmax(student(z) / 4, 1)
            lessons.append(16 * (p * (p / q).log()).sum(1).mean())
    assert done[0]["loss"][0] == pytest.approx(float(torch.stack(lessons).mean().detach()), rel=1e-4)
