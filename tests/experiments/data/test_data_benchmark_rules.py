"""The rules of the benchmark loaders on small made-up files, for machines that do not have the real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmc_fast.errors import InputError
from mmc_fast.experiments import data

ROWS = 200
SPLIT = np.repeat([0, 1, 2], [120, 40, 40]).astype(np.uint8)


def clinical(rng: np.random.Generator, views: tuple[str, ...]) -> dict[str, np.ndarray]:
    content: dict[str, np.ndarray] = {"split": SPLIT, "patient": np.arange(ROWS, dtype=np.int32)}
    for view in views:
        content[f"x_{view}"] = rng.integers(1, 5, (ROWS, 2)).astype(np.float32)
        content[f"names_{view}"] = np.array(["u", "v"])
    return content


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MMC_DATA", str(tmp_path))
    return tmp_path


def test_eicu_views_with_nothing_in_them_are_absent(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    views = ("demographics", "bedside", "labs", "bp_series", "diagnoses", "treatments", "medications", "history")
    content = clinical(rng, views)
    content["x_labs"][[1, 150]] = np.nan
    content["x_bedside"][2] = 0.0  # measured, and zero
    content["x_medications"][[3, 160]] = 0.0
    content["y_hospital_death"] = np.tile([0, 1], 100).astype(np.uint8)
    content["y_hospital_death"][10:13] = 255
    content["y_unit_death"] = np.zeros(ROWS, np.uint8)
    content["y_unit_death"][[20, 21]] = [1, 255]
    content["y_icu_readmit"] = np.tile([1, 0], 100).astype(np.uint8)
    np.savez(folder / "eicu_demo.npz", **content)

    death = data.load("eicu_demo")
    rows = np.delete(np.arange(ROWS), [10, 11, 12])
    np.testing.assert_array_equal(death.ids, rows)
    np.testing.assert_array_equal(death.labels, rows % 2)
    absent = [(int(rows[n]), death.modalities[i]) for n, i in np.argwhere(~death.present.numpy())]
    assert absent == [(1, "labs"), (3, "medications"), (150, "labs"), (160, "medications")]

    back = data.load("eicu_demo", task="readmission")
    rows = np.delete(np.arange(ROWS), [20, 21])
    np.testing.assert_array_equal(back.ids, rows)
    np.testing.assert_array_equal(back.labels, 1 - rows % 2)


def test_diabetes_death_does_not_see_the_disposition(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    views = ("demographics", "admission", "utilisation_labs", "diagnoses", "medications", "disposition")
    content = clinical(rng, views)
    content["eligible"] = (np.arange(ROWS) % 5 > 0).astype(np.uint8)
    content["y_died"] = np.tile([0, 1], 100).astype(np.uint8)
    content["y_readmit"] = (np.arange(ROWS) % 3).astype(np.uint8)
    np.savez(folder / "diabetes130.npz", **content)

    death = data.load("diabetes130", task="death")
    assert "disposition" not in death.modalities
    np.testing.assert_array_equal(death.labels, content["y_died"])
    with pytest.raises(InputError, match="Unknown modality 'disposition'"):
        data.load("diabetes130", task="death", modalities=["disposition"])

    back = data.load("diabetes130")
    rows = np.flatnonzero(content["eligible"])
    assert back.modalities == list(views)
    np.testing.assert_array_equal(back.ids, rows)
    np.testing.assert_array_equal(back.labels, rows % 3 == 2)


def test_mimic_readmission_leaves_out_the_dead(folder: Path, seed: int) -> None:
    content = clinical(np.random.default_rng(seed), ("demographics", "diagnoses", "procedures", "medications", "labs"))
    content["y_death"] = (np.arange(ROWS) % 4 == 0).astype(np.uint8)
    content["y_readmit30"] = (np.arange(ROWS) % 3 == 1).astype(np.uint8)
    np.savez(folder / "mimic4_demo.npz", **content)
    rows = np.flatnonzero(content["y_death"] == 0)
    back = data.load("mimic4_demo", task="readmission")
    np.testing.assert_array_equal(back.ids, rows)
    np.testing.assert_array_equal(back.labels, rows % 3 == 1)
    np.testing.assert_array_equal(data.load("mimic4_demo").labels, content["y_death"])


def test_avmnist_variants_take_their_own_pairs(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    content = {
        "image": rng.integers(0, 256, (ROWS, 28, 28), dtype=np.uint8),
        "image_pca_coef": rng.normal(size=(ROWS, 4)).astype(np.float32),
        "audio_bank": rng.integers(0, 256, (ROWS, 20, 20), dtype=np.uint8),
        "audio_babble": rng.integers(0, 256, (ROWS, 20, 20), dtype=np.uint8),
        "audio_index": np.arange(ROWS, dtype=np.int16),
        "audio_index_speaker": np.arange(ROWS, dtype=np.int16)[::-1].copy(),
        "label": (np.arange(ROWS) % 10).astype(np.uint8),
        "split": SPLIT,
    }
    np.savez(folder / "avmnist.npz", **content)
    for variant, audio, image in (
        ("plain", content["audio_bank"], content["image"]),
        ("speaker", content["audio_bank"][::-1], content["image"]),
        ("hard", content["audio_babble"], content["image_pca_coef"]),
    ):
        got = data.load("avmnist", variant=variant, standardise=False)
        np.testing.assert_array_equal(got.features["audio"], audio.reshape(ROWS, 400))
        np.testing.assert_array_equal(got.features["image"], image.reshape(ROWS, -1))
    assert data.load("avmnist").info["variant"] == "plain"
    with pytest.raises(InputError, match=r"Unknown variant of avmnist 'hrad'.*Did you mean 'hard'"):
        data.load("avmnist", variant="hrad")
