"""What a diagnosis can do: uncertainty, JSON, comparison, summary, plots, and what its document says of it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diagnose_models import example
from matplotlib.axes import Axes

import mmc_fast
from mmc_fast.diagnose import THRESHOLDS, Diagnosis, diagnose
from mmc_fast.diagnose.groups import draw_weights
from mmc_fast.diagnose.plot import PLOTS
from mmc_fast.errors import InputError
from mmc_fast.testing import planted_head


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    return example()


def test_every_measure_of_data_has_its_uncertainty(found: Diagnosis) -> None:
    fixed = {"collision_bound", "collision_exact", "feature_capacity", "neuron_overlap", "score.chance"}
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


def test_resamples_come_from_the_seed(seed: int) -> None:
    draws = draw_weights(16, 4000, seed)
    assert (draws.sum(1) == 16).all()
    assert draws.std(0) == pytest.approx(math.sqrt(15 / 16), rel=0.1)
    np.testing.assert_array_equal(draws, draw_weights(16, 4000, seed))
    assert (draws != draw_weights(16, 4000, seed + 1)).any()


def test_agreement_of_resamples_is_in_the_verdict(found: Diagnosis) -> None:
    for verdict in found.verdicts:
        assert 0 <= verdict.evidence["agreement"] <= 1
        assert verdict.evidence["index_low"] <= verdict.evidence["index"] <= verdict.evidence["index_high"]
    planted = planted_head(4, ignored=1)
    lost = diagnose(planted, planted.batches()).verdicts[1]
    assert (lost.kind, lost.evidence["agreement"]) == ("collapsed", 1.0)


def test_json_round_trip(found: Diagnosis, tmp_path) -> None:
    text = found.to_json(tmp_path / "d.json")
    assert Diagnosis.from_json(text) == found
    assert Diagnosis.from_json(tmp_path / "d.json") == found
    values = json.loads(text)
    assert values["schema_version"] == 2
    assert values["settings"]["thresholds"]["index"] > 0
    for bad, message in (
        ('{"kind": "demo"}', "is no diagnosis"),
        ("{", "cannot be read"),
        (text.replace('"schema_version": 2', '"schema_version": 99'), "reads 2"),
        (tmp_path / "absent.json", "cannot be read"),
        ('{"kind": "diagnosis"}', "schema version None"),
        ('{"kind": "diagnosis", "schema_version": 2}', "no whole diagnosis"),
        ('{"kind": "diagnosis", "schema_version": 2, "measures": 3, "verdicts": []}', "no whole diagnosis"),
        (text.replace('"modalities"', '"modality"'), "no whole diagnosis"),
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
        assert f"Use over ability {found.value(f'use_index.{name}'):.2f}" in text
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


def test_the_document_runs_and_names_what_there_is(tmp_path, monkeypatch, found: Diagnosis) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "diagnose.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/diagnose.md", "exec"), {})
    assert Diagnosis.from_json(tmp_path / "before.json").modalities == {"image": 16, "audio": 16}
    assert (tmp_path / "before.html").is_file()
    named = set(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))
    listed = {part.strip("`., …") for row in named for part in re.findall(r"`[^`]+`", row)}
    for measure in found.measures:
        general = re.sub(r"\.[ab]$", ".M", re.sub(r"^agop\.\d+", "agop.L", measure))
        ending = "." + measure.split(".")[-1]
        assert general in listed or any(ending == "." + name.lstrip(".") for name in listed), measure
    thresholds = found.settings["thresholds"]
    for name in vars(THRESHOLDS):
        assert f"{thresholds[name]:g}" in text, name
