"""Experiments that look inside trained models: what they measure against hand-made numbers, each one's smoke run, resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score
from training_data import check_one_line, own_data, small, tiny
from typer.testing import CliRunner

from mmc_fast.cli import app
from mmc_fast.errors import InputError
from mmc_fast.experiments.compare.configs import load_data_configs
from mmc_fast.experiments.compare.runs import settings_of, train_and_keep
from mmc_fast.experiments.jobs import Job, Result, Workspace, perform
from mmc_fast.experiments.paper import EXPERIMENTS, Plan, fig5, fig6, get, inside, paper, table6, table7, table9
from mmc_fast.experiments.paper.base import Direction, Estimate, Outcome
from mmc_fast.experiments.paper.fig7 import noisy_mean, slope
from mmc_fast.experiments.paper.inside import METHODS, Bench, Models, alone, direction, fused, resampled, value
from mmc_fast.experiments.paper.output import direction_rows
from mmc_fast.experiments.paper.table6 import FILLED, fillings, hide
from mmc_fast.experiments.paper.table7 import contributions
from mmc_fast.experiments.training import MultimodalModel, TrainConfig, load_run, predict, train

ROOT = Path(__file__).resolve().parents[3]
MINE = ("table6", "table7", "table9", "fig4", "fig5", "fig6", "fig7")


def plan(folder: Path, seed: int, seeds: int = 1, jobs: int = 1, **options) -> Plan:
    own_data(folder, seed, num_classes=3)
    return Plan(folder / "out", (str(folder / "mine.toml"),), range(seeds), jobs, **options)


def trained(seed: int, method: str = "vanilla", absent: float = 0.0, **changes):
    data = tiny(seed, absent=absent)
    return data, train(data, small(method, rates=(), control=False, **changes), seed=seed, evaluate_on=())


# What is measured


def by_hand(model: MultimodalModel, slots: list[np.ndarray]) -> np.ndarray:
    """Probabilities of a concatenation of one hidden layer, in NumPy."""
    first, last = model.fusion.layers[0], model.fusion.layers[2]
    w, b = first.weight.detach().double().numpy(), first.bias.detach().double().numpy()
    hidden = np.maximum(np.concatenate(slots, 1) @ w.T + b, 0)
    logits = hidden @ last.weight.detach().double().numpy().T + last.bias.detach().double().numpy()
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_every_filling_is_what_its_name_says(seed):
    data, result = trained(seed)
    model, train_part, test = result.model, data.part("train"), data.part("test")
    found = fillings(model, train_part, test, 1, seed)
    assert tuple(found) == FILLED
    with torch.no_grad():
        known = [z.double().numpy() for z in model.encode(train_part.features)]
        slots = [z.double().numpy() for z in model.encode(test.features)]
    y, n = train_part.labels.numpy(), len(test)

    def answer(filling: np.ndarray) -> np.ndarray:
        return by_hand(model, [slots[0], np.broadcast_to(filling, slots[1].shape), slots[2]])

    mean = known[1].mean(0)
    classes = np.stack([known[1][y == c].mean(0) for c in range(3)])
    spread = [known[i].std(0, ddof=1) for i in (0, 2)]
    distance = np.zeros((n, len(y)))
    for i, s in zip((0, 2), spread, strict=True):
        for j in np.flatnonzero(s > 0):
            distance += ((slots[i][:, j, None] - known[i][None, :, j]) / s[j]) ** 2
    plain = answer(mean)
    expected = {
        "zeros": answer(np.zeros_like(mean)),
        "nearest neighbour": answer(known[1][distance.argmin(1)]),
        "mean without class": plain,
        "mean with class": answer(plain @ classes),
        "mean of the true class": answer(classes[test.labels.numpy()]),
    }
    for rule, p in expected.items():
        np.testing.assert_allclose(found[rule].numpy(), p, atol=1e-5, err_msg=rule)
    drawn = np.stack([answer(row) for row in known[1]])  # of every train row, in every test row
    hits = np.abs(drawn - found["random"].numpy()[None]).max(-1) < 1e-5
    assert hits.any(0).all()
    assert len(set(hits.argmax(0).tolist())) > 3
    other, again = (fillings(model, train_part, test, 1, seed + n)["random"] for n in (1, 0))
    assert not torch.equal(other, found["random"])
    assert torch.equal(again, found["random"])
    lacks = fillings(model, train_part.select(train_part.labels != 2), test, 1, seed)  # a class that no donor has
    rows = test.labels == 2
    torch.testing.assert_close(lacks["mean of the true class"][rows], lacks["mean without class"][rows])
    assert all(bool(torch.isfinite(p).all()) for p in lacks.values())


def test_only_rows_that_keep_something_lose_the_modality(seed):
    data, result = trained(seed, absent=0.5)
    test = data.part("test")
    hidden = hide(test.present, 1)
    only = test.present[:, 1] & (test.present.sum(1) == 1)
    assert only.any(), "draw again: no row has this modality alone"
    assert torch.equal(hidden[:, 1], only)
    assert torch.equal(hidden[:, [0, 2]], test.present[:, [0, 2]])
    lacking, known = ~test.present[:, 1] | only, data.part("train")
    with torch.no_grad():
        plain = torch.softmax(result.model(test.features, test.present).logits, -1)
    with_it = fillings(result.model, known.select(known.present[:, 1]), test, 1, seed)  # no other row is a donor
    for rule, p in fillings(result.model, known, test, 1, seed).items():
        torch.testing.assert_close(p[lacking], plain[lacking], msg=rule)
        torch.testing.assert_close(p, with_it[rule], msg=rule)


@pytest.mark.parametrize("method", ["vanilla", "ebr"])
def test_the_fused_representation_is_what_the_last_layer_reads(seed, method):
    data, result = trained(seed, method)
    model, part = result.model, data.part("test")
    last = model.fusion.layers[-1]
    logits = model(part.features).logits
    torch.testing.assert_close(F.linear(fused(model, part), last.weight, last.bias), logits)
    own = result.unimodal.models["b"]
    seen = alone(result.unimodal, data, part, "b")
    torch.testing.assert_close(own.classifier(seen), own(part.features[1]))
    late, _ = trained(seed, fusion="transformer"), None
    part = late[0].part("test")
    model = late[1].model
    torch.testing.assert_close(
        F.linear(fused(model, part), model.fusion.classifier.weight, model.fusion.classifier.bias),
        model(part.features).logits,
    )
    with pytest.raises(InputError, match="late fusion has no fused representation"):
        fused(trained(seed, fusion="late")[1].model, part)


def test_contributions_are_leading_components_of_the_blocks(seed):
    data, result = trained(seed)
    model, part = result.model, data.part("test")
    found = contributions(model, part).numpy()
    w = model.fusion.layers[0].weight.detach().double().numpy()
    start = 0
    for i, z in enumerate(model.encode(part.features)):
        x = z.detach().double().numpy() @ w[:, start : start + z.shape[1]].T
        start += z.shape[1]
        values, vectors = np.linalg.eigh(np.cov(x.T))
        score = (x - x.mean(0)) @ vectors[:, -1]
        assert abs(np.corrcoef(score, found[:, i])[0, 1]) == pytest.approx(1, abs=1e-6)
        assert found[:, i].var(ddof=1) == pytest.approx(values[-1], rel=1e-6)


def stored(folder: Path, data, seed: int, rows: dict[str, TrainConfig]) -> dict:
    """Settings of a measuring function, whose trained runs are in the folder; "target/NAME" is trained without NAME."""
    np.savez(
        folder / "own.npz", meta='{"kind": "classification"}', y=data.labels.numpy(), split=data.split.numpy(),
        **{f"x_{name}": x.numpy() for name, x in data.features.items()},
        **{f"present_{name}": data.present[:, i].numpy() for i, name in enumerate(data.features)},
    )  # fmt: skip
    (whole,) = load_data_configs([str(folder / "own.npz")])
    trainings = {}
    for name, settings in rows.items():
        others = [other for other in data.modalities if other != name.removeprefix("target/")]
        config = replace(whole, options={"modalities": others}) if len(others) < len(data.modalities) else whole
        every = settings_of(config, seed, settings, evaluate_on=[], unimodal=None)
        job = Job(name, train_and_keep, every)
        assert perform(job, folder).failed is None
        trainings[name] = {"folder": job.own, "source": config.key}
    return {"trainings": trainings, "options": {}, "seed": seed}


def test_redundancy_rank_and_likeness_against_numpy(tmp_path, seed):
    config = small("vanilla", rates=(), epochs=2)
    data = tiny(seed, sizes=(60, 30, 90))
    settings, here = stored(tmp_path, data, seed, {"model": config, "unimodal": config}), Workspace(tmp_path, tmp_path)
    models = Models(settings, here)
    run, part = models.run("model"), models.data("model").part("test")
    x = fused(run.model, part).double().numpy()
    moving = x.std(0) > 1e-6 * x.std(0).max()
    r = np.corrcoef(x[:, moving].T)
    ridge = 1e-3
    options = {"ridge": ridge, "tolerance": 0.05, "strongest": "a", "weakest": "c"}
    settings |= {"options": options}
    expected = np.diagonal(np.linalg.inv(r + ridge * np.eye(len(r)))).mean()
    values = table7.measure(settings, here)[0]
    assert values["units"] == pytest.approx(expected, rel=1e-5)
    assert values["constant"] == int((~moving).sum())
    one = contributions(run.model, part).numpy()
    expected = np.diagonal(np.linalg.inv(np.corrcoef(one.T) + ridge * np.eye(3))).mean()
    assert values["modalities"] == pytest.approx(expected, rel=1e-6)
    s = np.linalg.svd(x - x.mean(0), compute_uv=False)
    values = fig5.measure(settings, here)[0]
    assert values["numerical"] == int((s > 0.05 * s[0]).sum())
    p = s / s.sum()
    assert values["effective"] == pytest.approx(np.exp(-(p[p > 0] * np.log(p[p > 0])).sum()), rel=1e-5)
    assert values["stable"] == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-5)
    for which, name in (("strongest", "a"), ("weakest", "c")):
        z = run.unimodal.models[name].encoder(part.features["abc".index(name)]).detach().double().numpy()
        a, b = x - x.mean(0), z - z.mean(0)
        cka = (np.linalg.norm(a.T @ b) ** 2) / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
        assert values[which] == pytest.approx(cka, rel=1e-5)
    found = table9.measure(settings, here)[0]
    assert found["not_applicable"] is None
    assert found["cross_entropy"] > 0
    assert 0 <= found["mixing"] <= 1
    transformer = small("vanilla", rates=(), epochs=1, fusion="transformer")
    (tmp_path / "other").mkdir()
    settings = stored(tmp_path / "other", tiny(seed), seed, {"model": transformer, "unimodal": config})
    here = Workspace(tmp_path / "other", tmp_path)
    found = table9.measure(settings, here)[0]
    assert "no Linear layer" in found["not_applicable"]
    assert found["cross_entropy"] is None


def test_substitution_is_measured_where_a_modality_is_hidden(tmp_path, seed):
    """A row that has nothing else keeps it: there the target is the vanilla model on what there is."""
    plain = small("vanilla", rates=(), epochs=1)
    heads = small("ebr", rates=(), epochs=1, control=False, ebr_substitute="mean")
    rows = {"vanilla": plain, "late": replace(plain, fusion="late"), "ebr-paper": heads, "ebr-robust": heads}
    data = tiny(seed, absent=0.4, sizes=(60, 30, 120))
    settings = stored(tmp_path, data, seed, rows | {f"target/{name}": plain for name in "abc"})
    here = Workspace(tmp_path, tmp_path)
    models = Models(settings, here)
    values, arrays = table6.measure(settings, here)
    assert values == {"modalities": ["a", "b", "c"], "metric": "accuracy"}
    test = models.data("vanilla").part("test")
    assert np.array_equal(arrays["labels"], test.labels)
    for column, name in enumerate("abc"):
        hidden = hide(test.present, column)
        kept = hidden[:, column]
        assert kept.any()
        for rule in ("late", "ebr-paper", "ebr-robust"):
            wanted = predict(models.run(rule).model, test.features, hidden)
            np.testing.assert_array_equal(arrays[f"{rule}/{name}"], wanted)
        others = models.data(f"target/{name}").part("test")
        assert len(others.features) == 2
        target = predict(models.run(f"target/{name}").model, others.features, others.present, on_empty="prior")
        vanilla = predict(models.run("vanilla").model, test.features, test.present)
        wanted = torch.where(kept[:, None], vanilla, target)
        np.testing.assert_allclose(arrays[f"target/{name}"], wanted, atol=1e-6)
        assert set(arrays) >= {f"{rule}/{name}" for rule in FILLED}
        for method in rows:
            whole = predict(models.run(method).model, test.features, test.present)
            np.testing.assert_array_equal(arrays[f"complete/{method}"], whole)


def test_modalities_are_ordered_by_the_mean_score_of_their_own_models(tmp_path, monkeypatch):
    (data,) = load_data_configs(["mfeat"])
    bench = Bench(Plan(tmp_path, ("mfeat",), (0, 1, 2)), data)
    scores = iter([{"fou": 0.5, "mor": 0.9, "zer": 0.2}, {"fou": 0.9, "mor": 0.3, "zer": 0.3}])
    failed = iter([None, "the loss became nan", None])
    bench._finish = lambda jobs: [made({}, next(failed)) for _ in jobs]
    monkeypatch.setattr(
        inside, "load_run", lambda folder: SimpleNamespace(unimodal=SimpleNamespace(scores=next(scores)))
    )
    assert list(bench.strengths().items()) == [("fou", 0.7), ("mor", pytest.approx(0.6)), ("zer", 0.25)]


def made(arrays: dict, failed: str | None = None) -> Result:
    return Result({}, {}, arrays, failed, 1.0, 1)


def test_slope_and_mean_under_noise_are_those_of_the_scores(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 40)
    found = {r: [made({"labels": labels, "p": rng.random((40, 3))}) for _ in range(2)] for r in (0.0, 0.1, 0.5)}
    curve = {r: resampled("accuracy", some, "p") for r, some in found.items()}
    scores = {r: [accuracy_score(labels, m.arrays["p"].argmax(1)) for m in some] for r, some in found.items()}
    for n in range(2):
        by_seed = [s[n] for s in scores.values()]
        assert slope(curve).plain[n] == pytest.approx(np.polyfit(list(scores), by_seed, 1)[0])
        assert noisy_mean(curve).plain[n] == pytest.approx(np.mean(by_seed[1:]))
    lost = made({}, "the loss became nan")
    assert resampled("accuracy", [found[0.0][0], lost], "p") is None
    assert slope(curve | {0.5: None}) is None


# Directions and values


def test_pairs_are_by_seed_and_a_lost_seed_leaves_both_sides():
    d = direction("claim", -1.0, [1.0, None, 3.0, 4.0], [2.0, 9.0, 4.5, None])
    assert d.ours.value == pytest.approx(-1.25)
    assert d.ours.low < -1.25 < d.ours.high
    assert direction("claim", 1.0, [None], [1.0]).verdict == "not measured"
    assert direction("claim", 1.0, [2.0]).verdict == "undecided"
    found = value([1.0, None, 3.0])
    assert (found.mean, found.sd) == (2.0, pytest.approx(2**0.5))
    assert value([None]).mean is None


def test_a_direction_without_a_printed_number_shows_its_sign():
    ours = Estimate(0.5, 0.2, 0.8)
    rows = direction_rows(
        Outcome([], [Direction("a", 1.0, ours, printed=False), Direction("b", -1.0, ours, printed=False)])
    )
    assert [row[1] for row in rows] == ["> 0", "< 0"]
    assert [row[-1].text for row in rows] == ["agrees", "disagrees"]


# Runs


@pytest.mark.parametrize("name", MINE)
def test_smoke_run_of_every_experiment(tmp_path, seed, name):
    some = plan(tmp_path, seed)
    outcome = get(name).run(some)
    assert outcome.tables
    for table in outcome.tables:
        labels = [label for label, _ in table.rows]
        measured_rows = [any(v.mean is not None for v in values) for _, values in table.rows]
        assert all(measured_rows), (table.title, labels, measured_rows)
    assert {d.verdict for d in outcome.directions} == {"undecided"}, "one seed decides nothing"
    assert all(d.ours is not None for d in outcome.directions)
    assert bool(outcome.drawings) == (name != "table9")
    json.dumps(outcome.record, allow_nan=False)
    before = {p: p.stat().st_mtime_ns for p in some.grid.rglob("*") if p.is_file()}
    again = get(name).run(some)
    assert {p: p.stat().st_mtime_ns for p in some.grid.rglob("*") if p.is_file()} == before
    assert again.tables == outcome.tables


def test_the_paper_has_its_numbers_where_it_prints_some(tmp_path, seed):
    """Spot checks of which number stands where."""
    outcome = get("table7").run(plan(tmp_path, seed))
    table = outcome.tables[0]
    papers = {label: [v.paper for v in values] for label, values in table.rows}
    assert table.columns == ["m = 2", "m = 3"]  # the data have three modalities
    assert papers == {
        "vanilla": [1.15, 2.68], "KD (InfoNCE)": [1.09, 1.90], "EBR (paper)": [1.05, 1.26], "EBR robust": [None, None],
    }  # fmt: skip
    claims = {d.claim.split(":")[0]: d.paper for d in outcome.directions}
    assert claims["KD (InfoNCE) below vanilla at m = 3"] == -0.78
    assert claims["vanilla grows from m = 2 to m = 3"] == 1.53


def test_a_training_that_diverges_is_left_out_and_named(tmp_path, seed):
    bench = Bench(some := plan(tmp_path, seed), load_data_configs(some.data)[0])
    found = bench.measure(fig6.measure, lambda method, _, s: {"model": bench.training(method, s, {"lr": 1e30})})
    assert found.series("vanilla", "epochs") == [None]
    assert all("became nan" in reason for reason in found.failed)
    assert [note.partition(": ")[2] for note in bench.notes(found)] == found.failed
    whole = bench.measure(fig6.measure, lambda method, _, s: {"model": bench.training(method, s)})
    assert whole.failed == []
    assert whole.series("vanilla", "epochs") == [[1]]


def test_settings_are_those_of_the_stored_selection(tmp_path):
    (data,) = load_data_configs(["mfeat"])
    bench = Bench(Plan(tmp_path, ("mfeat",), (0,)), data)
    for name in METHODS:
        config = TrainConfig.from_dict(bench.training(name, 0).settings["config"])
        selected = bench.methods[name].selected["mfeat"]
        assert config.epochs == 30
        assert config.selection == "complete"
        assert config.lr == selected.get("lr", config.lr)
        if "ebr" in selected:
            assert all(getattr(config.ebr, k) == v for k, v in selected["ebr"].items())
    keys = {
        bench.training("vanilla", s, c, m).key
        for s in (0, 1)
        for c in ({}, {"lr": 0.5})
        for m in (None, ["fou", "mor"])
    }
    assert len(keys) == 8
    paths = {
        bench._measurement(fig6.measure, ("vanilla", None, s), {"model": bench.training("vanilla", t)}, options).path
        for s in (0, 1)
        for t in (0, 1)
        for options in ({}, {"ridge": 1e-6}, {"ridge": 1e-3})
    }
    assert len(paths) == 12


def test_bad_input_is_one_line(tmp_path, seed):
    with pytest.raises(InputError, match="stored settings") as caught:
        EXPERIMENTS["fig6"].run(Plan(tmp_path, ("mfeat",), tune="always"))
    check_one_line(caught.value)
    data = tiny(seed).keep(["a"])
    np.savez(
        tmp_path / "one.npz",
        meta='{"kind": "classification"}',
        x_a=data.features["a"].numpy(),
        y=data.labels.numpy(),
        split=data.split.numpy(),
    )
    done = CliRunner().invoke(
        app, ["reproduce", "fig6", "--data", str(tmp_path / "one.npz"), "--out", str(tmp_path / "o"), "--seeds", "1"]
    )
    assert done.exit_code == 2, done.output
    assert "one modality" in done.output


@pytest.mark.slow
def test_killed_and_resumed_gives_the_numbers_of_an_undisturbed_run(tmp_path, seed):
    """Finished trainings are taken over, the one in progress continues, and nothing is left half written."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        own_data(tmp_path / name, seed, num_classes=3)

    def command(name: str) -> list[str]:
        here = tmp_path / name
        arguments = ["--data", str(here / "mine.toml"), "--out", str(here / "out"), "--seeds", "2", "--jobs", "1"]
        return [sys.executable, "-m", "mmc_fast", "reproduce", "table7", "--epochs", "3", *arguments]

    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command("whole"), check=True, env=environment, capture_output=True, timeout=300)
    process = subprocess.Popen(command("killed"), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    runs = tmp_path / "killed" / "out" / "grid" / "trained"
    deadline = time.monotonic() + 120
    while len(list(runs.glob("*/*.npz"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in runs.glob("*/*.npz")}
    assert len(done) >= 3
    subprocess.run(command("killed"), check=True, env=environment, capture_output=True, timeout=300)
    assert {p: p.stat().st_mtime_ns for p in done} == done
    tables = [
        json.loads((tmp_path / name / "out" / "table7" / "result.json").read_text())["tables"]
        for name in ("whole", "killed")
    ]
    assert tables[0] == tables[1]
    assert len(list(runs.glob("*/*.npz"))) == len(list((tmp_path / "whole").glob("out/grid/trained/*/*.npz")))
    assert all(load_run(p.with_suffix("")).model for p in runs.glob("*/*.npz"))


PRINTED = {
    "6": "zeros .5110; random .6139; nearest neighbour .7150; late fusion .6990; mean without class .5312; "
    "mean with class .7396; ebr .7829; target .7844",
    "7": "vanilla 1.15/2.68/3.51/4.70; kd 1.09/1.90/2.30/2.68; ebr 1.05/1.26/1.32/1.55",
    "9": "vanilla 5.66; kd 2.09; ebr 0.59",
    "mmvae": "vanilla 477/421/398/110/96; kd 482/465/390/298/270; ebr 485/477/431/405/395",
    "gmc": "vanilla 1877/1330/1146/930/872; kd 1905/1676/1533/1427/1390; ebr 1912/1825/1709/1600/1588",
}


@pytest.mark.parametrize(
    ("table", "numbers"),
    [
        ("6", paper.TABLE6), ("7", paper.TABLE7), ("9", paper.TABLE9), ("mmvae", paper.TABLE11["mmvae"]),
        ("gmc", paper.TABLE11["gmc"]),
    ],
)  # fmt: skip
def test_the_papers_numbers_are_those_that_it_prints(table, numbers):
    printed = {}
    for entry in PRINTED[table].split("; "):
        name, _, values = entry.rpartition(" ")
        found = [float(v) for v in values.split("/")]
        printed[name] = found if len(found) > 1 else found[0]
    assert dict(numbers) == printed


def test_every_experiment_of_the_interface_is_registered():
    assert set(MINE) <= set(EXPERIMENTS)
