"""The model as a path: encoders, heads, substitution, fusion; and the rule that picks substitutes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from training_data import small, tiny

from mmc_fast.errors import InputError
from mmc_fast.experiments.training import evaluate, parts, predict
from mmc_fast.experiments.training.encoder import build_encoder
from mmc_fast.experiments.training.model import MultimodalModel, select_modalities
from mmc_fast.experiments.training.substitution import describe, ranking_parts, refresh, source_for


def build(seed: int, config, dims=None) -> MultimodalModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MultimodalModel(dims or {"a": 5, "b": 3, "c": 4}, 3, config).eval()


def random_present(rows: int, seed: int) -> torch.Tensor:
    present = torch.rand(rows, 3, generator=torch.Generator().manual_seed(seed)) < 0.6
    present[~present.any(1), 1] = True
    return present


@pytest.mark.parametrize("method", ["vanilla", "ebr"])
@pytest.mark.parametrize("fusion", ["concat", "late", "transformer"])
def test_absent_rows_are_never_read_in_either_direction(method, fusion, seed):
    dataset = tiny(seed)
    model = build(
        seed,
        small(method, fusion=fusion, ebr_normalize=True) if method == "ebr" else small(fusion=fusion, method=method),
    )
    part, present = dataset.part("train"), random_present(60, seed)
    refresh(model, ranking_parts(dataset), "a")
    source = source_for(model, present)
    outputs = []
    for junk in (0.0, float("nan"), float("inf")):
        features = [torch.where(present[:, i, None], x, junk) for i, x in enumerate(part.features)]
        model.zero_grad(set_to_none=True)
        out = model(features, present, source, 0.5)
        loss = out.logits.square().sum()
        if out.ebr is not None:
            loss = loss + out.ebr.discrimination_loss + out.ebr.reconstruction_loss
        loss.backward()
        outputs.append([out.logits.detach()] + [p.grad for p in model.parameters() if p.grad is not None])
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))
    assert all(bool(torch.isfinite(t).all()) for t in outputs[0])


def by_hand(model: MultimodalModel, features, present, order: list[int]) -> torch.Tensor:
    """Row by row: a missing modality is decoded from the present latent nearest in the ranked list."""
    rows = []
    for b in range(len(present)):
        latents = {i: model.head.encoders[i](model.encoders[i](features[i][b])) for i in range(3) if present[b, i]}
        received = []
        for i in range(3):
            place = {m: n for n, m in enumerate(order)}
            j = i if i in latents else min(latents, key=lambda m: (abs(place[m] - place[i]), place[m]))
            received.append(model.head.decoders[i](latents[j]))
        rows.append(model.fusion.layers(torch.cat(received)))
    return torch.stack(rows)


def test_prediction_with_ranked_substitution_row_by_row(seed):
    dataset = tiny(seed)
    model = build(seed, small("ebr"))
    refresh(model, ranking_parts(dataset), "b")
    order = model.order.tolist()
    assert order[0] == 1
    part, present = dataset.part("test"), random_present(30, seed)
    expected = by_hand(model, part.features, present, order).softmax(-1).detach()
    torch.testing.assert_close(predict(model, part.features, present), expected, rtol=1e-4, atol=1e-6)
    assert (~present).any()


def test_mean_substitution_row_by_row(seed):
    model = build(seed, small("ebr", ebr_substitute="mean"))
    part, present = tiny(seed).part("test"), random_present(30, seed)
    rows = []
    for b in range(30):
        latents = [model.head.encoders[i](model.encoders[i](part.features[i][b])) for i in range(3) if present[b, i]]
        mean, kept = sum(latents) / len(latents), iter(latents)
        received = [model.head.decoders[i](next(kept) if present[b, i] else mean) for i in range(3)]
        rows.append(model.fusion.layers(torch.cat(received)))
    expected = torch.stack(rows).softmax(-1).detach()
    torch.testing.assert_close(predict(model, part.features, present), expected, rtol=1e-4, atol=1e-6)


def test_nothing_is_masked_after_substitution_and_everything_absent_without(seed, monkeypatch):
    dataset = tiny(seed)
    model = build(seed, small("ebr", fusion="transformer"))
    refresh(model, ranking_parts(dataset), "a")
    present = random_present(60, seed)
    seen = []
    monkeypatch.setattr(model.fusion, "forward", lambda x, p=None: (seen.append(p), torch.zeros(len(x[0]), 3))[1])
    features = dataset.part("train").features
    model(features, present, source_for(model, present))
    model(features, present, None)
    model(features, None, None)
    assert bool(seen[0].all())
    assert torch.equal(seen[1], present)
    assert seen[2] is None


def test_subset_of_modalities_is_substituted_within_itself(seed):
    dataset = tiny(seed)
    model = build(seed, small("ebr", ebr_modalities=("c", "a")))
    assert model.columns == [0, 2]
    assert len(model.head.encoders) == 2
    with pytest.raises(RuntimeError, match="never computed"):
        source_for(model, torch.ones(1, 3, dtype=torch.bool))
    refresh(model, ranking_parts(dataset), "b")  # the reference has no head: the list starts elsewhere
    assert describe(model, "b")["reference"] in ("a", "c")
    present = torch.tensor([[False, True, True], [True, False, False], [False, True, False]])
    source = source_for(model, present)
    assert source.tolist() == [[1, 1], [0, 0], [-1, -1]]
    visible = model._visible(present, source)
    assert visible.tolist() == [[True, True, True], [True, False, True], [False, True, False]]


def test_without_absence_the_task_path_does_not_depend_on_the_rule(seed):
    dataset = tiny(seed)
    part = dataset.part("test")
    probabilities = []
    for substitute in ("ranked", "mean"):
        model = build(seed, small("ebr", ebr_substitute=substitute))
        refresh(model, ranking_parts(dataset), "a")
        probabilities.append(predict(model, part.features, part.present))
        full = model(part.features, part.present, source_for(model, part.present)).logits.softmax(-1).detach()
        torch.testing.assert_close(full, probabilities[-1], rtol=1e-5, atol=1e-7)
    assert torch.equal(*probabilities)


def test_ranking_is_refreshed_from_train_and_validation_by_hand(seed):
    dataset = tiny(seed, absent=0.3)
    model = build(seed, small("ebr"))
    refresh(model, ranking_parts(dataset), "c")
    rows = torch.cat([dataset.part(p).index for p in ("train", "validation")])
    features = [x[rows] for x in dataset.features.values()]
    g = [h(e(x)).double() for h, e, x in zip(model.head.encoders, model.encoders, features, strict=True)]
    for i in range(3):
        for j in range(3):
            both = dataset.present[rows][:, i] & dataset.present[rows][:, j]
            cosine = torch.cosine_similarity(g[i][both], g[j][both]).mean()
            assert float(model.similarity[i, j]) == pytest.approx(float(cosine.detach()), abs=1e-6)
    similarity = model.similarity[2]
    rest = sorted((0, 1), key=lambda j: -float(similarity[j]))
    assert model.order.tolist() == [2, *rest]
    moved = model.similarity.clone()
    with torch.no_grad():
        model.head.encoders[0][0].weight.mul_(-1)
    refresh(model, ranking_parts(dataset), "c")
    assert not torch.equal(moved, model.similarity)


def test_the_ranking_of_streamed_data_is_that_of_data_in_memory(seed, monkeypatch):
    monkeypatch.setattr(parts, "STREAM_ROWS", 7)
    dataset, model = tiny(seed, absent=0.3), build(seed, small("ebr"))
    found = []
    for streamed in (False, True):
        refresh(model, ranking_parts(replace(dataset, streamed=streamed)), None)
        found.append((model.similarity.clone(), model.order.tolist()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-7)
    assert found[0][1] == found[1][1]
    assert found[0][1][0] == int(found[0][0].sum(1).argmax()), "without a reference the most similar one comes first"


def test_each_fill_in_training_is_a_latent_drawn_from_those_that_are_there(seed):
    model = build(seed, small("ebr", ebr_substitute="each"))
    present = torch.tensor(
        [[True, False, True]] * 2000 + [[False, True, False], [False, False, False], [True, True, True]]
    )
    source = source_for(model, present, torch.Generator().manual_seed(seed))
    assert source[:2000, [0, 2]].unique(dim=0).tolist() == [[0, 2]]
    assert set(source[:2000, 1].tolist()) == {0, 2}
    assert abs(float((source[:2000, 1] == 0).double().mean()) - 0.5) < 0.06
    assert source[2000:].tolist() == [[1, 1, 1], [-1, -1, -1], [0, 1, 2]]
    assert source_for(model, present).is_floating_point(), "at inference their mean"


def test_ranking_travels_with_the_weights(seed):
    dataset, config = tiny(seed), small("ebr")
    model = build(seed, config)
    with pytest.raises(RuntimeError, match="never computed"):
        source_for(model, torch.tensor([[True, False, True]]))
    refresh(model, ranking_parts(dataset), "b")
    other = build(seed + 1, config)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.order, model.order)
    assert torch.equal(other.similarity, model.similarity)
    assert evaluate(other, dataset) == evaluate(model, dataset)


def test_encoder_options(seed):
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(build_encoder(5, small("vanilla", encoder="identity"))(x), x)
    encoder = build_encoder(5, small("vanilla", encoder_width=9, encoder_dim=2))
    w1, b1, w2, b2 = (p.detach() for p in encoder.parameters())
    assert w1.shape == (9, 5)
    torch.testing.assert_close(encoder(x).detach(), (x @ w1.T + b1).clamp(min=0) @ w2.T + b2)


def test_groups_hold_every_parameter_once(seed):
    for method in ("vanilla", "ebr"):
        model = build(seed, small(method))
        grouped = [id(p) for group in model.groups().values() for p in group]
        assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_heads_are_required_where_they_are_used(seed):
    model = build(seed, small("vanilla"))
    with pytest.raises(RuntimeError, match="no EBR heads"):
        model.latents([torch.zeros(1, d) for d in (5, 3, 4)])


@pytest.mark.parametrize("wanted", [[], ["a", "a"], ["a", "x"]])
def test_a_selection_of_heads_that_means_nothing_is_refused(wanted):
    with pytest.raises(InputError, match=r"each once|Unknown ebr modality"):
        select_modalities(["a", "b"], wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_encoders_drop_units_in_training_alone(dropout, seed):
    torch.manual_seed(seed)
    encoder, x = build_encoder(5, small("vanilla", encoder_width=64, encoder_dropout=dropout)), torch.randn(8, 5)
    assert torch.equal(encoder.train()(x), encoder(x)) == (dropout == 0)
    assert torch.equal(encoder.eval()(x), encoder(x))
