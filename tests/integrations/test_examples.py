"""The scripts of examples/ run, and do what they say."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def example(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_game(result: dict[str, float], prefix: str = "") -> None:
    assert 0.1 < result[f"{prefix}loss_md_over_entropy"] < 3
    assert 0 <= result[f"{prefix}psi_accuracy"] <= 1
    assert result[f"{prefix}grad_norm_psi"] > 0
    assert result[f"{prefix}grad_norm_encoders"] > 0


def test_plain_loop(capsys):
    result = example("plain_loop").train(epochs=4, seed=1)
    assert result["accuracy"] > 0.85
    check_game(result)
    assert result["loss_md"] / math.log(6) == pytest.approx(result["loss_md_over_entropy"], rel=1e-4)
    assert "EBR on Classifier: applied" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "way"), [("clip", "one call for all heads"), ("llava", r"rows differ: image \[16, 4\], text \[16, 6\]")]
)
def test_transformers(capsys, name, way):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    result = example(name).train(steps=30, seed=1)
    assert result["last_loss"] < result["first_loss"] - 0.3
    check_game(result)
    assert re.search(way, capsys.readouterr().out)


def test_image_and_table(capsys):
    result = example("image_and_table").train(steps=60, seed=1)
    assert result["accuracy"] > 0.9
    assert 0.3 < result["accuracy_without_table"] < 0.7  # the picture knows half of the answer
    assert result["difference_from_file"] == 0
    check_game(result)
    assert "one call for all heads" in capsys.readouterr().out
