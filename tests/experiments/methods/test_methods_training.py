"""The loop of the re-implemented methods against one written out; EBR under them; and which settings win."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_methods import BUDGET, HEADS
from training_data import losses_by_hand, tiny

from mmc_fast._util.seeds import generator, seeded_init
from mmc_fast.experiments.data import mcar
from mmc_fast.experiments.methods import Task, baseline, get
from mmc_fast.experiments.methods.imputation import ImputedConcat
from mmc_fast.experiments.methods.shaspec import ShaSpec
from mmc_fast.experiments.training.evaluate import masks_at


def zeros_by_hand(model, features, present) -> torch.Tensor:
    """What the method "zeros" computes: encoders read zeros in the place of what is absent."""
    z = [e(x * present[:, i, None]) for i, (e, x) in enumerate(zip(model.encoders, features, strict=True))]
    return model.layers.layers(torch.cat(z, 1))


@pytest.mark.parametrize(
    ("selection", "column"), [("complete", None), ("masked", None), ("masked", "b"), ("last", None)]
)
def test_a_baseline_is_the_loop_written_out(selection, column, seed):
    """Order, masks, decay of the learning rate, scores of the validation part, and the first of the best epochs."""
    dataset = tiny(seed, absent=0.15)
    budget = replace(BUDGET, epochs=5, lr_decay=0.5, lr_decay_every=2, modality_dropout=0.4, rates=(0.2, 0.6))
    budget = replace(budget, rates_modality=column)
    changes = {"lr": 0.02, "weight_decay": 0.01, "selection": selection}
    fitted = get("zeros").fit(dataset, changes, seed, budget=budget)

    part, held = dataset.part("train"), dataset.part("validation")
    with seeded_init(seed, "init"):
        model = ImputedConcat(dataset.dims, 3, budget, fill="zeros")
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.01, foreach=False)
    order_of, masks_of = generator(seed, "order"), generator(seed, "masks")
    place = None if column is None else dataset.modalities.index(column)
    masks = [held.present, *(masks_at(held.present, rate, seed, "validation", place)[0] for rate in (0.2, 0.6))]
    losses, scores, states = [], [], []
    for epoch in range(5):
        optimizer.param_groups[0]["lr"] = 0.02 * 0.5 ** (epoch // 2)
        order, hidden, total = torch.randperm(60, generator=order_of), mcar(part.present, 0.4, masks_of).present, 0.0
        for rows in order.split(16):
            loss = F.cross_entropy(
                zeros_by_hand(model, [x[rows] for x in part.features], hidden[rows]), part.labels[rows]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(rows)
        losses.append(total / 60)
        guesses = [zeros_by_hand(model, held.features, present).argmax(1) for present in masks]
        hits = [float((guess == held.labels).double().mean()) for guess in guesses]
        scores.append({"complete": hits[0], "masked": (hits[1] + hits[2]) / 2, "last": epoch}[selection])
        states.append((hits[0], {k: v.clone() for k, v in model.state_dict().items()}))
    chosen = scores.index(max(scores))
    assert fitted.record["losses"] == pytest.approx(losses, rel=1e-4)
    assert (fitted.record["selected_epoch"], fitted.record["val_score"]) == (chosen + 1, states[chosen][0])
    model.load_state_dict(states[chosen][1])
    test = dataset.part("test")
    wanted = zeros_by_hand(model, test.features, test.present).softmax(1).detach()
    torch.testing.assert_close(fitted.predict(test.features, test.present), wanted, rtol=1e-3, atol=1e-5)


def test_the_first_of_equally_good_epochs_of_a_baseline_is_kept(seed, monkeypatch):
    scores = {"val_score": [0.1, 0.9, 0.9, 0.3], "val_score_masked": [0.5, 0.2, 0.6, 0.6]}
    dataset = tiny(seed)
    for selection, expected in (("complete", 2), ("masked", 3), ("last", 4)):
        each = iter(zip(*scores.values(), strict=True))
        monkeypatch.setattr(
            baseline._Fit, "_validate", lambda fit, epoch, each=each: dict(zip(scores, next(each), strict=True))
        )
        record = get("shaspec").fit(dataset, {"selection": selection, "epochs": 4}, 0, budget=BUDGET).record
        assert (record["selected_epoch"], record["val_score"]) == (expected, scores["val_score"][expected - 1])


def test_heads_under_a_baseline_are_filled_and_add_their_losses(seed):
    """Recovered features, what counts as there, and L_md (reversed) + c L_rec, against plain layers."""
    dataset = tiny(seed)
    config = get("shaspec+ebr").resolve(
        HEADS | {"ebr": HEADS["ebr"] | {"reconstruction": 0.4, "reversal": 0.3}}, BUDGET
    )[0]
    config = replace(config, ebr=replace(config.ebr, substitute="mean", normalize=False, residual=False))
    with seeded_init(seed, "init"):
        model = ShaSpec(dataset.dims, 3, config)
    part = dataset.part("train").select(torch.arange(12))
    present = torch.rand(12, 3, generator=torch.Generator().manual_seed(seed)) < 0.6
    present[torch.arange(12), torch.arange(12) % 3] = True
    encoded, filled, extra = model.filled(part.features, present)
    assert bool(filled.all()), "the mean of what is there fills the rest"
    latents = [h(e(x)) for h, e, x in zip(model.head.encoders, model.encoders, part.features, strict=True)]
    for b in range(12):
        here = present[b].nonzero().flatten().tolist()
        mean = torch.stack([latents[i][b] for i in here]).mean(0)
        for i in range(3):
            wanted = model.head.decoders[i](latents[i][b] if i in here else mean)
            torch.testing.assert_close(encoded[i][b], wanted, rtol=1e-4, atol=1e-6)
    plain = SimpleNamespace(encoders=model.encoders, head=model.head, fusion=SimpleNamespace(layers=lambda z: z[:, :3]))
    _, md, rec = losses_by_hand(plain, part.features, part.labels, present)
    torch.testing.assert_close(extra, md + 0.4 * rec)
    for name, factor in (("encoders.0.layers.0.weight", -0.3), ("head.discriminator.0.weight", 1.0)):
        p = dict(model.named_parameters())[name]
        slopes = [torch.autograd.grad(x, p, retain_graph=True, allow_unused=True)[0] for x in (extra, md, rec)]
        wanted = factor * slopes[1] + (0 if slopes[2] is None else 0.4 * slopes[2])
        torch.testing.assert_close(slopes[0], wanted, rtol=1e-3, atol=1e-7)


def test_the_settings_of_a_candidate_win_over_those_of_the_method_and_they_over_the_budget():
    budget = replace(BUDGET, lr=0.5, weight_decay=0.25, modality_dropout=0.0)
    method = replace(get("dropout"), fixed={"modality_dropout": 0.7, "weight_decay": 0.125})
    config, options = method.resolve({"weight_decay": 0.0625}, budget)
    assert (config.lr, config.weight_decay, config.modality_dropout, options) == (0.5, 0.0625, 0.7, {})
    first = method.resolve(None, budget)[0]
    assert first == method.resolve(method.search[0], budget)[0] != method.resolve(method.search[1], budget)[0]
    changed = get("cm-ae").with_settings("x", "X", {"lr": 0.3, "options": {"rebuild": 0.7}})
    assert (changed.name, changed.title, changed.fitter) == ("x", "X", get("cm-ae").fitter)
    config, options = changed.resolve({}, budget)
    assert (config.lr, options) == (0.3, {"rebuild": 0.7})


def test_rows_without_anything_get_the_training_shares_whatever_the_other_parts_hold(seed):
    dataset = tiny(seed)
    shares = torch.bincount(dataset.part("train").labels) / 60
    assert not torch.allclose(shares, torch.bincount(dataset.labels) / 120, atol=0.02)
    fit = baseline._Fit(lambda task: ShaSpec(dataset.dims, 3, task.config), Task(dataset, BUDGET, {}, 0))
    for found in (fit.fitted.prior, fit.model.prior.softmax(0)):
        torch.testing.assert_close(found, shares)
