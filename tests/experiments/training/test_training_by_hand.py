"""Whole runs against loops that are written out: losses, λ, masks, noise, clipping, averages, selection and the record."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from training_data import losses_by_hand, small, tiny

from mmc_fast._util.seeds import generator, seeded_init
from mmc_fast.experiments.data import mcar
from mmc_fast.experiments.training import adversarial, predict, train
from mmc_fast.experiments.training.evaluate import masks_at
from mmc_fast.experiments.training.model import MultimodalModel

EPOCHS, RATES = 4, (0.2, 0.4, 0.6)
COMMON = {"epochs": EPOCHS, "rates": RATES, "control": False, "unimodal_share": 0.0, "selection": "masked"}
CASES = {
    "ebr": small(
        "ebr", modality_dropout=0.4, lr=0.01, lr_decay=0.5, lr_decay_every=2,
        ebr_reconstruction=0.3, ebr_substitute="mean", **COMMON,
    ),
    "vanilla": small(
        "dropout", modality_dropout=0.4, optimizer="sgd", lr=0.05, momentum=0.8, weight_decay=0.01, consistency=0.7,
        clip_grad_norm=0.4, class_weights="balanced", weight_average=0.7, noise_modality="b", noise_rate=0.3, **COMMON,
    ),
}  # fmt: skip


def concatenated(model: MultimodalModel, features, present) -> torch.Tensor:
    z = [encoder(x) * present[:, i, None] for i, (encoder, x) in enumerate(zip(model.encoders, features, strict=True))]
    return model.fusion.layers(torch.cat(z, 1))


def norm(gradients) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))


def gradients_of(config, model, features, labels, present, natural, lambda_: float, weights):
    """Gradients by parameter, and the three losses of a batch; ``weights``: of the classes."""
    p = list(model.parameters())

    def slopes(loss):
        return torch.autograd.grad(loss, p, allow_unused=True, retain_graph=True)

    if config.ebr is None:
        masked, complete = concatenated(model, features, present), concatenated(model, features, natural)
        each = F.cross_entropy(masked, labels, reduction="none") + F.cross_entropy(complete, labels, reduction="none")
        semantic = (weights[labels] * each).mean() / 2
        target = complete.detach().softmax(1)
        divergence = (target * (target.log() - masked.log_softmax(1))).sum(1).mean()
        return slopes(semantic + config.consistency * divergence), (semantic, None, None)
    semantic, md, rec = losses_by_hand(model, features, labels, present)
    task, game = slopes(semantic + config.ebr.reconstruction * rec), slopes(md)
    psi = {id(q) for q in model.head.discriminator.parameters()}
    factors = [1.0 if id(q) in psi else -lambda_ for q in p]
    zeros = [torch.zeros_like(q) for q in p]
    sums = [
        (z if t is None else t) + f * (z if g is None else g)
        for z, t, g, f in zip(zeros, task, game, factors, strict=True)
    ]
    return sums, (semantic, md, rec)


def run_by_hand(dataset, config, seed: int):
    """Weights of the selected epoch, history, and the number of that epoch."""
    part, held = dataset.part("train"), dataset.part("validation")
    with seeded_init(seed, "init"):
        model = MultimodalModel(dataset.dims, 3, config)
    model.prior.copy_((torch.bincount(part.labels).double() / len(part)).log())
    order_of, masks_of, noise_of = (generator(seed, name) for name in ("order", "masks", "noise"))
    settings = {"lr": config.lr, "weight_decay": config.weight_decay, "foreach": False}
    sgd = config.optimizer == "sgd"
    optimizer = (
        torch.optim.SGD(model.parameters(), momentum=config.momentum, **settings)
        if sgd
        else torch.optim.Adam(model.parameters(), **settings)
    )
    weights = 60 / (3 * torch.bincount(part.labels).float())
    mean = {name: p.detach().clone() for name, p in model.named_parameters()}
    probed = part.select(torch.randperm(60, generator=generator(seed, "probe"))[:512])
    history, best, selected, kept = [], -1.0, 0, {}
    for epoch in range(EPOCHS):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * config.lr_decay ** (epoch // config.lr_decay_every)
        order = torch.randperm(60, generator=order_of)
        masks = mcar(part.present, config.modality_dropout, masks_of).present
        sums, clipped, lambda_ = [0.0, 0.0, 0.0], 0, 0.0
        for rows in order.split(16):
            features, present, natural = [x[rows] for x in part.features], masks[rows], part.present[rows]
            if config.noise_modality is not None:
                uniform = 2 * torch.rand(len(rows), 3, generator=noise_of) - 1
                features[1] = 0.7 * features[1] + 0.3 * uniform * part.features[1].std(0)
            if config.ebr is not None:
                lambda_ = 0.5
            gradients, losses = gradients_of(
                config, model, features, part.labels[rows], present, natural, lambda_, weights
            )
            factor = 1.0
            if config.clip_grad_norm is not None and norm(gradients) > config.clip_grad_norm:
                factor, clipped = config.clip_grad_norm / norm(gradients), clipped + 1
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.grad = None if g is None else factor * g
            optimizer.step()
            mean = {n: 0.7 * mean[n] + 0.3 * p.detach() for n, p in model.named_parameters()}
            sums = [
                s + float(loss.detach()) * len(rows) if loss is not None else None
                for s, loss in zip(sums, losses, strict=True)
            ]
        record = dict(
            zip(("loss_sem", "loss_md", "loss_rec"), (None if s is None else s / 60 for s in sums), strict=True)
        )
        record |= {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], "reversal": None}
        if config.clip_grad_norm is not None:
            record["clipped"] = clipped
        if config.ebr is not None:
            share = masks.sum(0) / masks.sum()
            record |= {
                "reversal": lambda_,
                "loss_md_over_entropy": record["loss_md"] / float(-(share * share.log()).sum()),
            }
            loss = losses_by_hand(model, probed.features, probed.labels, probed.present)[1]
            for name in ("psi", "encoders"):
                group = model.groups()["discriminator" if name == "psi" else name]
                factor = 1.0 if name == "psi" else lambda_
                record[f"grad_norm_{name}"] = factor * norm(torch.autograd.grad(loss, group, retain_graph=True))
        own = {n: p.detach().clone() for n, p in model.state_dict().items()}
        used = own | (mean if config.weight_average else {})
        model.load_state_dict(used)
        hits = [
            float((predict(model, held.features, present).argmax(1) == held.labels).double().mean())
            for present in (held.present, *(masks_at(held.present, rate, seed, "validation")[0] for rate in RATES))
        ]
        model.load_state_dict(own)
        record |= {"val_score": hits[0], "val_score_masked": pytest.approx(sum(hits[1:]) / 3)}
        history.append(record)
        if sum(hits[1:]) / 3 > best:
            best, selected, kept = sum(hits[1:]) / 3, epoch + 1, used
    return kept, history, selected


@pytest.mark.parametrize("name", list(CASES))
def test_a_run_is_the_loop_written_out(name, seed, monkeypatch):
    monkeypatch.setattr(adversarial, "_PROBE_EPOCHS", 2)
    dataset, config = tiny(seed, absent=0.15), CASES[name]
    result = train(dataset, config, seed=seed, evaluate_on=())
    weights, history, selected = run_by_hand(dataset, config, seed)
    assert result.results["selected_epoch"] == selected
    assert result.results["selected_val_score"] == history[selected - 1]["val_score"]
    for found, wanted in zip(result.results["history"], history, strict=True):
        assert {k: found[k] for k in wanted} == {
            k: pytest.approx(v, rel=1e-3, abs=1e-6) if isinstance(v, float) else v for k, v in wanted.items()
        }
    state = result.model.state_dict()
    for key in (k for k in weights if k not in ("similarity", "order")):
        torch.testing.assert_close(state[key], weights[key], rtol=1e-3, atol=2e-5)
