"""What cannot be diagnosed, and what can only be in part."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diagnose_models import Attention, Toy, batches, chain, whole
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mmc_fast
from mmc_fast.diagnose import THRESHOLDS, DiagnoseOptions, Diagnosis, diagnose
from mmc_fast.diagnose.adapter import prove
from mmc_fast.diagnose.measures import blocks, probes, refitted, reliance, similarity, weights
from mmc_fast.errors import InputError
from mmc_fast.testing import planted_head


@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)],
)
def test_how_far_an_adapter_may_be_from_its_model(dtype: torch.dtype, allowed: float) -> None:
    """By the largest logit, whatever its size; nowhere nearly as far."""
    for scale in (1.0, 64.0):
        truth = torch.tensor([[scale, -scale / 2]], dtype=dtype)
        for gap, right in ((0.5, True), (2.0, False), (-2.0, False)):
            found = truth + torch.tensor([[0.0, gap * allowed * scale]], dtype=dtype)
            adapter: Any = SimpleNamespace(
                forward=lambda batch, y=truth: y, encode=lambda batch: {}, fuse=lambda features, y=found: y
            )
            if right:
                prove(adapter, None)
                continue
            with pytest.raises(InputError, match="is not what the model gives"):
                prove(adapter, None)


@pytest.mark.parametrize(
    ("wrong", "got"),
    [(lambda y: (y,), "tuple"), (lambda y: y[:, None], r"\[64, 1, 3\]"), (lambda y: y[:-1], r"\[63, 3\]")],
)
def test_what_fuse_must_return(wrong: Any, got: str, generator: torch.Generator) -> None:
    head = chain(generator)
    toy: Any = Toy(head, head)
    toy.fuse = lambda f: wrong(head(torch.cat(list(f.values()), 1)))
    with pytest.raises(InputError, match=f"returned {got}; it must return logits"):
        diagnose(toy, batches(generator), resamples=0)


def test_labels_that_are_gone_in_the_second_pass(generator: torch.Generator) -> None:
    head, loader = chain(generator), batches(generator)
    toy: Any = Toy(head, head)
    phases = ["collect"]
    toy.labels = lambda batch: batch[2] if phases[-1] == "collect" else None
    with pytest.raises(InputError, match="batch 0 had labels in the first pass and has none now"):
        diagnose(toy, loader, resamples=0, probes=False, progress=lambda phase, *rest: phases.append(phase))


def test_a_head_that_is_not_the_fusion_is_not_taken_for_it(generator: torch.Generator) -> None:
    head, loader = chain(generator), batches(generator)
    toy: Any = Toy(head, head)
    plain = diagnose(toy, loader, resamples=0, probes=False)
    toy.fuse = lambda f: 1.01 * head(torch.cat(list(f.values()), 1))
    other = diagnose(toy, loader, resamples=0, probes=False)
    assert plain.settings["agop"] != other.settings["agop"] == "vector-Jacobian products"
    assert other.value("use_share.image") == pytest.approx(plain.value("use_share.image"), rel=1e-4)


def test_fewer_than_thirty_samples_are_not_judged_however_clear_they_are(generator: torch.Generator) -> None:
    """Labels that the image decides alone, two classes of equal size."""
    loader = batches(generator, 30, 30)
    image, audio, _ = loader[0]
    labels = torch.arange(30) % 2
    image[:, 0] = 20.0 * (2 * labels - 1)
    head = nn.Linear(10, 2)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    head.weight.data[:, 0] = torch.tensor([-1.0, 1.0])
    toy = Toy(head, nn.Sequential(head))
    kinds = [
        [v.kind for v in diagnose(toy, [(image[:n], audio[:n], labels[:n])], resamples=50).verdicts] for n in (29, 30)
    ]
    assert kinds[0] == ["undecided", "undecided"]
    assert kinds[1][0] == "relied on"


def test_no_labels_one_class_and_constant_modality(generator: torch.Generator) -> None:
    head = chain(generator)
    loader = batches(generator)
    toy = Toy(head, head)

    class Silent(Toy):
        def labels(self, batch: Any) -> None:
            return None

    d = diagnose(Silent(head, head), loader, resamples=20)
    assert d.metric is None
    assert {v.kind for v in d.verdicts} == {"undecided"}
    assert "There are no labels" in d.summary()
    one = diagnose(toy, [(a, b, torch.zeros_like(y)) for a, b, y in loader], resamples=20)
    assert "single class" in one.summary()
    assert "score.all" not in one.measures
    constant = diagnose(toy, [(a, torch.full_like(b, 0.1), y) for a, b, y in loader], resamples=20)
    assert "audio is constant" in constant.summary()
    assert "constant" not in d.summary()
    assert constant.value("use_share.audio") == pytest.approx(0, abs=1e-9)
    assert constant["cka.audio"].value is None
    assert json.loads(constant.to_json())["measures"]["cka.audio"]["value"] is None
    for rows in (2, 3, 4, 5, 17):
        few = diagnose(toy, [tuple(t[:rows] for t in loader[0])], resamples=20)
        assert few.n_samples == rows
        assert "too few to judge" in few.summary()
        assert {v.kind for v in few.verdicts} == {"undecided"}
        numbers = [(loader[0][0][:rows], loader[0][1][:rows], torch.randn(rows, 3))]
        assert diagnose(toy, numbers, resamples=0).metric == "r2"
        assert (
            "No network was trained" in few.summary()
            or "alone.image" in few.measures
            or "single class" in few.summary()
        )
        assert Diagnosis.from_json(few.to_json()).measures == few.measures


def once(loader: list[Any]) -> Iterator[Any]:
    yield from loader


class Again:
    """Gives other batches in each reading."""

    def __init__(self, readings: list[list[Any]]) -> None:
        self.readings = iter(readings)

    def __iter__(self) -> Iterator[Any]:
        return iter(next(self.readings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda l: [(a * math.nan, b, y) for a, b, y in l], "'image' hold NaN or infinite values in row 0 of batch 0"),
        (lambda l: [*l[:-1], (l[-1][0][:, :5], *l[-1][1:])], "widths must not change"),
        (lambda l: [(a, b[:-1], y) for a, b, y in l], "must be paired"),
        (lambda l: [(a.long(), b, y) for a, b, y in l], "floating point"),
        (lambda l: [(a, b, y + 0.5) for a, b, y in l], "no whole numbers; for a regression give metric='r2'"),
        (lambda l: [(a, b, [f"class {i}" for i in y]) for a, b, y in l], "name the classes: adapter.classes"),
        (lambda l: [(a, b, y[:, None, None]) for a, b, y in l], "give class numbers"),
        (
            lambda l: (
                [(a, b, torch.eye(3)[y]) for a, b, y in l[:1]] + [(a, b, torch.ones(len(y), 3)) for a, b, y in l[1:]]
            ),
            "one-hot and these are not",
        ),
        (lambda l: [(a, b, y + 7) for a, b, y in l], "number the classes"),
        (lambda l: [(a, b, y * math.nan) for a, b, y in l], "drop samples without a label"),
        (lambda l: [], "no sample"),
        (lambda l: [(a[:0], b[:0], y[:0]) for a, b, y in l], "no rows"),
        (lambda l: [(a[:1], b[:1], y[:1]) for a, b, y in l[:1]], "one sample; give at least two"),
        (lambda l: [*l[:-1], (l[-1][0], l[-1][1], None)], "all or none"),
        (once, "iterator"),
        (lambda l: Again([l, l[:3]]), "gave 8 batches, and 3 when it was read again"),
        (lambda l: Again([l, []]), "gave 8 batches, and 0 when it was read again"),
        (lambda l: Again([l, [*l[1:], l[0]]]), "begin with other features when they are read again"),
        (lambda l: Again([l, [(a + 0.1 * torch.randn_like(a), b, y) for a, b, y in l]]), "random transforms"),
    ],
)
def test_bad_data(change, message: str, generator: torch.Generator) -> None:
    head = chain(generator)
    with pytest.raises(InputError, match=message) as caught:
        diagnose(Toy(head, head), change(batches(generator)), resamples=0, probes=False)
    assert "\n" not in str(caught.value)


def test_bad_models(generator: torch.Generator) -> None:
    loader = batches(generator)
    norm = nn.Sequential(nn.Linear(10, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    class Norm(Toy):
        def __init__(self) -> None:
            self.model = norm

        def fuse(self, features: dict[str, Tensor]) -> Tensor:
            return norm(torch.cat(list(features.values()), 1))

    with pytest.raises(InputError, match=r"model\.eval\(\)"):
        diagnose(Norm(), loader)
    norm.eval()
    assert diagnose(Norm(), loader, resamples=0, probes=False).n_samples == 500

    class Hidden(Toy):
        def __init__(self) -> None:
            pass

        def fuse(self, features: dict[str, Tensor]) -> Tensor:
            x = torch.cat(list(features.values()), 1)
            return (x - x.mean(0))[:, :3]

    with pytest.raises(InputError, match="logits of other rows moved"):
        diagnose(Hidden(), loader)

    class Detached(Hidden):
        def fuse(self, features: dict[str, Tensor]) -> Tensor:
            return torch.cat(list(features.values()), 1)[:, :3].detach()

    with pytest.raises(InputError, match="do not depend"):
        diagnose(Detached(), loader)

    class NoGradient(Hidden):
        def fuse(self, features: dict[str, Tensor]) -> Tensor:
            return checkpoint(norm, torch.cat(list(features.values()), 1), use_reentrant=True)

    with pytest.raises(InputError, match=r"the fusion has no gradients \(.*\); agop=False"):
        diagnose(NoGradient(), loader)
    assert diagnose(NoGradient(), loader, agop=False, probes=False).n_samples == 500

    class Undefined(Hidden):
        def fuse(self, features: dict[str, Tensor]) -> Tensor:
            x = torch.cat(list(features.values()), 1)
            return norm(torch.where(x.square().sum(1, True) == 0, math.nan, x))

    zeros = [(a * 0, b * 0, y) if k == 2 else (a, b, y) for k, (a, b, y) in enumerate(loader)]
    with pytest.raises(
        InputError, match=r"outputs of batch \d hold NaN or infinite values with modalities taken away by 'resample'"
    ):
        diagnose(Undefined(), zeros, agop=False)
    Undefined.forward = lambda self, batch: self.fuse(self.encode(batch))  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="NaN or infinite outputs in row 0 of the first batch"):
        diagnose(Undefined(), zeros[2:], agop=False)
    with pytest.raises(InputError, match="labels are -1 and 1"):
        diagnose(Toy(*[chain(torch.Generator(), 1)] * 2), [(a, b, (y > 1) * 2.0 - 1) for a, b, y in loader])
    toy = Toy(*[chain(torch.Generator())] * 2)
    toy.encode = lambda batch: {"all": batch[0], "audio": batch[1]}  # type: ignore[method-assign]
    with pytest.raises(InputError, match="named 'all'"):
        diagnose(toy, loader)
    head = chain(generator)
    head[0].weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match="logits hold NaN"):
        diagnose(Toy(head, head), loader)
    with pytest.raises(InputError, match="ModelAdapter"):
        mmc_fast.diagnose(head, loader)
    with pytest.raises(TypeError, match="adapter"):
        mmc_fast.diagnose(3, loader)
    with pytest.raises(InputError, match="groups"):
        diagnose(Toy(norm), loader, groups=0)
    for bad in ({"metric": "mse"}, {"absence": "zero"}, {"draws": 0}, {"absence": "model"}, {"metric": "auroc"}):
        with pytest.raises(
            InputError, match="fuse\\(features, present\\)" if "model" in bad.values() else next(iter(bad))
        ):
            diagnose(Norm(), loader, **bad)
    with pytest.raises(InputError, match="sample_rows is 0"):
        diagnose(Toy(norm), loader, sample_rows=0)
    for score in (93.0, -0.1, math.nan):
        with pytest.raises(InputError, match="not in percent"):
            diagnose(Toy(norm), loader, alone={"image": score})


def test_documented_defaults() -> None:
    """Of the options; functions of measures that take one of them by themselves have the same."""
    given = {f.name: f.default for f in fields(DiagnoseOptions)}
    assert given == {
        "metric": None, "absence": None, "draws": None, "agop": True, "groups": 16, "resamples": 100, "level": 0.95, "seed": 0,
        "reliance": True, "probes": True, "control": False, "utilisation": False, "remaining": False, "emap": False,
        "samples": False, "alone": None, "unimodal_weights": None, "initial_weight": None, "sample_rows": 4096,
        "tolerance": 1e-3, "tau": 0.5, "energy": 0.99, "ridge": 1e-6, "thresholds": THRESHOLDS,
    }  # fmt: skip
    for function in (
        blocks.numerical_rank, blocks.ranks, weights.degree_of_polysemanticity, similarity.variance_inflation,
        probes.modality_probe, reliance.train_afresh, refitted.conditional_utilisation,
    ):  # fmt: skip
        for name, parameter in inspect.signature(function).parameters.items():
            if name in given:
                assert parameter.default == given[name], (function.__name__, name)


@pytest.mark.parametrize(
    ("name", "fits", "not_any_more"),
    [
        ("groups", (1, 1024), (0, 1025)), ("draws", (1, 1024), (0, 1025)), ("resamples", (0, 100_000), (-1, 100_001)),
        ("level", (1e-9, 1 - 1e-9), (0.0, 1.0)), ("seed", (0, 2**63 - 1), (-1, 2**63)), ("sample_rows", (1,), (0,)),
        ("tolerance", (0.0, 0.999), (-1e-9, 1.0)), ("tau", (1e-9, 1.0), (0.0, 1.001)), ("energy", (1e-9, 1.0), (0.0, 1.001)),
        ("ridge", (1e-12,), (0.0, -1.0)), ("absence", (None, "mean"), ("median",)), ("metric", (None, "f1"), ("F1",)),
        ("alone", ({"a": 0.0}, {"a": 1.0}), ({"a": -0.01}, {"a": 1.01})),
    ],
)  # fmt: skip
def test_the_ends_of_what_options_may_be(name: str, fits: tuple, not_any_more: tuple) -> None:
    for value in fits:
        assert getattr(DiagnoseOptions(**{name: value}), name) == value
    for value in not_any_more:
        with pytest.raises(InputError, match=name if name != "groups" else "groups is"):
            DiagnoseOptions(**{name: value})


def test_scores_of_ones_own_need_not_lie_between_0_and_1() -> None:
    for metric, score in (("r2", -3.0), (lambda y, t: 0.0, 70.0)):
        assert DiagnoseOptions(metric=metric, alone={"a": score}).alone == {"a": score}
    with pytest.raises(InputError, match="not in percent"):
        DiagnoseOptions(metric="r2", alone={"a": 1.1})
    with pytest.raises(InputError, match="Did you mean 'groups'"):
        DiagnoseOptions().override({"group": 3})
    assert DiagnoseOptions(seed=3).override({"groups": 4}) == DiagnoseOptions(seed=3, groups=4)


def test_seven_modalities_are_scored_by_their_first_and_last_contribution(generator: torch.Generator) -> None:
    planted = planted_head(1, modalities=7, num_samples=300)
    d = diagnose(planted, planted.batches(), resamples=0, probes=False)
    assert "more than 6" in d.summary()
    assert "coalition_scores" not in d.arrays
    none, whole = d.value("score.none"), d.value("score.all")
    for v in d.verdicts:
        e = v.evidence
        assert e["shapley"] == pytest.approx((e["only"] - none + whole - e["without"]) / 2)


def test_outputs_that_no_label_names_are_told(generator: torch.Generator) -> None:
    """As where the named head is no head but a layer of it."""
    head, loader = chain(generator), batches(generator, classes=2)
    d = diagnose(Toy(head, head), loader, resamples=0, probes=False)
    assert "The labels hold 2 classes and there are 3 outputs." in d.notes


@pytest.mark.parametrize(
    ("classes", "several", "options"),
    [
        (3, False, {}),
        (2, False, {}),
        (1, False, {"metric": "accuracy"}),
        (3, True, {}),
        (3, True, {"metric": "macro_auroc"}),
    ],
)
def test_probabilities_in_place_of_logits_are_refused(classes: int, several: bool, options, generator) -> None:
    head, loader = chain(generator, classes), batches(generator, classes=max(2, classes))
    squash = nn.Sigmoid() if several or classes == 1 else nn.Softmax(1)
    if several:
        loader = [(a, b, torch.stack([y > 0, y > 1, y == 0], 1)) for a, b, y in loader]
    with pytest.raises(InputError, match="look like probabilities") as caught:
        diagnose(Toy(nn.Sequential(head, squash), nn.Sequential(head, squash)), loader, **options)
    assert "\n" not in str(caught.value)


def test_a_score_of_ones_own_that_fails(generator: torch.Generator) -> None:
    """On all rows: one line. On rows that were drawn without one of the classes: not counted."""
    head, loader = chain(generator, 2), batches(generator, classes=2)

    def auroc(y: Tensor, labels: Tensor) -> float:
        if len(labels.unique()) < 2:
            raise ValueError("one class")
        return float(roc_auc_score(labels, y[:, 1] - y[:, 0]))

    with pytest.raises(
        InputError, match=r"metric own auroc failed on outputs \[500, 1\] and labels \[500\] \(IndexError"
    ):
        diagnose(Toy(*[chain(generator, 1)] * 2), loader, metric=auroc)
    rare = [(a, b, torch.zeros_like(y)) for a, b, y in loader]
    rare[0][2][:2] = 1
    d = diagnose(Toy(head, head), rare, metric=auroc, probes=False, resamples=40)
    assert d["score.all"].low < d.value("score.all") < d["score.all"].high


@pytest.mark.parametrize(("metric", "y"), [("r2", [2.5]), ("macro_auroc", [1, 0]), ("concordance", [3, 0])])
def test_labels_that_are_all_alike(metric: str, y: list[float], generator: torch.Generator) -> None:
    head = chain(generator, 1 if metric in ("r2", "concordance") else 2)
    loader = [(a, b, torch.tensor(y).expand(len(a), -1)) for a, b, _ in batches(generator)]
    d = diagnose(Toy(head, head), loader, metric=metric, resamples=10)
    assert "all alike" in d.summary()
    assert {v.kind for v in d.verdicts} == {"undecided"}


def test_a_wide_fused_representation_is_left_out(generator: torch.Generator) -> None:
    fusion, loader = Attention(generator), batches(generator, 100)

    class Wide(Toy):
        def represent(self, features: dict[str, Tensor]) -> Tensor:
            return features["image"].repeat(1, 2000)

    d = diagnose(Wide(fusion), loader, resamples=0, probes=False, remaining=True)
    assert "The fused representation has 12000 columns" in d.summary()
    assert d.measures == diagnose(Toy(fusion), loader, resamples=0, probes=False, remaining=True).measures


def test_empty_batches_and_one_logit(generator: torch.Generator) -> None:
    head = chain(generator, 1)
    loader = batches(generator, classes=2)
    toy = Toy(head, head)
    d = diagnose(toy, loader, resamples=0, probes=False)
    more = [loader[0], tuple(t[:0] for t in loader[0]), *loader[1:]]
    assert diagnose(toy, more, resamples=0, probes=False).value("score.all") == pytest.approx(d.value("score.all"))
    image, audio, labels = whole(loader)
    with torch.no_grad():
        y = toy.fuse({"image": image, "audio": audio})[:, 0]
    assert d.value("score.all") == pytest.approx(roc_auc_score(labels, y), abs=1e-6)
    right = diagnose(toy, loader, resamples=0, probes=False, metric="accuracy").value("score.all")
    assert right == pytest.approx(float(((y > 0) == labels).double().mean()))
