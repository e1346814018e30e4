"""Scores: metrics counted by hand, masks that no method can influence, reliance, empty rows."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score
from training_data import small, tiny

from mmc_fast.diagnose import diagnose
from mmc_fast.diagnose.result import plain
from mmc_fast.errors import InputError
from mmc_fast.experiments.data import mcar
from mmc_fast.experiments.tasks import Classification
from mmc_fast.experiments.training import evaluate, load_run, parts, predict, train
from mmc_fast.experiments.training import evaluate as public_evaluate
from mmc_fast.experiments.training.evaluate import masks_at, measure
from mmc_fast.experiments.training.model import MultimodalModel

evaluate_module = importlib.import_module(
    "mmc_fast.experiments.training.evaluate"
)  # the name is that of a function too


def vanilla(seed: int, dataset) -> MultimodalModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MultimodalModel(dataset.dims, dataset.num_classes, small("vanilla"))


def complete(model, part, features=None, present=None) -> torch.Tensor:
    """Probabilities with zeros in place of what is absent, without the library's prediction path."""
    present = part.present if present is None else present
    z = [
        e(x) * present[:, i, None]
        for i, (e, x) in enumerate(zip(model.encoders, features or part.features, strict=True))
    ]
    return model.fusion.layers(torch.cat(z, 1)).softmax(1).detach()


def test_scores_of_a_model_by_hand(seed):
    dataset = tiny(seed, absent=0.2)
    model = vanilla(seed, dataset)
    rates = (0.1, 0.2, 0.7)
    result = evaluate(model, dataset, rates=rates, seed=seed, part="validation")
    part = dataset.part("validation")

    def accuracy(p):
        return pytest.approx(float((p.argmax(1) == part.labels).double().mean()))

    assert result["complete"] == accuracy(complete(model, part))
    for entry, rate in zip(result["missing"], rates, strict=True):
        present, realised = masks_at(part.present, rate, seed, "validation")
        lost = (part.present & ~present).sum(0) / part.present.sum(0)
        assert entry["realised"] == realised == pytest.approx(lost.tolist())
        assert entry["score"] == accuracy(complete(model, part, present=present))
        assert not (present & ~part.present).any()
    assert result["mean_missing"] == pytest.approx(sum(e["score"] for e in result["missing"]) / 3)
    for i, name in enumerate(dataset.modalities):
        entry = result["reliance"][name]
        for kind, kept in (
            ("leave_one_out", torch.arange(len(dataset.modalities)) != i),
            ("single_modality", torch.arange(len(dataset.modalities)) == i),
        ):
            masked = predict(model, part.features, part.present & kept, on_empty="prior")
            assert entry[kind] == pytest.approx(accuracy(masked)), "the model's own handling of absent modalities"
        assert entry["unimodal"] is None


@pytest.mark.parametrize("method", ["vanilla", "dropout", "ebr"])
def test_every_run_is_judged_as_the_diagnosis_judges_it(method, seed, tmp_path):
    """One measurement: the record of a run, ``evaluate`` and ``diagnose`` say the same of every modality."""
    dataset = tiny(seed, absent=0.2)
    stored = train(dataset, small(method, epochs=3), seed=seed, run_dir=tmp_path / "run").results["scores"]["reliance"]
    loaded = load_run(tmp_path / "run")
    again = evaluate(loaded.model, dataset, rates=(), unimodal=loaded.unimodal)["reliance"]
    found = diagnose(loaded, dataset)
    assert found.settings["absence"] == "model"
    for verdict in found.verdicts:
        kept = plain({k: v for k, v in verdict.evidence.items() if k != "use_share"})
        for entry in (stored[verdict.modality], again[verdict.modality]):
            assert (entry["verdict"], entry["evidence"]) == (verdict.kind, kept)
    assert {"shapley", "shuffled", "total_effect", "ability"} <= set(kept)


def test_data_that_are_streamed_have_the_same_scores(seed, monkeypatch):
    monkeypatch.setattr(parts, "STREAM_ROWS", 7)
    dataset = tiny(seed, absent=0.2)
    result = train(dataset, small("ebr", epochs=1), seed=seed)
    whole, some = (
        measure(result.model, d, "test", (0.3,), seed, result.unimodal, True, "error")[1].answers
        for d in (dataset, replace(dataset, streamed=True))
    )
    assert whole.keys() == some.keys() >= {"complete", "missing_0.3", "unimodal_c"}
    for name, p in whole.items():
        torch.testing.assert_close(some[name], p, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_masks_are_the_same_for_every_method(seed):
    dataset = tiny(seed, absent=0.2)
    found = {}
    for method in ("vanilla", "dropout", "ebr"):
        config = small(method, epochs=1, control=False) if method == "ebr" else small(method, epochs=1)
        scores_ = train(dataset, replace(config, rates=(0.2, 0.5)), seed=seed).results["scores"]
        found[method] = [m["realised"] for m in scores_["missing"]]
    assert found["vanilla"] == found["dropout"] == found["ebr"]
    present = torch.ones(500, 3, dtype=torch.bool)
    drawn = [masks_at(present, 0.5, s, part)[0] for s, part in ((seed, "test"), (seed + 1, "test"), (seed, "train"))]
    assert not any(torch.equal(drawn[i], drawn[i - 1]) for i in range(3))
    assert (masks_at(present, 0.6, seed, "test")[0] & ~masks_at(present, 0.3, seed, "test")[0]).any()  # not nested


def test_masks_keep_every_row_alive_at_the_highest_rate(seed):
    present = torch.ones(500, 2, dtype=torch.bool)
    masked, realised = masks_at(present, 0.7, seed, "test")
    assert bool(masked.any(1).all())
    assert all(0.3 < r < 0.55 for r in realised)  # at two modalities a nominal 0.7 becomes about 0.41


def test_unimodal_is_the_unimodal_model_on_rows_that_have_the_modality(seed):
    dataset = tiny(seed, absent=0.3)
    result = train(dataset, small("vanilla"), seed=seed)
    part = dataset.part("test")
    for i, name in enumerate(dataset.modalities):
        here = part.present[:, i]
        guess = result.unimodal.models[name](part.features[i][here]).argmax(1)
        entry = result.results["scores"]["reliance"][name]
        assert entry["unimodal"] == pytest.approx(float((guess == part.labels[here]).double().mean()))
        assert entry["unimodal_rows"] == int(here.sum())
        stored = result.predictions[0].answers[f"unimodal_{name}"]
        assert torch.equal(stored.isnan().any(1), ~here)


@pytest.mark.parametrize("method", ["vanilla", "ebr"])
def test_predictions_do_not_depend_on_the_other_rows(method, seed):
    dataset = tiny(seed)
    model = train(dataset, small(method, epochs=1), seed=seed).model
    part = dataset.part("test")
    present = mcar(part.present, 0.5, torch.Generator().manual_seed(seed)).present
    together = predict(model, part.features, present)
    for n in range(0, 30, 7):
        alone = predict(model, [x[n : n + 1] for x in part.features], present[n : n + 1])
        torch.testing.assert_close(alone[0], together[n], rtol=1e-4, atol=1e-6)


def test_the_mean_over_the_rates_is_no_median(seed, monkeypatch):
    dataset, scores_ = tiny(seed), iter([0.9, 0.5, 0.5, 0.2])
    monkeypatch.setattr(Classification, "scores", lambda self, answers, labels: {"score": next(scores_)})
    found = evaluate(vanilla(seed, dataset), dataset, rates=(0.1, 0.2, 0.3), reliance=False)
    assert (found["complete"], found["mean_missing"]) == (0.9, pytest.approx(0.4))


def test_rows_are_answered_in_pieces_of_a_limited_number_of_values(seed, monkeypatch):
    dataset = tiny(seed, absent=0.2)
    model, part, sizes = vanilla(seed, dataset), dataset.part("test"), []
    whole = predict(model, part.features, part.present)
    model.register_forward_hook(lambda model, inputs, output: sizes.append(len(inputs[0][0])))
    for rows, values, wanted in ((4096, 35, [7, 7, 7, 7, 2]), (20, 10**6, [20, 10]), (4096, 4, [1] * 30)):
        monkeypatch.setattr(evaluate_module, "_BATCH", rows)
        monkeypatch.setattr(evaluate_module, "_VALUES", values)  # the widest modality has 5 columns
        torch.testing.assert_close(predict(model, part.features, part.present), whole)
        assert sizes == wanted
        sizes.clear()
    none = predict(model, [x[:0] for x in part.features], part.present[:0])
    assert none.shape == (0, 3)


def test_rows_with_nothing_present(seed):
    dataset = tiny(seed)
    model = train(dataset, small("ebr", control=False), seed=seed).model
    part = dataset.part("test")
    present = part.present.clone()
    present[[3, 5]] = False
    with pytest.raises(InputError, match=r"2 of 30 rows .* row 3"):
        predict(model, part.features, present)
    prior = torch.bincount(dataset.part("train").labels).float() / 60
    probabilities = predict(model, part.features, present, on_empty="prior")
    torch.testing.assert_close(probabilities[[3, 5]], prior.expand(2, 3))
    rest = [n for n in range(30) if n not in (3, 5)]
    torch.testing.assert_close(probabilities[rest], predict(model, part.features, part.present)[rest])
    model.train()
    predict(model, part.features, part.present)
    assert model.training, "as it was"
    with pytest.raises(InputError, match="Did you mean 'prior'"):
        predict(model, part.features, present, on_empty="priors")


def test_natural_rows_without_anything_get_the_prior_in_a_run(seed):
    dataset = tiny(seed)
    present = dataset.present.clone()
    for code in (1, 2):  # one of validation and one of test
        present[int((dataset.split == code).nonzero()[0])] = False
    result = train(replace(dataset, present=present), small("ebr", epochs=1), seed=seed)
    assert len(result.predictions[0].labels) == 30


def test_evaluation_leaves_model_and_data_alone(seed):
    dataset = tiny(seed)
    model = train(dataset, small("ebr", epochs=1), seed=seed).model
    state = {k: v.clone() for k, v in model.state_dict().items()}
    features = {k: v.clone() for k, v in dataset.features.items()}
    model.train()
    first, second = (
        evaluate(model, dataset),
        evaluate(model, dataset, part="test", seed=0, rates=(0.1, 0.2, 0.3, 0.4, 0.7)),
    )
    assert first == second
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, features[k]) for k, v in dataset.features.items())


def test_strangers_are_refused(seed):
    dataset = tiny(seed)
    model = vanilla(seed, dataset)
    assert public_evaluate is evaluate
    for other, message in (
        (tiny(seed, dims=(5, 3)), "modalities"),
        (tiny(seed, dims=(5, 3, 6)), "modalities"),
        (
            replace(dataset, features=dict(reversed(dataset.features.items()))),
            "modalities",
        ),  # same widths, another order
        (tiny(seed, num_classes=2), "built for classification of 3"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(model, other)
    with pytest.raises(InputError, match="Did you mean 'test'"):
        evaluate(model, dataset, part="tests")
    with pytest.raises(InputError, match="rate"):
        evaluate(model, dataset, rates=(1.0,))


def test_a_modality_without_rows_or_without_both_classes_has_no_unimodal_score(seed):
    dataset = tiny(seed, num_classes=2)
    present, test = dataset.present.clone(), dataset.split == 2
    present[test & (dataset.labels == 1), 1] = False
    present[test, 2] = False
    dataset = replace(dataset, present=present)
    result = train(dataset, small("vanilla", epochs=1), seed=seed)
    some = int((test & (dataset.labels == 0)).sum())
    for unimodal in (result.unimodal, None):
        scores, found = measure(result.model, dataset, "test", (), seed, unimodal, True, "error")
        told = {name: (entry["unimodal"], entry["unimodal_rows"]) for name, entry in scores["reliance"].items()}
        assert told == {"a": (told["a"][0], 30), "b": (None, some), "c": (None, 0)}
        assert (told["a"][0] is None) == (unimodal is None)
        assert set(found.answers) == {"complete"} | ({"unimodal_a", "unimodal_b"} if unimodal else set())


def test_a_result_names_part_rows_metric_and_every_score(seed):
    dataset = tiny(seed, absent=0.2)
    model, part = vanilla(seed, dataset), dataset.part("train")
    result = evaluate(model, dataset, part="train", rates=(0.5,), seed=seed, reliance=False)
    masked = masks_at(part.present, 0.5, seed, "train")[0]
    (entry,) = result["missing"]
    for found, prefix, present in ((result, "complete_", part.present), (entry, "", masked)):
        guess = complete(model, part, present=present)
        assert found[f"{prefix}macro_f1"] == pytest.approx(
            f1_score(part.labels, guess.argmax(1), average="macro", labels=[0, 1, 2], zero_division=0.0)
        )
        assert found[f"{prefix}macro_auroc"] == pytest.approx(roc_auc_score(part.labels, guess, multi_class="ovr"))
    assert (result["part"], result["metric"], result["rows"], entry["rate"]) == ("train", "accuracy", 60, 0.5)
    assert set(result) == {
        "part", "metric", "rows", "complete", "complete_macro_f1", "complete_macro_auroc", "missing", "mean_missing"
    }  # fmt: skip
    assert evaluate(model, dataset, rates=(), reliance=False)["mean_missing"] is None
    nobody = replace(dataset, present=dataset.present & (dataset.split != 2)[:, None])
    with pytest.raises(InputError, match="30 of 30 rows"):
        evaluate(model, nobody)


def test_measure_keeps_the_predictions_behind_each_score(seed):
    dataset = tiny(seed, num_classes=2)
    model = vanilla(seed, dataset)
    settings = {"part": "test", "rates": (0.3,), "seed": seed, "unimodal": None, "reliance": False, "on_empty": "error"}
    result, found = measure(model, dataset, **settings)
    assert set(found.answers) == {"complete", "missing_0.3"}
    assert result["complete"] == model.task.score(found.answers["complete"], found.labels)
    assert result["missing"][0]["score"] == model.task.score(found.answers["missing_0.3"], found.labels)
    assert torch.equal(dataset.labels[found.index], found.labels)


def test_rates_of_one_modality_leave_the_others_alone(seed):
    dataset = tiny(seed, dims=(4, 4), absent=0.2)
    part = dataset.part("test")
    model = vanilla(seed, dataset)
    result = evaluate(model, dataset, rates=(0.6,), seed=seed, reliance=False, rates_modality="b")
    (entry,) = result["missing"]
    present = masks_at(part.present, 0.6, seed, "test", 1)[0]
    assert torch.equal(present[:, 0], part.present[:, 0])
    lost = part.present[:, 1] & ~present[:, 1]
    both = part.present.all(1)
    assert not lost[~both].any()  # no row loses the last it has
    assert 0.25 < float(lost[both].double().mean()) < 0.95
    assert entry["realised"][0] == 0.0
    assert entry["score"] == pytest.approx(
        float((complete(model, part, present=present).argmax(1) == part.labels).double().mean())
    )
    with pytest.raises(InputError, match="Did you mean"):
        evaluate(model, dataset, rates=(0.6,), seed=seed, rates_modality="B")


def test_rates_of_one_modality_select_the_epoch_and_are_recorded(seed):
    dataset = tiny(seed, dims=(4, 4))
    plain = replace(small("vanilla", epochs=2), selection="masked", rates=(0.5,))
    config = replace(plain, rates_modality="b")
    result = train(dataset, config, seed=seed)
    assert result.results["config"]["rates_modality"] == "b"
    assert result.results["scores"]["missing"][0]["realised"][0] == 0.0
    assert type(config).from_dict(config.to_dict()) == config
    masks = masks_at(dataset.part("validation").present, 0.5, seed, "validation", 1)[0]
    part = dataset.part("validation")
    found = float((complete(result.model, part, present=masks).argmax(1) == part.labels).double().mean())
    history = [e for e in result.results["history"] if "val_score_masked" in e]
    selected = next(e for e in history if e["epoch"] == result.results["selected_epoch"])
    assert selected["val_score_masked"] == pytest.approx(found)
    with pytest.raises(InputError, match="rates_modality"):
        train(dataset, replace(config, rates_modality="x"), seed=seed)
