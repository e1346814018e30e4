"""The figures that watch the adversarial training, against data where the answer is known and gradients written out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from training_data import small, tiny

from mmc_fast._util.seeds import generator
from mmc_fast.experiments.training import adversarial, parts
from mmc_fast.experiments.training.adversarial import parameter_distance, post_hoc_probe, probe
from mmc_fast.experiments.training.interrupt import Stage
from mmc_fast.experiments.training.masks import epoch_order, presence_entropy, training_masks
from mmc_fast.experiments.training.model import MultimodalModel
from mmc_fast.experiments.training.steps import Stepper
from mmc_fast.experiments.training.substitution import ranking_parts, refresh
from mmc_fast.experiments.training.trainer import Trainer


def model_of(seed: int, dataset, **changes) -> MultimodalModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MultimodalModel(dataset.dims, dataset.num_classes, small("ebr", **changes))


def with_latents(model, monkeypatch, shift: float, seed: int) -> None:
    """Replace the latents by noise whose mean tells the modality apart by ``shift`` standard deviations."""
    g = torch.Generator().manual_seed(seed)

    def latents(features, present=None):
        noise = torch.randn(3, len(features[0]), 4, generator=g)
        noise[:, :, 0] += shift * torch.arange(3)[:, None]
        return noise * 1e-4  # shrunken latents must not fool the probe

    monkeypatch.setattr(model, "latents", latents)


def test_post_hoc_probe_finds_what_is_there(seed, monkeypatch):
    dataset = tiny(seed, sizes=(400, 400, 30))
    model = model_of(seed, dataset)
    with_latents(model, monkeypatch, 8.0, seed)
    told = post_hoc_probe(model, dataset.part("train"), dataset.part("validation"), seed)
    assert told["balanced_accuracy"] > 0.95
    assert told["chance"] == pytest.approx(1 / 3)
    assert told["rows"] == 1200


def test_post_hoc_probe_is_at_chance_on_invariant_latents(seed, monkeypatch):
    dataset = tiny(seed, sizes=(400, 1500, 30))
    model = model_of(seed, dataset)
    with_latents(model, monkeypatch, 0.0, seed)
    told = post_hoc_probe(model, dataset.part("train"), dataset.part("validation"), seed)
    assert abs(told["balanced_accuracy"] - 1 / 3) < 0.05


def test_post_hoc_probe_sees_present_rows_of_train_and_validation_only(seed):
    dataset = tiny(seed, absent=0.4)
    model = model_of(seed, dataset)
    train, held_out = dataset.part("train"), dataset.part("validation")
    told = post_hoc_probe(model, train, held_out, seed)
    assert told["rows"] == int(held_out.present.sum())
    for part in (train, held_out):
        for i, x in enumerate(part.features):
            x[~part.present[:, i]] = float("nan")
    assert post_hoc_probe(model, train, held_out, seed) == told


def test_latents_are_probed_with_their_modality_and_sample(seed, monkeypatch):
    """Those of a streamed part in pieces: the same ones, in another order."""
    monkeypatch.setattr(parts, "STREAM_ROWS", 7)
    dataset = tiny(seed, absent=0.4)
    model, part = model_of(seed, dataset), dataset.part("train")
    whole = {}
    for i in range(3):
        for n in part.present[:, i].nonzero().flatten().tolist():
            whole[i, n] = model.head.encoders[i](model.encoders[i](part.features[i][n])).detach()
    for some in (part, replace(dataset, streamed=True).part("train")):
        latents, modality, sample = adversarial._latent_rows(model, some)
        names = list(zip(modality.tolist(), sample.tolist(), strict=True))
        assert sorted(names) == sorted(whole)
        torch.testing.assert_close(latents, torch.stack([whole[name] for name in names]), rtol=1e-4, atol=1e-6)


def test_the_probe_of_many_rows_sees_4096_drawn_ones(seed, monkeypatch):
    dataset = tiny(seed, sizes=(4200, 30, 30))
    model, seen = model_of(seed, dataset), []
    monkeypatch.setattr(adversarial, "fit_modality_probe", lambda *given, **options: seen.append((given, options)))
    post_hoc_probe(model, dataset.part("train"), dataset.part("validation"), seed)
    ((x, modality, sample, held_x, held_y, psi, heads, given_seed), options) = seen[0]
    rows = torch.randperm(4200, generator=generator(seed, "fresh", "order"))[:4096]
    expected = model.latents(*[[f[rows] for f in dataset.part("train").features], None])
    torch.testing.assert_close(x, expected.flatten(0, 1))
    assert torch.equal(modality, torch.arange(3).repeat_interleave(4096))
    assert torch.equal(sample, torch.arange(4096).repeat(3))
    assert (len(held_x), held_y.bincount().tolist()) == (90, [30, 30, 30])
    assert (list(psi), heads, given_seed, options["epochs"]) == ([6], 3, seed, 200)
    assert torch.equal(torch.rand(3, generator=options["random"]), torch.rand(3, generator=drawn_on(seed)))


def drawn_on(seed: int) -> torch.Generator:
    """The probe's generator after its rows were drawn."""
    random = generator(seed, "fresh", "order")
    torch.randperm(4200, generator=random)
    return random


def test_post_hoc_probe_needs_two_heads(seed):
    dataset = tiny(seed, dims=(5,))
    assert post_hoc_probe(model_of(seed, dataset), dataset.part("train"), dataset.part("validation"), 0) is None


def test_probe_equals_gradients_written_out(seed):
    dataset = tiny(seed, absent=0.3)
    model, part = model_of(seed, dataset), dataset.part("train")
    got = probe(model, part, reversal=0.3)
    losses, hits, total = [], 0, 0
    for i in range(3):
        here = part.present[:, i]
        logits = model.head.discriminator(model.head.encoders[i](model.encoders[i](part.features[i][here])))
        losses.append(F.cross_entropy(logits, torch.full((len(logits),), i), reduction="sum"))
        hits, total = hits + int((logits.argmax(1) == i).sum()), total + len(logits)
    groups = model.groups()
    loss = sum(losses) / total

    def norm(params):
        found = torch.autograd.grad(loss, params, retain_graph=True)
        return math.sqrt(sum(float(g.double().square().sum()) for g in found))

    assert got["grad_norm_psi"] == pytest.approx(norm(groups["discriminator"]), rel=1e-4)
    assert got["grad_norm_encoders"] == pytest.approx(0.3 * norm(groups["encoders"]), rel=1e-4)
    assert got["psi_accuracy"] == pytest.approx(hits / total)
    assert probe(model, part, reversal=0.0)["grad_norm_encoders"] == 0.0
    assert all(p.grad is None for p in model.parameters())
    nothing = probe(model, replace(part, present=torch.zeros_like(part.present)), reversal=0.3)
    assert nothing == {"grad_norm_psi": 0.0, "grad_norm_encoders": 0.0, "psi_accuracy": None}


def test_epochs_are_probed_on_512_drawn_train_rows(seed):
    dataset = tiny(seed, sizes=(600, 30, 30))
    trainer = Trainer(model_of(seed, dataset), dataset, small("ebr"), seed=seed)
    rows = torch.randperm(600, generator=generator(seed, "probe"))[:512]
    assert torch.equal(trainer.probe_part.features[0], dataset.features["a"][rows])


@pytest.mark.parametrize("dims", [(5, 3, 4), (5, 3), (5,)])
def test_logged_loss_is_relative_to_the_entropy_of_what_was_present(dims, seed):
    dataset = tiny(seed, dims=dims, absent=0.4)
    trainer = Trainer(model_of(seed, dataset), dataset, small("ebr", epochs=1, lr=1e-12), seed=seed, reference="a")
    trainer.fit()
    record = trainer.history[0]
    counts = dataset.part("train").present.sum(0).tolist()
    entropy = -sum(c / sum(counts) * math.log(c / sum(counts)) for c in counts)
    if len(dims) == 1:
        assert record["loss_md_over_entropy"] is None
    else:
        assert record["loss_md_over_entropy"] == pytest.approx(record["loss_md"] / entropy, rel=1e-9)


def test_entropy_of_presence():
    assert presence_entropy(torch.ones(5, 4, dtype=torch.bool)) == pytest.approx(math.log(4))
    one = torch.zeros(5, 4, dtype=torch.bool)
    one[:, 2] = True
    assert presence_entropy(one) == 0.0
    one[0, 0] = True  # a modality that one row has
    assert presence_entropy(one) == pytest.approx(-(5 * math.log(5 / 6) + math.log(1 / 6)) / 6)


def test_parameter_distance():
    a = {"x": torch.tensor([3.0, 4.0]), "y": torch.tensor([1.0]), "psi": torch.tensor([9.0])}
    b = {"x": torch.tensor([0.0, 4.0]), "y": torch.tensor([5.0]), "psi": torch.tensor([0.0])}
    assert parameter_distance(a, b, ["x", "y"]) == pytest.approx(5 / math.sqrt(41))
    assert parameter_distance(a, a, ["x", "y"]) == 0.0
    assert parameter_distance(a, {"x": torch.zeros(2)}, ["x"]) == pytest.approx(5), "nothing to relate it to"


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.95])
def test_training_masks_never_empty_a_row_nor_invent_presence(rate, seed):
    present = torch.rand(2000, 3, generator=torch.Generator().manual_seed(seed)) < 0.5
    present[~present.any(1), 0] = True
    masks = training_masks(present, rate, torch.Generator().manual_seed(seed))
    assert bool(masks.any(1).all())
    assert not (masks & ~present).any()
    single = present.sum(1) == 1
    assert torch.equal(masks[single], present[single])
    several = present.sum(1) > 1
    assert (masks != present)[several].any()


def test_modality_dropout_rate_is_the_one_asked_for(seed):
    masks = training_masks(torch.ones(20000, 4, dtype=torch.bool), 0.3, torch.Generator().manual_seed(seed))
    kept = 1 - 0.3 * (1 - 0.3**3) / (1 - 0.3**4)  # given that a row keeps at least one
    assert abs(float(masks.double().mean()) - kept) < 0.01
    assert training_masks(masks, 0.0, torch.Generator()) is masks


@pytest.mark.parametrize(("method", "rate"), [("vanilla", 0.0), ("vanilla", 0.4), ("ebr", 0.4)])
def test_model_is_trained_under_the_drawn_masks(method, rate, seed, monkeypatch):
    """Order and masks drawn again outside of the loop are what the steps get, row by row, epoch by epoch."""
    dataset = tiny(seed, absent=0.3)
    seen = []
    original = Stepper.losses

    def losses(self, phase, rows, counts):
        seen.append(rows)
        return original(self, phase, rows, counts)

    monkeypatch.setattr(Stepper, "losses", losses)
    heads = {"ebr_substitute": "mean", "substitute_in_training": True} if method == "ebr" else {}
    config = small(method, epochs=2, modality_dropout=rate, **heads)
    Trainer(MultimodalModel(dataset.dims, 3, config), dataset, config, seed=seed).fit()
    part = dataset.part("train")
    order_of, masks_of = generator(seed, "order"), generator(seed, "masks")
    for epoch in range(2):
        steps = seen[epoch * 4 : epoch * 4 + 4]
        order, masks = epoch_order(60, order_of), training_masks(part.present, rate, masks_of)
        assert torch.equal(torch.cat([s.present for s in steps]), masks[order])
        assert torch.equal(torch.cat([s.natural for s in steps]), part.present[order])
        assert torch.equal(torch.cat([s.labels for s in steps]), part.labels[order])
        assert torch.equal(torch.cat([s.features[1] for s in steps]), part.features[1][order])
        assert torch.equal(masks, part.present) == (rate == 0)
        for n, row in enumerate(torch.cat([s.source for s in steps]) if heads else ()):
            here = masks[order[n]]
            for i in range(3):  # its own latent, or the mean of those that are there
                wanted = torch.eye(3)[i] if here[i] else here / here.sum()
                torch.testing.assert_close(row[i], wanted)
        assert bool(heads) or all(s.source is None for s in steps)
    assert len(seen) == 8


@pytest.mark.parametrize("watched", ["score", "loss"])
def test_the_adversarial_stop_watches_the_score_or_the_training_loss_of_the_task(watched, seed):
    dataset = tiny(seed)
    config = small("ebr", epochs=4, adversarial_stop=watched, ebr_schedule="interleave", ebr_interleave_epochs=1)
    trainer = Trainer(model_of(seed, dataset), dataset, config, seed=seed, reference="a")
    seen = []
    trainer.stop.watch = lambda epoch, value: seen.append((epoch, value))
    trainer.fit()
    key = {"score": "val_score", "loss": "loss_sem"}[watched]
    assert seen == [(r["epoch"], r[key]) for r in trainer.history if r["phase"] == "semantic"]
    assert [epoch for epoch, _ in seen] == [1, 3]
    assert trainer.stop.larger_is_better == (watched == "score")


def test_validation_under_masks_uses_the_ranking_of_the_weights_it_scores(seed):
    dataset, config = tiny(seed), small("ebr", selection="masked", lr=0.05)
    model = model_of(seed, dataset)
    found = []

    def compare(record):
        stored = model.similarity.clone()
        refresh(model, ranking_parts(dataset), "a")
        found.append((stored, model.similarity.clone()))

    Trainer(model, dataset, config, seed=seed, reference="a", stage=Stage(on_epoch=compare)).fit()
    assert len(found) == 3
    assert all(torch.equal(stored, fresh) for stored, fresh in found)
    assert not torch.equal(found[0][0], found[-1][0])


def test_epoch_order_is_a_permutation_and_moves_on(seed):
    g = torch.Generator().manual_seed(seed)
    first, second = epoch_order(50, g), epoch_order(50, g)
    assert sorted(first.tolist()) == list(range(50))
    assert not torch.equal(first, second)
