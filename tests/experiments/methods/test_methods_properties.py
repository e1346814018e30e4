"""What defines each of the re-implemented methods, tested apart from their scores."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from test_methods import BUDGET
from training_data import tiny

from mmc_fast.experiments.methods import get
from mmc_fast.experiments.methods.baseline import Batch
from mmc_fast.experiments.methods.graph import Grape, Muse, supervised_contrastive
from mmc_fast.experiments.methods.imputation import ImputedConcat
from mmc_fast.experiments.methods.mt import SubsetTransformer, subsets
from mmc_fast.experiments.methods.shaspec import shared_distance
from mmc_fast.experiments.methods.smil import Smil

DIMS = {"a": 5, "b": 3, "c": 4}


def build(kind, seed: int, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(DIMS, 3, BUDGET, **options)


def rows(seed: int, count: int = 12) -> Batch:
    part = tiny(seed).part("train")
    present = torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)) < 0.6
    present[torch.arange(count), torch.arange(count) % 3] = True
    present[0] = torch.tensor([True, False, True])
    random = torch.Generator().manual_seed(seed)
    return Batch([x[:count] for x in part.features], part.present[:count], present, part.labels[:count], random)


def test_smil_inner_step_is_the_step_and_its_gradient_has_a_second_order_part(seed):
    model = build(Smil, seed, inner_lr=0.1).double()
    batch = rows(seed)
    batch = Batch([x.double() for x in batch.features], batch.natural, batch.present, batch.labels, batch.random)
    model.centres.normal_(generator=batch.random)
    fast = model.inner_step(batch)
    hidden = (~batch.present.all(1)).nonzero().flatten()
    loss = F.cross_entropy(model([x[hidden] for x in batch.features], batch.present[hidden]), batch.labels[hidden])
    name = "layers.layers.0.weight"
    own = dict(model.named_parameters())[name]
    slope = torch.autograd.grad(loss, own)[0]
    torch.testing.assert_close(fast[name], own - 0.1 * slope)

    def outer(second_order: bool) -> torch.Tensor:
        found = model.inner_step(batch)
        if not second_order:  # the same step with a derivative of one
            own_now = dict(model.named_parameters())
            found = {k: own_now[k] + (v - own_now[k]).detach() for k, v in found.items()}
        logits = torch.func.functional_call(model, found, (batch.features, batch.present))
        return F.cross_entropy(logits, batch.labels)

    full, first = (torch.autograd.grad(outer(flag), own)[0] for flag in (True, False))
    assert not torch.allclose(full, first, rtol=1e-6, atol=1e-12)
    direction = torch.randn(own.shape, generator=batch.random, dtype=torch.float64)
    values = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            own.add_(step * direction)
        values.append(float(outer(True).detach()))
        with torch.no_grad():
            own.sub_(step * direction)
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(float((full * direction).sum()), rel=1e-4, abs=1e-8)


def test_mt_hides_absent_tokens_and_trains_on_every_subset(seed):
    model = build(SubsetTransformer, seed, fusion_layer=1).eval()
    batch = rows(seed)
    encoded, filled, _ = model.filled(batch.features, batch.present)
    changed = [torch.where(filled[:, i, None], z, torch.randn(z.shape)) for i, z in enumerate(encoded)]
    torch.testing.assert_close(model.fuse(changed, filled), model.fuse(encoded, filled), rtol=0, atol=0)
    seen = [torch.where(filled[:, i, None], z + 1, z) for i, z in enumerate(encoded)]
    assert not torch.allclose(model.fuse(seen, filled), model.fuse(encoded, filled))

    t = model.transformer  # row 0 has a and c: as if b had no token at all
    tokens = [t.class_token] + [t.projections[i](encoded[i][0]) + t.modality[i] for i in (0, 2)]
    tokens = torch.stack(tokens)[None]
    alone = torch.eye(3, dtype=torch.bool)[None, None]
    for n, block in enumerate(t.blocks):
        tokens = block(tokens, alone if n < 1 else None)
    torch.testing.assert_close(model.fuse(encoded, filled)[0], t.classifier(t.norm(tokens[0, 0])))

    expected = []
    for chosen in subsets(3, batch.random):
        here = batch.natural & chosen
        logits = model(batch.features, here)
        expected.append(F.cross_entropy(logits, batch.labels))
    assert len(expected) == 7
    torch.testing.assert_close(model.loss(batch), torch.stack(expected).mean())
    many = subsets(6, batch.random)
    assert many.shape == (8, 6)
    assert bool(many.any(1).all())
    assert bool(many[0].all())


@pytest.mark.parametrize("kind", [Muse, Grape])
def test_absent_edges_carry_nothing(kind, seed):
    model = build(kind, seed)
    batch = rows(seed)
    encoded, filled, _ = model.filled(batch.features, batch.present)
    encoded = [z.detach().requires_grad_() for z in encoded]
    out = model.graph(encoded, filled)
    out.square().sum().backward()
    for i, z in enumerate(encoded):
        assert bool((z.grad[~filled[:, i]] == 0).all())
        assert bool(z.grad[filled[:, i]].abs().sum() > 0)
    # A sample without its edges leaves the others as if it were not there.
    alone = filled.clone()
    alone[3] = False
    keep = torch.arange(len(filled)) != 3
    without = model.graph([z.detach()[keep] for z in encoded], filled[keep])
    torch.testing.assert_close(model.graph(encoded, alone)[keep], without)


def test_shaspec_shared_features_converge_under_the_alignment_term(seed):
    dataset, distances = tiny(seed), []
    for weight in (0.0, 5.0):
        method = get("shaspec")
        options = {"alignment": weight, "domain": 0.02}
        changes = {"modality_dropout": 0.3, "options": options, "epochs": 30, "selection": "last", "lr": 3e-3}
        fitted = method.fit(dataset, changes, 0, budget=BUDGET)
        model = fitted.answer.__self__
        part = dataset.part("validation")
        encoded, filled, _ = model.filled(part.features, part.present)
        shared, _ = model.parts(encoded)
        distances.append(float(shared_distance(shared, filled).detach()) / float(shared.std().detach() + 1e-3))
    assert distances[1] < 0.3 * distances[0], distances


def test_shared_distance_pair_by_pair(seed):
    g = torch.Generator().manual_seed(seed)
    shared, filled = torch.randn(3, 5, 4, generator=g), torch.rand(5, 3, generator=g) < 0.7
    filled[0] = True
    pairs = [
        float((shared[i, n] - shared[j, n]).abs().mean())
        for n in range(5) for i in range(3) for j in range(i) if filled[n, i] and filled[n, j]
    ]  # fmt: skip
    assert float(shared_distance(shared, filled)) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)


def test_supervised_contrast_anchor_by_anchor(seed):
    g = torch.Generator().manual_seed(seed)
    unit = F.normalize(torch.randn(6, 4, generator=g, dtype=torch.float64), dim=1)
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    anchors = []
    for a in range(5):
        others = [k for k in range(6) if k != a]
        total = sum(math.exp(float(unit[a] @ unit[k]) / 0.5) for k in others)
        alike = [k for k in others if labels[k] == labels[a]]
        logs = [math.log(math.exp(float(unit[a] @ unit[k]) / 0.5) / total) for k in alike]
        anchors.append(-sum(logs) / len(logs))
    assert float(supervised_contrastive(unit, labels, 0.5)) == pytest.approx(sum(anchors) / 5, rel=1e-9)


def test_constants_fill_empty_slots(seed):
    dataset = tiny(seed)
    batch, train = rows(seed), dataset.part("train")
    zeros, mean = build(ImputedConcat, seed, fill="zeros"), build(ImputedConcat, seed, fill="mean")
    z = [e(x) for e, x in zip(zeros.encoders, batch.features, strict=True)]
    empty = zeros.encoders[1](torch.zeros(3))
    expected = zeros.layers.layers(torch.cat([z[0][0], empty, z[2][0]]))
    torch.testing.assert_close(zeros(batch.features, batch.present)[0], expected)
    mean.end_epoch(train)
    average = mean.encoders[1](train.features[1]).mean(0)
    expected = mean.layers.layers(torch.cat([z[0][0], average, z[2][0]]))
    torch.testing.assert_close(mean(batch.features, batch.present)[0], expected)
