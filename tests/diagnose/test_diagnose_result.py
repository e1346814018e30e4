"""What a diagnosis can do: uncertainty, JSON, comparison, summary, plots, and what its document says of it."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diagnose_models import example
from matplotlib.axes import Axes
from scipy import stats

import mmc_fast
from mmc_fast.diagnose import THRESHOLDS, Diagnosis, diagnose
from mmc_fast.diagnose.groups import draw_weights
from mmc_fast.diagnose.plot import PLOTS
from mmc_fast.diagnose.result import Measure, around
from mmc_fast.diagnose.verdict import KINDS
from mmc_fast.errors import InputError
from mmc_fast.testing import planted_head


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    return example()


def test_every_measure_of_data_has_its_uncertainty(found: Diagnosis) -> None:
    fixed = {"collision_bound", "collision_exact", "feature_capacity", "neuron_overlap", "score.chance"}
    fixed |= {"ece.all", "brier.all"}
    fixed |= {"attribution_entropy", "foreign_noise"}  # of the sampled rows
    for name, m in found.measures.items():
        if name in fixed or name.startswith("weight_classifier"):
            assert m.low is None, name
        else:
            assert m.low <= m.value <= m.high, name
            assert m.error is None or m.error >= 0, name
    # The standard error of an accuracy is the binomial one.
    accuracy = found["score.all"]
    assert accuracy.error == pytest.approx(math.sqrt(accuracy.value * (1 - accuracy.value) / 2000), rel=0.6)


def test_every_interval_has_the_level_that_was_asked_for() -> None:
    """But for that of the index, by which verdicts go."""
    planted = planted_head(4, sharing=0.5, jitter=0.1, num_samples=400)
    options = {"control": True, "utilisation": True, "remaining": True, "emap": True, "resamples": 30}
    half, most = (diagnose(planted, planted.batches(), level=level, **options) for level in (0.5, 0.95))
    kinds = set()
    for name, m in half.measures.items():
        wide = most[name]
        assert (m.value, m.error) == (wide.value, wide.error)
        if name.startswith("use_index") or m.low is None:
            assert m == wide, name
        elif m.error > 1e-9 and (wide.low, wide.high) != (m.low, m.high):
            assert wide.low <= m.low <= m.high <= wide.high, name
            kinds.add(name.split(".")[0])
        else:
            assert m.error <= 1e-9 or m.value in (m.low, m.high), name
    assert kinds >= {
        "agop", "use_share", "score", "only", "shuffled", "shapley", "alone", "probe_features", "retrained_all", "need", "pid",
        "distillation", "utilisation", "remaining", "emap", "output_share", "silent_failures", "alignment",
    }  # fmt: skip
    assert Measure(1.0, 0.5, 1 - 0.5 * stats.t.ppf(0.9, 4), 1.2) == around(1.0, 0.5, 0.8, 4, (-9.0, 1.2))
    assert around(0.0, 2.0, 0.8).high == pytest.approx(2 * stats.norm.ppf(0.9))
    for name in ("pid.unique.a", "distillation.a"):
        half_width = most[name].error * stats.t.ppf(0.975, 15)
        assert most[name].high - most[name].value == pytest.approx(half_width), "of the 16 groups of its jackknife"
    for name in ("alone.a", "utilisation.a"):
        m = half[name]
        assert m.high - m.value == pytest.approx(m.error * stats.norm.ppf(0.75))


def test_resamples_come_from_the_seed(seed: int) -> None:
    draws = draw_weights(16, 4000, seed)
    assert (draws.sum(1) == 16).all()
    assert draws.std(0) == pytest.approx(math.sqrt(15 / 16), rel=0.1)
    np.testing.assert_array_equal(draws, draw_weights(16, 4000, seed))
    assert (draws != draw_weights(16, 4000, seed + 1)).any()


def test_agreement_of_resamples_is_in_the_verdict(found: Diagnosis) -> None:
    for verdict in found.verdicts:
        assert 0 <= verdict.evidence["agreement"] <= 1
    planted = planted_head(4, ignored=1)
    lost = diagnose(planted, planted.batches()).verdicts[1]
    assert (lost.kind, lost.evidence["agreement"]) == ("collapsed", 1.0)


def test_frame_and_samples(found: Diagnosis, monkeypatch) -> None:
    with_samples = example(samples=True, control=False, resamples=0, probes=False)
    monkeypatch.setitem(sys.modules, "pandas", None)
    for ask in (found.to_frame, with_samples.samples):
        with pytest.raises(ImportError, match=r"^pandas is not installed; run: pip install pandas$"):
            ask()
    monkeypatch.undo()
    pytest.importorskip("pandas", reason="pandas is not installed")
    frame = found.to_frame()
    assert list(frame.columns) == ["value", "error", "low", "high"]
    for name, m in found.measures.items():
        row = frame.loc[name]
        assert [None if v != v else v for v in row] == [m.value, m.error, m.low, m.high]
    with pytest.raises(InputError, match="samples=True"):
        found.samples()
    found = with_samples
    samples = found.samples()
    assert len(samples) == found.settings["sample_rows"]
    assert (samples.label == samples.predicted).mean() == pytest.approx(found.value("score.all"))
    for name in "ab":
        silent = samples[f"silent_failure.{name}"]
        by_hand = (samples.label == samples.predicted) & (samples[f"predicted_without.{name}"] != samples.label)
        by_hand &= samples[f"confidence_without.{name}"] >= 0.9
        assert (silent == by_hand).mean() > 0.999  # confidences are rounded in the table
        assert silent.mean() == pytest.approx(found.value(f"silent_failures.{name}"))
    first = samples[["silent_failure.a", "silent_failure.b"]].any(axis=1).astype(int)
    assert first.is_monotonic_decreasing
    unlabelled = planted_head(4)
    bare = diagnose(unlabelled, unlabelled.batches(), reliance=False, resamples=0, probes=False)
    with pytest.raises(InputError, match="diagnose labelled classes"):
        bare.samples()


def test_sets_of_modalities_and_shares_of_outputs(found: Diagnosis) -> None:
    rows = found.arrays["subsets"]
    assert [row["accuracy"] for row in rows] == sorted(row["accuracy"] for row in rows)
    by_set = {tuple(row["present"]): row for row in rows}
    assert set(by_set) == {("a",), ("b",), ("a", "b")}
    assert by_set["a", "b"]["accuracy"] == pytest.approx(found.value("score.all"))
    assert by_set["a", "b"]["ece"] == pytest.approx(found.value("ece.all"))
    assert by_set["a",]["accuracy"] == pytest.approx(found.value("only.a"), abs=0.03)  # one draw of several
    shares = [found.value(f"output_share.{name}") for name in "ab"]
    assert sum(shares) == pytest.approx(1)


def test_shares_of_outputs_need_no_labels(found: Diagnosis) -> None:
    planted = planted_head(4, sharing=0.5, jitter=0.1)

    class Unlabelled:
        head, encode, fuse = planted.head, planted.encode, planted.fuse

        def labels(self, batch):
            return None

    d = diagnose(Unlabelled(), planted.batches(), resamples=20)
    assert "score.all" not in d.measures
    for name in "ab":
        assert d.value(f"output_share.{name}") == pytest.approx(found.value(f"output_share.{name}"), abs=0.02)
    assert "share of outputs" in d.to_html()


def test_json_round_trip(found: Diagnosis, tmp_path) -> None:
    text = found.to_json(tmp_path / "d.json")
    assert Diagnosis.from_json(text) == found
    assert Diagnosis.from_json(tmp_path / "d.json") == found
    values = json.loads(text)
    assert values["schema_version"] == 3
    assert values["settings"]["thresholds"]["signal"] > 0
    for bad, message in (
        ('{"kind": "demo"}', "schema_version: Field required"),
        ("{", "cannot be used"),
        ("{}", "Field required"),
        (text.replace('"schema_version": 3', '"schema_version": 99'), "Input should be 3, got 99"),
        (tmp_path / "absent.json", "cannot be read"),
        (text.replace('"modalities"', '"modality"'), "modalities: Field required"),
        (text.replace(f'"n_samples": {found.n_samples}', '"n_samples": 7'), "was changed after it was written"),
        (text.replace('"verdicts": [', '"verdicts": [7, '), "verdicts.0: Input should be a valid dictionary"),
        (text.replace('"error": null', '"error": NaN'), "holds NaN"),
        (text.replace('"version"', '"versions": 1, "version"'), "was changed after it was written"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            Diagnosis.from_json(bad)
        assert "\n" not in str(caught.value)


def test_comparison(found: Diagnosis) -> None:
    planted = planted_head(4, ignored=1, jitter=0.1)
    other = diagnose(planted, planted.batches())
    compared = found.compare(other)
    a, b, gap = compared.rows["use_share.b"]
    assert gap.value == pytest.approx(a.value - b.value)
    assert gap.low > 0
    assert (gap.high - gap.low) / 2 == pytest.approx(math.hypot((a.high - a.low) / 2, (b.high - b.low) / 2))
    assert gap.error == pytest.approx(math.hypot(a.error, b.error))
    assert compared.rows["collision_bound"][2] == Measure(0.0), "no interval where one side has none"
    told = [str(m) for m in (Measure(None), Measure(0.12345), Measure(0.5, 0.1, 0.4, 0.61234))]
    assert told == ["–", "0.123", "0.5 [0.4, 0.612]"]
    assert compared.changed_verdicts["b"][1] == "collapsed"
    assert re.search(r"use_share\.b .* \*$", str(compared), re.MULTILINE)
    assert not found.compare(found).changed_verdicts
    assert all(gap.value == 0 for _, _, gap in found.compare(found).rows.values())
    three = planted_head(4, modalities=3)
    with pytest.raises(InputError, match="same modalities"):
        found.compare(diagnose(three, three.batches(), resamples=0, probes=False))
    with pytest.raises(TypeError, match="give another Diagnosis"):
        found.compare(found.to_json())  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="use_share"):
        found["nonsense"]


def test_measures_of_a_second_model(found: Diagnosis, tmp_path) -> None:
    more = found.with_measures({"prefix_gap.b": mmc_fast.diagnose.Measure(0.12, 0.02, 0.08, 0.16)})
    assert more.value("prefix_gap.b") == 0.12
    assert "prefix_gap.b" not in found.measures
    assert Diagnosis.from_json(more.to_json()) == more
    assert "prefix_gap.b 0.12" in more.save_html(tmp_path / "m.html").read_text(encoding="utf-8")


def test_summary_and_plots(found: Diagnosis) -> None:
    text = found.summary()
    for name in found.modalities:
        assert f"{found.value(f'shuffled.{name}'):.3f} with the {name} of other samples" in text
    assert f"mean entropy {found.value('neuron_entropy'):.2f}" in text
    for kind in PLOTS:
        axes = found.plot(kind)
        assert isinstance(axes, Axes)
        axes.figure.canvas.draw()
        assert found.plot(kind, axes) is axes
    with pytest.raises(InputError, match="Did you mean 'shapley'"):
        found.plot("shaply")
    heights = [bar.get_height() for bar in found.plot("use_shares").patches]
    assert heights == pytest.approx([found.value("use_share.a"), found.value("use_share.b")])


DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "guides" / "diagnose.md").read_text(encoding="utf-8")


def test_the_document_names_every_measure(found: Diagnosis) -> None:
    named = set(re.findall(r"^\| (`.*?) \|", DOCUMENT, re.MULTILINE))
    listed = {part.strip("`., …") for row in named for part in re.findall(r"`[^`]+`", row)}
    for measure in found.measures:
        general = re.sub(r"\.[ab]$", ".M", re.sub(r"^agop\.\d+", "agop.L", measure))
        ending = "." + measure.split(".")[-1]
        assert general in listed or any(ending == "." + name.lstrip(".") for name in listed), measure
    for kind in (*PLOTS, *KINDS):
        assert kind in DOCUMENT, kind
    for name, value in vars(THRESHOLDS).items():
        assert f"{name} {value:g}" in DOCUMENT, name


class Rescaled:
    """The planted model with one encoder scaled and the head undoing it."""

    labels = latents = None

    def __init__(self, planted, scale: float) -> None:
        self.planted, self.scale, self.labels, self.latents = planted, scale, planted.labels, planted.encode
        self.head = copy.deepcopy(planted.head)
        width = next(iter(planted.encode(next(iter(planted.batches()))).values())).shape[1]
        self.head[0].weight.data[:, :width] /= scale

    def encode(self, batch):
        features = dict(self.planted.encode(batch))
        first = next(iter(features))
        return features | {first: features[first] * self.scale}

    def inputs(self, batch):
        return self.planted.encode(batch)

    def fuse(self, features, present=None):
        if present is not None:
            features = {n: x * present[:, i, None] for i, (n, x) in enumerate(features.items())}
        return self.head(torch.cat(list(features.values()), 1))


def test_what_the_document_says_of_rescaled_encoders() -> None:
    """Every measure that it says does not change, does not; every one that it says does, does; and each of them is seen."""
    planted = planted_head(4, sharing=0.5, jitter=0.1)
    random = torch.Generator().manual_seed(4)
    unimodal = {name: torch.randn(20, 8, generator=random) for name in "ab"}
    options = {
        "resamples": 0,
        "control": True,
        "utilisation": True,
        "remaining": True,
        "emap": True,
        "unimodal_weights": unimodal,
    }
    plain, scaled = (diagnose(Rescaled(planted, s), planted.batches(), **options) for s in (1.0, 10.0))
    said = {}
    for row in re.findall(r"^\| (`.*?) \|.*\| (yes|no) \|$", DOCUMENT, re.MULTILINE):
        said |= {part.strip("`").lstrip("."): row[1] == "yes" for part in re.findall(r"`[^`]+`", row[0])}
    changed, seen = {}, set()
    for name, m in plain.measures.items():
        general = re.sub(r"\.[ab]$", ".M", re.sub(r"^agop\.\d+", "agop.L", name))
        key = general if general in said else name.split(".")[-1]
        kind = said.get(key)
        assert kind is not None, name
        seen.add(key)
        same = scaled.value(name) == pytest.approx(m.value, rel=0.02, abs=0.005)
        assert same or kind, f"{name}: {m.value} became {scaled.value(name)}"
        changed[general] = changed.get(general, False) or not same
    moved = {name for name, by in changed.items() if by}
    assert seen == set(said)
    assert moved == {name for name in changed if said.get(name, said.get(name.split(".")[-1]))} - {
        "weight_classifier.accuracy",  # of the unimodal weights, and the rank of this head is full at any scale
        "polysemanticity_degree",
    }
