"""The loop of the re-implemented methods against one written out; EBR under them; and which settings win."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_methods import BUDGET, HEADS
from training_data import losses_by_hand, tiny

from mmc_fast._util.seeds import generator, seeded_init
from mmc_fast.errors import InputError
from mmc_fast.experiments.data import mcar
from mmc_fast.experiments.methods import CANDIDATES, METHODS, Task, baseline, get
from mmc_fast.experiments.methods.imputation import ImputedConcat
from mmc_fast.experiments.methods.shaspec import ShaSpec
from mmc_fast.experiments.training import Interrupted, TrainingDiverged, adversarial, predict, train
from mmc_fast.experiments.training.evaluate import masks_at
from mmc_fast.experiments.training.progress import Silent
from mmc_fast.experiments.training.substitution import ranking_parts, refresh


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
    budget = replace(BUDGET, epochs=5, lr_decay=0.5, lr_decay_every=2, modality_dropout=0.4, rates=(0.2, 0.4, 0.6))
    budget = replace(budget, rates_modality=column)
    changes = {"lr": 0.02, "weight_decay": 0.01, "selection": selection}
    heard = []
    progress = SimpleNamespace(on_start=lambda *a: None, on_epoch=heard.append, on_end=lambda results: None)
    fitted = get("zeros").fit(dataset, changes, seed, budget=budget, progress=progress)

    part, held = dataset.part("train"), dataset.part("validation")
    with seeded_init(seed, "init"):
        model = ImputedConcat(dataset.dims, 3, budget, fill="zeros")
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.01, foreach=False)
    order_of, masks_of = generator(seed, "order"), generator(seed, "masks")
    place = None if column is None else dataset.modalities.index(column)
    masks = [held.present, *(masks_at(held.present, rate, seed, "validation", place)[0] for rate in (0.2, 0.4, 0.6))]
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
        scores.append({"complete": hits[0], "masked": sum(hits[1:]) / 3, "last": epoch}[selection])
        states.append((hits[0], {k: v.clone() for k, v in model.state_dict().items()}))
        wanted = {
            "stage": "train",
            "epoch": epoch + 1,
            "loss": pytest.approx(losses[-1], rel=1e-4),
            "val_score": hits[0],
        }
        assert heard[epoch] == wanted | ({"val_score_masked": scores[-1]} if selection == "masked" else {})
    chosen = scores.index(max(scores))
    assert fitted.record["losses"] == pytest.approx(losses, rel=1e-4)
    assert (fitted.record["selected_epoch"], fitted.record["val_score"]) == (chosen + 1, states[chosen][0])
    model.load_state_dict(states[chosen][1])
    test = dataset.part("test")
    wanted = zeros_by_hand(model, test.features, test.present).softmax(1).detach()
    torch.testing.assert_close(fitted.predict(test.features, test.present), wanted, rtol=1e-3, atol=1e-5)


def test_a_step_of_a_baseline_is_told_what_the_data_have_and_what_the_masks_left(seed, monkeypatch):
    dataset, seen, original = tiny(seed, absent=0.3), [], ImputedConcat.loss
    monkeypatch.setattr(ImputedConcat, "loss", lambda model, batch: seen.append(batch) or original(model, batch))
    fitted = get("zeros").fit(dataset, {"modality_dropout": 0.5, "epochs": 1}, seed, budget=BUDGET)
    assert "unimodal" not in fitted.record, "none was asked for"
    part = dataset.part("train")
    order = torch.randperm(60, generator=generator(seed, "order"))
    masks = mcar(part.present, 0.5, generator(seed, "masks")).present
    assert not torch.equal(masks, part.present)
    for name, wanted in (("natural", part.present), ("present", masks), ("labels", part.labels)):
        assert torch.equal(torch.cat([getattr(batch, name) for batch in seen]), wanted[order]), name
    assert torch.equal(torch.cat([batch.features[2] for batch in seen]), part.features[2][order])


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


PAGE = (Path(__file__).resolve().parents[3] / "docs" / "experiments" / "methods.md").read_text(encoding="utf-8")
SEARCHES = {  # what varies between the four candidates, and what does not
    "shaspec": ({"modality_dropout": (0.5, 0.3), "alignment": (0.1, 1.0)}, {"domain": 0.02}),
    "muse": ({"modality_dropout": (0.5, 0.0), "agreement": (0.5, 0.1), "classes": (0.5, 0.1)}, {"edge_dropout": 0.3}),
    "smil": ({"modality_dropout": (0.5, 0.3), "inner_lr": (1e-3, 1e-2)}, {"clusters": 10, "match": 0.01, "noise": 0.1}),
    "cm-ae": ({"modality_dropout": (0.5, 0.3), "rebuild": (1.0, 0.1)}, {}),
    "mt": ({"lr": (1e-3, 3e-4), "fusion_layer": (0, 1)}, {}),
    "grape": ({"modality_dropout": (0.3, 0.5), "layers": (3, 2)}, {}),
    "m3care": ({"modality_dropout": (0.5, 0.0), "threshold": (0.5, 0.8)}, {}),
    "logistic": ({"C": (0.1, 0.01, 1.0, 10.0)}, {}),
    "boosting": ({"learning_rate": (0.1, 0.05), "max_leaf_nodes": (31, 15)}, {"min_samples_leaf": 20, "copies": 0}),
    "boosting-masked": (
        {"learning_rate": (0.1, 0.05), "max_leaf_nodes": (31, 15)},
        {"min_samples_leaf": 20, "copies": 4},
    ),
    "product": ({"lr": (1e-3, 3e-4), "penalty": (0.001, 0.1)}, {"unimodal_share": 1.0}),
    "vanilla": ({"lr": (1e-3, 3e-4), "weight_decay": (0.0, 1e-4)}, {"fusion": "concat"}),
    "late": ({"lr": (1e-3, 3e-4), "weight_decay": (0.0, 1e-4)}, {"fusion": "late"}),
    "unimodal": ({"lr": (1e-3, 3e-4), "weight_decay": (0.0, 1e-4)}, {"unimodal_share": 1.0}),
    "dropout": ({"modality_dropout": (0.5, 0.3), "lr": (1e-3, 3e-4)}, {"consistency": 0.0}),
    "consistency": ({"modality_dropout": (0.5, 0.3), "consistency": (1.0, 3.0)}, {"fusion": "concat"}),
    "transformer": ({"modality_dropout": (0.5, 0.3), "consistency": (1.0, 0.0)}, {"fusion": "transformer"}),
    "recommended": (
        {"modality_dropout": (0.5, 0.3), "consistency": (1.0, 3.0)},
        {"experts": True, "unimodal_share": 1.0},
    ),
    "transformer-learner": (
        {"modality_dropout": (0.5, 0.3), "consistency": (1.0, 0.0)},
        {"fusion": "transformer", "experts": True, "optimizer": "adamw", "weight_average": 0.99, "encoder_norm": True},
    ),
}
SEARCHES |= {
    name: ({"lr": (1e-3, 3e-4), "kd.epochs": (10, 5)}, {"unimodal_share": 0.3, "kd.loss": loss, "kd.teachers": teachers} | order)
    for name, loss, teachers, order in (
        ("kd", "info_nce", "stronger", {"kd.order": "weakest_first"}), ("kd-kl", "kl", "stronger", {"kd.order": "weakest_first"}),
        ("kd-mse", "mse", "stronger", {"kd.order": "weakest_first"}), ("kd-strongest", "info_nce", "strongest", {}),
        ("kd-strongest-first", "info_nce", "stronger", {"kd.order": "strongest_first"}),
        ("kd-random", "info_nce", "stronger", {"kd.order": "random"}),
        ("kd-simultaneous", "info_nce", "stronger", {"kd.order": "simultaneous"}),
    )
}  # fmt: skip


@pytest.mark.parametrize("name", list(SEARCHES))
def test_a_method_declares_the_candidates_that_its_page_names(name):
    """The default first; all four are of the method's own, and the rest of the budget is that of all methods."""
    varied, fixed = SEARCHES[name]
    found = []
    for candidate in get(name).search:
        config, options = get(name).resolve(candidate, BUDGET)
        values = vars(config) | options | {f"kd.{k}": v for k, v in vars(config.kd or config).items()}
        assert {k: values[k] for k in fixed} == fixed
        assert (config.encoder_dim, config.batch_size, config.rates) == (8, 16, (0.3,))
        found.append(tuple(values[k] for k in varied))
    several = [k for k in varied if k in ("agreement", "classes")]  # these two move together
    grid = set(product(*varied.values()))
    assert set(found) == {c for c in grid if len({c[list(varied).index(k)] for k in several}) <= 1}
    assert (found[0], len(found)) == (tuple(v[0] for v in varied.values()), CANDIDATES)


def test_methods_are_what_their_page_says_of_them():
    for name in ("shaspec", "muse", "smil", "cm-ae", "mt", "grape", "m3care"):
        assert f"**{name}** ({get(name).title}, {get(name).source})" in PAGE
    own = {"shaspec", "muse", "smil", "cm-ae", "mt", "grape", "m3care"}
    extended = {f"{n}+{more}" for n in ("grape", "m3care", "muse", "smil", "shaspec") for more in ("kd", "ebr")}
    assert {n for n, m in METHODS.items() if m.baseline} == own | extended
    batch = ("muse", "grape", "m3care")
    assert {n for n, m in METHODS.items() if m.batch_dependent} == {n for n in own | extended if n.startswith(batch)}
    classes = {"muse", "muse+kd", "muse+ebr", "logistic", "boosting", "boosting-masked", "product"}
    assert {n for n, m in METHODS.items() if m.classes_only} == classes
    for name in sorted(extended):
        base, _, more = name.partition("+")
        config, options = get(name).resolve(None, BUDGET)
        assert (get(name).title, get(name).search) == (f"{get(base).title} + {more.upper()}", get(base).search)
        assert options == get(base).resolve(None, BUDGET)[1]
        assert (config.kd is None, config.ebr is None) == (more == "ebr", more == "kd")
        if config.ebr is not None:
            assert (config.ebr.cross_recovery, config.ebr.residual, config.ebr.normalize) == (0.0, True, True)
            assert config.ebr.backend == ("reference" if base == "smil" else "auto")
    for name in ("consistency-x5", "transformer-x5", "ebr-robust-x5", "subset-oracle-x5"):
        assert get(name).resolve(None, BUDGET)[1] == {"members": 5}
    assert get("subset-oracle").resolve(None, BUDGET)[1] == {"members": 1}
    assert get("subset-oracle").resolve(None, BUDGET)[0].selection == "complete", "a model that meets no masked row"


def test_the_forms_of_ebr_are_those_of_their_page():
    paper = [get("ebr-paper").resolve(s, BUDGET)[0].ebr for s in get("ebr-paper").search]
    assert [(e.schedule, e.reversal) for e in paper] == [
        ("joint", 0.01),
        ("joint", 0.1),
        ("joint", 1.0),
        ("interleave", 0.01),
    ]
    assert paper[3].interleave_epochs == 2
    slides = [get("ebr-slides").resolve(s, BUDGET)[0].ebr for s in get("ebr-slides").search]
    assert [(e.reconstruction, e.reversal, e.patience) for e in slides] == [
        (1.0, 0.01, 5), (1.0, 0.1, 5), (0.1, 0.01, 5), (0.1, 0.1, 5)
    ]  # fmt: skip
    for e in (*paper, *slides):
        assert (e.residual, e.normalize, e.substitute, e.ranking) == (False, False, "ranked", "reference")
        assert (e.hidden_dim, e.latent_dim, tuple(e.psi_dims)) == (128, 64, (64, 32))
    robust = [get("ebr-robust").resolve(s, BUDGET)[0] for s in get("ebr-robust").search]
    assert [(c.ebr.cross_recovery, c.consistency, c.fusion) for c in robust] == [
        (0.1, 1.0, "concat"), (0.0, 1.0, "concat"), (0.1, 3.0, "concat"), (0.1, 1.0, "transformer")
    ]  # fmt: skip
    best = [get("ebr-best").resolve(s, BUDGET)[0] for s in get("ebr-best").search]
    assert [(c.ebr.reversal, c.consistency, c.modality_dropout) for c in best] == [
        (0.1, 1.0, 0.5), (0.0, 1.0, 0.5), (0.1, 3.0, 0.5), (0.1, 1.0, 0.3)
    ]  # fmt: skip
    for c in (*robust, *best):
        assert (c.ebr.residual, c.ebr.normalize, c.ebr.substitute, c.substitute_in_training) == (
            True,
            True,
            "mean",
            True,
        )


class Heard(Silent):
    """What a training tells of its progress; Ctrl-C after the epoch of a stage."""

    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        self.stop, self.total, self.seen, self.ended = stop, 0, [], []

    def on_start(self, total_epochs, label):
        self.total = total_epochs

    def on_epoch(self, record):
        self.seen.append((record["stage"], record["epoch"]))
        if self.seen[-1] == self.stop:
            os.kill(os.getpid(), signal.SIGINT)

    def on_end(self, results):
        self.ended.append(results)


@pytest.mark.parametrize("name", ["shaspec+kd", "unimodal", "product"])
def test_progress_counts_the_epochs_of_every_stage_and_ctrl_c_ends_them(name, seed):
    heard, changes = Heard(), {"unimodal_share": 1.0} | ({"kd": {"epochs": 1}} if "kd" in name else {})
    if name == "product":
        changes["options"] = {"penalty": 0.1}
    fitted = get(name).fit(tiny(seed), changes, seed, budget=BUDGET, progress=heard)
    stages = [("unimodal", e) for e in (1, 2)] + ([("train", e) for e in (1, 2)] if "kd" in name else [])
    assert [s for s in heard.seen if s[0] != "distillation"] == stages
    assert heard.total == len(stages)
    assert set(fitted.record["unimodal"]) == {"a", "b", "c"}
    if "kd" in name:
        strongest = max("abc", key=fitted.record["unimodal"].get)  # the first of equals
        assert strongest not in {p["student"] for p in fitted.record["distillation"]["pairs"]}
        assert len(fitted.record["distillation"]["pairs"]) == 3, "every stronger one teaches every weaker one"
        assert heard.ended == [{"seed": seed}]
        for stop in (("unimodal", 1), ("train", 1)):
            with pytest.raises(Interrupted):
                get(name).fit(tiny(seed), changes, seed, budget=BUDGET, progress=Heard(stop))


@pytest.mark.parametrize("ranking", ["reference", "pairwise"])
def test_the_ranking_under_a_baseline_is_that_of_its_weights_and_starts_at_the_strongest_modality(ranking, seed):
    dataset = tiny(seed, absent=0.2)
    heads = HEADS["ebr"] | {"substitute": "ranked", "ranking": ranking}
    changes = {"ebr": heads, "unimodal_share": 1.0, "selection": "last"}
    fitted = get("shaspec+ebr").fit(dataset, changes, seed, budget=BUDGET)
    model, scores = fitted.answer.__self__, fitted.record["unimodal"]
    found = model.order.clone(), model.similarity.clone()
    strongest = max("abc", key=scores.get)  # the first of equals
    assert "abc"[int(found[0][0])] == strongest
    refresh(model, ranking_parts(dataset), strongest)
    assert torch.equal(found[0], model.order)
    assert torch.equal(found[1], model.similarity)


def test_a_loss_or_a_prediction_that_is_not_finite_ends_the_training_of_a_baseline(seed, monkeypatch):
    wild = {"lr": 1e30, "optimizer": "sgd", "epochs": 3}
    with pytest.raises(TrainingDiverged, match="lower the learning rate"):
        get("shaspec").fit(tiny(seed), wild, 0, budget=BUDGET)
    monkeypatch.setattr(ShaSpec, "probabilities", lambda self, x, present: torch.full((len(present), 3), float("nan")))
    with pytest.raises(TrainingDiverged, match=r"NaN or infinite .*validation after epoch 1"):
        get("shaspec").fit(tiny(seed), {}, 0, budget=BUDGET)


@pytest.mark.parametrize(
    ("name", "option", "value", "said"),
    [
        ("muse", "agreement", True, "give a number, such as 0.5"),
        ("muse", "agreement", "x", "give a number, such as 0.5"),
        ("muse", "agreement", -0.1, "give a number from 0 to 1000"),
        ("muse", "agreement", 1000.5, "give a number from 0 to 1000"),
        ("smil", "clusters", 2.5, "give a whole number, such as 10"),
        ("smil", "clusters", True, "give a whole number, such as 10"),
        ("smil", "clusters", 10_001, "give a number from 0 to 10000"),
        ("muse", "agreement", 1, None),
        ("muse", "agreement", 1000, None),
        ("muse", "agreement", 0.0, None),
        ("smil", "clusters", 10_000, None),
    ],
)
def test_an_option_has_the_type_and_the_size_of_the_declared_ones(name, option, value, said):
    if said is None:
        assert get(name).resolve({"options": {option: value}})[1] == {option: value}
        return
    with pytest.raises(InputError, match=f"method {name}: option {option} is .*; {said}"):
        get(name).resolve({"options": {option: value}})


def test_a_method_declares_four_candidates():
    with pytest.raises(InputError, match="method mt: 3 candidates; every method declares 4"):
        replace(get("mt"), search=get("mt").search[:3])


@pytest.mark.parametrize("name", ["kd", "ebr-paper"])
def test_a_method_of_the_standard_loop_is_a_run_of_it(name, seed, monkeypatch):
    monkeypatch.setattr(adversarial, "_PROBE_EPOCHS", 2)
    dataset, heard = tiny(seed, absent=0.2), Heard()
    changes = {"kd": {"epochs": 1}} if name == "kd" else HEADS | {"control": False}
    budget = replace(BUDGET, unimodal_share=1.0)
    fitted = get(name).fit(dataset, changes, seed, budget=budget, progress=heard)
    result = train(dataset, get(name).resolve(changes, budget)[0], seed=seed, evaluate_on=())
    wanted = {key: result.results[key] for key in ("label", "selected_epoch", "unimodal", "distillation")}
    wanted |= {"val_score": result.results["selected_val_score"]}
    wanted |= {"backend": result.results["environment"]["ebr_backend"]}
    if name == "ebr-paper":
        wanted |= {"modality_probe": result.results["adversarial"]["modality_probe"]}
    assert fitted.record == wanted
    assert heard.total == len(heard.seen) > 0
    part = dataset.part("test")
    assert torch.equal(fitted.predict(part.features, part.present), predict(result.model, part.features, part.present))
    torch.testing.assert_close(fitted.prior, torch.bincount(dataset.part("train").labels) / 60)
