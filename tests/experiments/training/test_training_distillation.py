"""Distillation: the loss, who teaches whom, and who may move."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from training_data import small, tiny

from mmc_fast._util.seeds import generator, seeded_init
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
    never[:2] = True  # two rows are enough
    assert len(distil(model, replace(dataset, present=never), unimodal, KD, seed=seed)[0]["loss"]) == KD.epochs


def maps(loss: str, kd: KDConfig, model, source, s: int, seed: int, teacher: str, student: str):
    """The projections of a pair as they start."""
    with seeded_init(seed, "kd", "init", teacher, student):
        out = {"info_nce": kd.embedding_dim, "kl": 3, "mse": source.encoder.out_dim}[loss]
        mapped = torch.nn.Linear(model.widths[s], out)
        return mapped, torch.nn.Linear(source.encoder.out_dim, out) if loss == "info_nce" else None


def lesson(loss: str, kd: KDConfig, mapped, reader, source, z, y) -> torch.Tensor:
    """The loss of student features ``z`` against the teacher ``source`` on its inputs ``y``."""
    if loss == "info_nce":
        a, b = F.normalize(mapped(z), dim=1), F.normalize(reader(source.encoder(y)), dim=1)
        order, logits = torch.arange(len(a)), a @ b.t() / kd.temperature
        return (F.cross_entropy(logits, order) + F.cross_entropy(logits.t(), order)) / 2
    if loss == "mse":
        return (mapped(z) - source.encoder(y)).square().mean()
    p, q = torch.softmax(source(y) / kd.kl_temperature, 1), torch.softmax(mapped(z) / kd.kl_temperature, 1)
    return kd.kl_temperature**2 * (p * (p / q).log()).sum(1).mean()


@pytest.mark.parametrize("loss", ["info_nce", "kl", "mse"])
@pytest.mark.parametrize("streamed", [False, True])
def test_distillation_is_the_loop_written_out(loss, streamed, seed):
    """Order, batches without one of a single row, Adam on the student and its projections, losses by rows."""
    dataset = tiny(seed, absent=0.3)
    model, unimodal = prepared(seed, dataset)
    *students, teacher = unimodal.weakest_first()
    t, part = dataset.modalities.index(teacher), dataset.part("train")
    count = int((part.present[:, t] & part.present[:, dataset.modalities.index(students[0])]).sum())
    size = next(b for b in range(5, count) if count % b == 1)
    kd = replace(KD, epochs=3, batch_size=size, lr=0.01, loss=loss, temperature=0.2, kl_temperature=3.0)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    done = distil(model, replace(dataset, streamed=streamed), unimodal, kd, seed=seed)
    found = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(start)
    assert [(d["teacher"], d["student"]) for d in done] == [(teacher, student) for student in students]
    for pair, student in zip(done, students, strict=True):
        s, source = dataset.modalities.index(student), unimodal.models[teacher]
        both = part.present[:, t] & part.present[:, s]
        x, y, encoder = part.features[s][both], part.features[t][both], model.encoders[s]
        mapped, reader = maps(loss, kd, model, source, s, seed, teacher, student)
        moving = [p for module in (encoder, mapped, reader) if module is not None for p in module.parameters()]
        optimizer, losses = torch.optim.Adam(moving, lr=0.01, foreach=False), []
        order_of = generator(seed, "kd", "order", teacher, student)
        for _ in range(3):
            batches = [rows for rows in torch.randperm(len(x), generator=order_of).split(size) if len(rows) > 1]
            total = 0.0
            for rows in batches:
                value = lesson(loss, kd, mapped, reader, source, encoder(x[rows]), y[rows])
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                total += float(value.detach()) * len(rows)
            losses.append(total / sum(map(len, batches)))
        assert pair["loss"] == pytest.approx(losses, rel=1e-3)
    for name, p in model.state_dict().items():
        torch.testing.assert_close(found[name], p, rtol=1e-3, atol=1e-5)


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
        mapped, reader = maps(loss, kd, model, source, column[weakest], seed, teacher, weakest)
        lessons.append(lesson(loss, kd, mapped, reader, source, z, y))
    assert done[0]["loss"][0] == pytest.approx(float(torch.stack(lessons).mean().detach()), rel=1e-4)
