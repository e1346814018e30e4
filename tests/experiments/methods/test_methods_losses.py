"""Losses and answers of the re-implemented methods by their formulas, sample by sample, in float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from test_methods import BUDGET
from test_methods_properties import build, rows
from training_data import tiny

from mmc_fast._util.seeds import derive_seed, generator
from mmc_fast.experiments.methods import Task, get
from mmc_fast.experiments.methods.base import unimodal_models
from mmc_fast.experiments.methods.baseline import Batch
from mmc_fast.experiments.methods.cm_ae import CrossModalAutoencoder
from mmc_fast.experiments.methods.graph import BipartiteGraph, Grape, Muse, SageLayer, supervised_contrastive
from mmc_fast.experiments.methods.m3care import M3Care
from mmc_fast.experiments.methods.mt import SubsetTransformer, subsets
from mmc_fast.experiments.methods.shaspec import ShaSpec, shared_distance
from mmc_fast.experiments.methods.sklearn_baselines import masked_copies
from mmc_fast.experiments.methods.smil import Smil
from mmc_fast.experiments.training.evaluate import masks_at
from mmc_fast.experiments.training.expert_weights import masked_rows
from mmc_fast.experiments.training.experts import ExpertProduct
from mmc_fast.experiments.training.masks import training_masks


def prepared(kind, seed: int, **options):
    """A model in float64, a batch of 12 rows of which some lack a modality by nature, and its encoded features."""
    model, batch = build(kind, seed, **options).double(), rows(seed)
    natural = batch.natural.clone()
    natural[1:4, 1] = False
    natural[:, 0] |= ~natural.any(1)
    present = batch.present & natural
    present[:, 0] |= ~present.any(1)
    batch = Batch([x.double() for x in batch.features], natural | present, present, batch.labels, batch.random)
    return model, batch, model.filled(batch.features, batch.present)[0]


def test_a_round_of_messages_node_by_node(seed):
    g = torch.Generator().manual_seed(seed)
    layer = SageLayer(3, 2, 4).double()
    samples, modalities, edges = (torch.randn(*shape, generator=g).double() for shape in ((5, 3), (2, 3), (5, 2, 2)))
    here = torch.tensor([[True, True], [True, False], [False, False], [False, False], [True, False]])
    found = layer(samples, modalities, edges, here)

    def mean(messages):
        return torch.stack(messages).mean(0) if messages else torch.zeros(4).double()

    new = []
    for n in range(5):
        inbox = [torch.relu(layer.to_sample(torch.cat([modalities[i], edges[n, i]]))) for i in range(2) if here[n, i]]
        new.append(torch.relu(layer.sample(torch.cat([samples[n], mean(inbox)]))))
    torch.testing.assert_close(found[0], torch.stack(new))
    for i in range(2):
        inbox = [torch.relu(layer.to_modality(torch.cat([samples[n], edges[n, i]]))) for n in range(5) if here[n, i]]
        other = torch.relu(layer.modality(torch.cat([modalities[i], mean(inbox)])))
        torch.testing.assert_close(found[1][i], other)
        for n in range(5):
            edge = torch.relu(layer.edge(torch.cat([edges[n, i], new[n], other])))
            torch.testing.assert_close(found[2][n, i], edge if here[n, i] else torch.zeros(4).double())


def test_the_graph_goes_through_its_rounds_one_after_another(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        graph = BipartiteGraph([2, 3], 4, 3)
    assert graph.start_sample.tolist() == [1.0] * 4
    g = torch.Generator().manual_seed(seed)
    encoded, here = [torch.randn(6, w, generator=g) for w in (2, 3)], torch.rand(6, 2, generator=g) < 0.7
    edges = torch.stack([enter(z) for enter, z in zip(graph.enter, encoded, strict=True)], 1)
    samples, modalities = graph.start_sample.expand(6, -1), graph.start_modality
    for layer in graph.rounds:
        samples, modalities, edges = layer(samples, modalities, edges, here)
    torch.testing.assert_close(graph(encoded, here), samples)
    grape, batch, encoded = prepared(Grape, seed)
    first, _, second = grape.classifier
    wanted = second(torch.relu(first(grape.graph(encoded, batch.present))))
    torch.testing.assert_close(grape(batch.features, batch.present), wanted)
    assert (len(graph.rounds), len(build(Grape, seed).graph.rounds), len(build(Muse, seed).graph.rounds)) == (3, 3, 2)


def test_muse_contrasts_the_batch_with_a_view_that_has_fewer_edges(seed):
    model, batch, encoded = prepared(Muse, seed, agreement=0.7, classes=0.3, edge_dropout=0.6)
    dropped = training_masks(batch.present, 0.6, torch.Generator().manual_seed(seed))
    assert not torch.equal(dropped, batch.present)
    first, second = (model.graph(encoded, here) for here in (batch.present, dropped))
    a, b = F.normalize(first, dim=1), F.normalize(second, dim=1)
    logits, own = a @ b.t() / 0.07, torch.arange(12)
    agreement = (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2
    classes = supervised_contrastive(torch.cat([a, b]), batch.labels.repeat(2), 0.07)
    task = F.cross_entropy(model.classifier(first), batch.labels)
    torch.testing.assert_close(model.loss(batch), task + 0.7 * agreement + 0.3 * classes)
    assert (build(Muse, seed).agreement, build(Muse, seed).classes, build(Muse, seed).edge_dropout) == (0.5, 0.5, 0.3)
    alone = supervised_contrastive(a[:3], torch.tensor([0, 1, 2]), 0.07)  # nobody has an other of its class
    assert float(alone.detach()) == 0.0


def test_m3care_sample_by_sample(seed):
    model, batch, encoded = prepared(M3Care, seed)
    here, n = batch.present, 12
    u = [project(z) for project, z in zip(model.compare, encoded, strict=True)]
    near = torch.zeros(n, n).double()
    for a in range(n):
        for c in range(n):
            shared = [i for i in range(3) if here[a, i] and here[c, i]]
            if shared:
                near[a, c] = sum(torch.exp(-(u[i][a] - u[i][c]).square().mean()) for i in shared) / len(shared)
    torch.testing.assert_close(model.nearness(encoded, here), near)
    model.threshold = float(near[near > 0].median().detach())
    near = torch.where(near >= model.threshold, near, 0.0).fill_diagonal_(0)
    mixed, seen = [], here.clone()
    for i, z in enumerate(encoded):
        weights = near * here[:, i]
        total = weights.sum(1)
        weights = weights / total.clamp(min=1e-300)[:, None]
        known = z * here[:, i, None]
        hidden = torch.relu(model.first[i](known + weights @ known)) * here[:, i, None]
        others = model.second[i](weights @ hidden)
        for a in range(n):
            if total[a] > 0 and here[a, i]:
                share = torch.sigmoid(model.gate[i](torch.cat([z[a], others[a]])))
                others = others.index_put((torch.tensor(a),), share * z[a] + (1 - share) * others[a])
            elif here[a, i]:
                others = others.index_put((torch.tensor(a),), z[a])
            seen[a, i] |= total[a] > 0
        mixed.append(others)
    assert bool((seen != here).any())
    assert build(M3Care, seed).threshold == 0.5
    torch.testing.assert_close(model.fuse(encoded, here), model.transformer(mixed, seen))


def test_shaspec_adds_its_alignment_and_the_name_of_the_modality(seed):
    model, batch, encoded = prepared(ShaSpec, seed, alignment=0.4, domain=0.3)
    shared, specific = model.parts(encoded)
    rows_ = []
    for n, here in enumerate(batch.present):
        entered = [enter(z[n]) for enter, z in zip(model.enter, encoded, strict=True)]
        s = [model.share[1](torch.relu(e)) for e in entered]
        p = [layer[1](torch.relu(e)) for layer, e in zip(model.specific, entered, strict=True)]
        mean = torch.stack([x for x, there in zip(s, here, strict=True) if there]).mean(0)
        rows_.append(torch.cat([model.project(torch.cat([s[i], p[i]])) + s[i] if here[i] else mean for i in range(3)]))
    torch.testing.assert_close(model(batch.features, batch.present), model.layers.layers(torch.stack(rows_)))
    names = []
    for i in range(3):
        logits = model.name_modality(specific[i][batch.present[:, i]])
        names.append(-logits.log_softmax(1)[:, i])
    task = F.cross_entropy(model(batch.features, batch.present), batch.labels)
    wanted = task + 0.4 * shared_distance(shared, batch.present) + 0.3 * torch.cat(names).mean()
    torch.testing.assert_close(model.loss(batch), wanted)
    assert (build(ShaSpec, seed).alignment, build(ShaSpec, seed).domain) == (0.1, 0.02)
    assert float(shared_distance(shared.detach(), torch.eye(3, dtype=torch.bool).repeat(4, 1))) == 0.0, "no pair"


def test_the_autoencoder_rebuilds_every_modality_that_is_in_the_data(seed):
    model, batch, encoded = prepared(CrossModalAutoencoder, seed, rebuild=0.6)
    code = model.to_code(torch.cat([z * batch.present[:, i, None] for i, z in enumerate(encoded)], 1))
    errors = [
        (decoder(code[n]) - batch.features[i][n]).square().mean()
        for i, decoder in enumerate(model.decoders)
        for n in range(12)
        if batch.natural[n, i]
    ]
    task = F.cross_entropy(model.classifier(code), batch.labels)
    torch.testing.assert_close(model.loss(batch), task + 0.6 * torch.stack(errors).mean())
    assert build(CrossModalAutoencoder, seed).rebuild == 1.0


def test_smil_steps_on_rows_with_gaps_and_matches_what_was_hidden(seed):
    model, batch, _ = prepared(Smil, seed, inner_lr=0.1, match=0.8, noise=0.3, clusters=4)
    model.centres.normal_(generator=torch.Generator().manual_seed(seed))
    epsilon = 0.3 * torch.randn(12, sum(model.widths), generator=torch.Generator().manual_seed(seed))

    def answers(present, noise, features):
        """Logits with ẑ in the gaps, f + ε softplus(net(f)) in training; and ẑ of every modality."""
        encoded = model.filled(features, present)[0]
        seen = torch.cat([*(z * present[:, i, None] for i, z in enumerate(encoded)), present.double()], 1)
        guesses = []
        for weigh, centres in zip(model.weigh, model.centres.split(model.widths, 1), strict=True):
            w = F.softplus(weigh(seen))
            guesses.append((w[:, :, None] * centres).sum(1) / w.sum(1, keepdim=True))
        f = torch.cat([torch.where(present[:, i, None], z, guesses[i]) for i, z in enumerate(encoded)], 1)
        f = f + noise * F.softplus(model.regularise(f))
        return model.layers.layers(f), guesses, encoded

    gaps = ~batch.present.all(1)
    assert bool(gaps.any() & ~gaps.all())
    some = [x[gaps] for x in batch.features]
    inner = F.cross_entropy(answers(batch.present[gaps], epsilon[gaps], some)[0], batch.labels[gaps])
    fast = {n: p for n, p in model.named_parameters() if n.startswith(("encoders.", "layers."))}
    slopes = torch.autograd.grad(inner, list(fast.values()))
    found = model.loss(batch)
    with torch.no_grad():
        for p, slope in zip(fast.values(), slopes, strict=True):
            p -= 0.1 * slope
    masked, guesses, _ = answers(batch.present, epsilon, batch.features)
    whole, _, clean = answers(batch.natural, epsilon, batch.features)
    errors = [
        (guesses[i][n] - clean[i][n]).square().mean()
        for i in range(3)
        for n in range(12)
        if batch.natural[n, i] and not batch.present[n, i]
    ]
    wanted = F.cross_entropy(masked, batch.labels) + F.cross_entropy(whole, batch.labels)
    torch.testing.assert_close(found, wanted + 0.8 * torch.stack(errors).mean())
    torch.testing.assert_close(model(batch.features, batch.present), answers(batch.present, 0.0, batch.features)[0])
    defaults = build(Smil, seed)
    assert (defaults.clusters, defaults.inner_lr, defaults.match, defaults.noise) == (10, 1e-3, 0.01, 0.1)
    everything = replace(batch, present=torch.ones(12, 3, dtype=torch.bool))
    own = dict(model.named_parameters())
    assert all(p is own[name] for name, p in model.inner_step(everything).items()), "no gap, no step"


def test_the_priors_of_smil_are_cluster_centres_of_complete_rows_or_of_all_that_have_the_modality(seed):
    train = tiny(seed, absent=0.3).part("train")
    model = build(Smil, seed, clusters=4)
    for part in (train, train.select(torch.arange(60)[~train.present.all(1)][:9])):
        model.begin_epoch(part)
        for i, centres in enumerate(model.centres.split(model.widths, 1)):
            complete = part.present.all(1)
            here = complete if int(complete.sum()) >= 4 else part.present[:, i]
            z = model.encoders[i](part.features[i][here]).detach().double().numpy()
            k = min(4, len(z))
            wanted = KMeans(k, n_init=1, random_state=0).fit(z).cluster_centers_[np.arange(4) % k]
            np.testing.assert_allclose(centres.numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_the_best_unimodal_model_of_a_row_answers_for_it(seed):
    dataset = tiny(seed, absent=0.3)
    fitted, part = get("unimodal").fit(dataset, None, seed, budget=BUDGET), dataset.part("test")
    models = fitted.record["unimodal"]
    order = sorted(models, key=lambda name: -models[name])
    assert fitted.record["strongest"] == order[0]
    assert fitted.record["val_score"] == max(models.values())
    changed = [x.clone() for x in part.features]
    for row in range(len(part)):
        first = next(n for n in order if part.present[row, dataset.modalities.index(n)])
        for i, name in enumerate(dataset.modalities):
            if name != first:
                changed[i][row] = 1e6
    torch.testing.assert_close(
        fitted.predict(changed, part.present), fitted.predict(part.features, part.present), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", ["logistic", "boosting", "boosting-masked"])
def test_the_baselines_of_scikit_learn_read_one_table(name, seed):
    dataset = tiny(seed, absent=0.3)
    options = {"C": 0.3} if name == "logistic" else {"learning_rate": 0.2, "max_leaf_nodes": 5, "min_samples_leaf": 3}
    fitted, part = get(name).fit(dataset, {"options": options}, seed, budget=BUDGET), dataset.part("test")
    if name == "logistic":
        plain = LogisticRegression(C=0.3, max_iter=1000)
    else:
        plain = HistGradientBoostingClassifier(random_state=derive_seed(seed, "boosting") % 2**32, **options)

    def table(some) -> np.ndarray:
        fill = 0.0 if name == "logistic" else np.nan
        blocks = [np.where(some.present[:, i, None], x, fill) for i, x in enumerate(some.features)]
        return np.concatenate(blocks, 1)

    train = masked_copies(dataset.part("train"), 4 if name.endswith("masked") else 0, generator(seed, "masks"))
    plain.fit(table(train), train.labels)
    np.testing.assert_allclose(fitted.predict(part.features, part.present), plain.predict_proba(table(part)), rtol=1e-5)
    held = dataset.part("validation")
    assert fitted.record["val_score"] == pytest.approx((plain.predict(table(held)) == held.labels.numpy()).mean())


def test_the_weights_of_a_product_are_fitted_on_masked_validation_rows(seed):
    """Every row as it is, and at every rate, four times; answers from the weights in the record and unimodal models."""
    dataset = tiny(seed, absent=0.3)
    held = dataset.part("validation")
    held.present[2] = False
    found = masked_rows(held, (0.3, 0.6), seed)
    assert len(found) == 4 * 3 * 29
    assert torch.equal(found.index, held.index[torch.arange(30) != 2].repeat(12))
    assert torch.equal(found.present[: 4 * 29], held.present[torch.arange(30) != 2].repeat(4, 1))
    assert torch.equal(found.labels, held.labels[torch.arange(30) != 2].repeat(12))
    assert torch.equal(found.features[1], held.features[1][torch.arange(30) != 2].repeat(12, 1))
    blocks = found.present.split(29)
    assert not bool((torch.stack(blocks) & ~blocks[0]).any())
    assert len({tuple(b.flatten().tolist()) for b in blocks[4:]}) == 8, "masks of their own"
    for rate, drawn in ((0.3, blocks[4]), (0.6, blocks[8])):  # a stream of their own: no mask of a score
        others = [masks_at(held.present, rate, seed, name)[0] for name in ("train", "validation", "test")]
        assert not any(torch.equal(drawn, other[torch.arange(30) != 2]) for other in others)
    lost = [float((blocks[0] & ~b).sum() / blocks[0].sum()) for b in blocks]
    assert np.mean(lost[4:8]) < np.mean(lost[8:])


def test_an_expert_that_is_sure_leaves_the_product_finite(seed, monkeypatch):
    sure = SimpleNamespace(scores={}, predict=lambda name, x: F.one_hot(torch.zeros(len(x)).long(), 3).float())
    monkeypatch.setattr("mmc_fast.experiments.methods.product.unimodal_models", lambda task: sure)
    dataset = tiny(seed)
    part = dataset.part("test")
    found = get("product").fit(dataset, None, seed, budget=BUDGET).predict(part.features, part.present)
    torch.testing.assert_close(found.sum(1), torch.ones(len(part)))


def test_a_product_answers_with_weights_of_the_declared_penalty(seed):
    dataset = tiny(seed, absent=0.3)
    settings = {"lr": 0.01, "options": {"penalty": 0.05}}
    fitted = get("product").fit(dataset, settings, seed, budget=BUDGET)
    models = unimodal_models(Task(dataset, get("product").resolve(settings, BUDGET)[0], {}, seed))
    assert fitted.record["unimodal"] == models.scores

    def votes(part):
        found = [models.predict(name, x) for name, x in zip(dataset.modalities, part.features, strict=True)]
        return torch.stack(found).double().log()

    rows_ = masked_rows(dataset.part("validation"), BUDGET.rates, seed)
    product = ExpertProduct(3, torch.bincount(dataset.part("train").labels) / 60, False)
    product.fit(votes(rows_), None, rows_.present, rows_.labels, 0.05)
    for name in ("weight", "size"):
        assert fitted.record[name] == pytest.approx(getattr(product, name).detach().exp().tolist(), rel=1e-4)
    part = dataset.part("test")
    wanted = product(votes(part), None, part.present).exp().float().detach()
    torch.testing.assert_close(fitted.predict(part.features, part.present), wanted, rtol=1e-4, atol=1e-6)
    held = dataset.part("validation")
    hits = product(votes(held), None, held.present).argmax(1) == held.labels
    assert fitted.record["val_score"] == pytest.approx(float(hits.double().mean()))


KINDS = (CrossModalAutoencoder, Grape, M3Care, Muse, ShaSpec, Smil, SubsetTransformer)


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_adds_the_loss_of_the_heads_as_it_is(kind, seed):
    found = []
    for more in (0.0, 5.0):
        model, batch, _ = prepared(kind, seed)
        filled = model.filled

        def with_more(features, present, filled=filled, more=more):
            encoded, here, extra = filled(features, present)
            return encoded, here, extra + more

        model.filled = with_more
        found.append(float(model.loss(batch).detach()))
    assert found[1] - found[0] == pytest.approx(5.0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_takes_features_of_any_width(kind, seed):
    """Without an encoder the widths are those of the data."""
    batch = rows(seed)
    model = kind({"a": 5, "b": 3, "c": 4}, 3, replace(BUDGET, encoder="identity", encoder_dim=7))
    assert model(batch.features, batch.present).shape == (12, 3)


def test_all_subsets_up_to_five_modalities_and_drawn_ones_beyond():
    g = torch.Generator().manual_seed(0)
    assert [len(subsets(m, g)) for m in (1, 2, 3, 4, 5, 6)] == [1, 3, 7, 15, 31, 8]
    assert len(subsets(5, g).unique(dim=0)) == 31
