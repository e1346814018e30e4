"""What loading does to values: standardisation, NaN policies, absence, against plain NumPy in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import arrays, edited, write

from mmc_fast.experiments import data
from mmc_fast.experiments.data import raw


def with_gaps(seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """x_a with a constant column (1), one never measured in train (2), NaN in column 0, and absent rows."""
    rng = np.random.default_rng(seed)
    base = arrays(seed)
    x = rng.normal(rng.normal(size=5) * 10, rng.uniform(0.01, 100, 5), (90, 5))
    x[:, 1] = 7.25
    x[60:, 1] += rng.normal(size=30)
    x[:54, 2] = np.nan
    x[rng.permutation(54)[:20], 0] = np.nan
    x[70, 3] = np.nan
    present = rng.random(90) < 0.8
    present[0] = True
    x[0] = [1.0, 7.25, np.nan, 2.0, 3.0]
    base["x_a"] = x
    return base, x, present


@pytest.mark.parametrize("policy", ["mean", "indicator"])
@pytest.mark.parametrize("standardise", [True, False])
def test_against_plain_numpy(policy: str, standardise: bool, seed: int, tmp_path: Path) -> None:
    base, x, present = with_gaps(seed)
    path = write(tmp_path / "d.npz", {**base, "present_a": present})
    got = data.load(path, nan_policy=policy, standardise=standardise)

    rows = present & (base["split"] == 0)
    expected = np.zeros((90, 5))
    for j in (0, 3, 4):  # the columns that carry something
        measured = x[rows, j][~np.isnan(x[rows, j])]
        filled = np.where(np.isnan(x[:, j]), measured.mean(), x[:, j])
        expected[:, j] = (filled - measured.mean()) / measured.std() if standardise else filled
    expected[:, 1] = 0.0 if standardise else x[:, 1]
    if policy == "indicator":
        expected = np.column_stack([expected, ~np.isnan(x[:, 0])])
    expected[~present] = 0.0
    np.testing.assert_allclose(got.features["a"].numpy(), expected, rtol=1e-5, atol=1e-5)
    assert got.features["a"].dtype == torch.float32
    np.testing.assert_array_equal(got.present.numpy(), np.column_stack([present, np.ones(90, bool)]))
    extra = ["a_0 measured"] if policy == "indicator" else []
    assert got.feature_names["a"] == [f"a_{j}" for j in range(5)] + extra
    assert got.info["never_measured"] == {"a": ["a_2"]}
    assert got.info["constant"] == {"a": 1}


def test_statistics_come_from_train_only(seed: int, tmp_path: Path) -> None:
    """Whatever stands in validation and test rows, train rows come out the same."""
    base = arrays(seed)
    first = data.load(write(tmp_path / "one.npz", base))
    for view in ("x_a", "x_b"):
        base[view] = edited(base[view], base["split"] > 0, np.random.default_rng(seed + 1).normal(50, 9))
    second = data.load(write(tmp_path / "two.npz", base))
    for name in first.modalities:
        train = first.split == 0
        torch.testing.assert_close(first.features[name][train], second.features[name][train], rtol=0, atol=0)
        assert not torch.equal(first.features[name][~train], second.features[name][~train])


def test_absent_rows_are_never_read(seed: int, tmp_path: Path) -> None:
    base = arrays(seed)
    present = np.random.default_rng(seed).random(90) < 0.7
    clean = data.load(write(tmp_path / "clean.npz", {**base, "present_a": present}))
    for garbage in (np.nan, np.inf, 1e30):
        dirty = {**base, "present_a": present, "x_a": edited(base["x_a"], ~present, garbage)}
        got = data.load(write(tmp_path / "dirty.npz", dirty))
        torch.testing.assert_close(got.features["a"], clean.features["a"], rtol=0, atol=0)


def test_rows_with_nothing_measured_are_absent(seed: int, tmp_path: Path) -> None:
    base = arrays(seed)
    gone = [3, 60, 80]
    base["x_b"] = edited(base["x_b"], gone, np.nan)
    got = data.load(write(tmp_path / "d.npz", base))
    assert torch.nonzero(~got.present[:, 1]).flatten().tolist() == gone
    assert not got.features["b"][gone].any()
    assert got.info["absent"] == {"b": round(3 / 90, 6)}


def test_nan_and_absence_look_the_same_to_a_model(seed: int, tmp_path: Path) -> None:
    """A row with nothing measured is the zero vector, whether it was declared present or not."""
    base = arrays(seed)
    base["x_b"] = edited(edited(base["x_b"], (slice(0, 30), 1), np.nan), 40, np.nan)
    for present in (np.ones(90, bool), np.arange(90) != 40):
        path = write(tmp_path / "d.npz", {**base, "present_b": present})
        got = data.load(path, nan_policy="indicator")
        assert not got.features["b"][40].any()


def test_chunks_do_not_matter(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _, present = with_gaps(seed)
    path = write(tmp_path / "d.npz", {**base, "present_a": present})
    whole = data.load(path, nan_policy="indicator").features["a"]
    monkeypatch.setattr(raw, "_CHUNK", 7)
    torch.testing.assert_close(data.load(path, nan_policy="indicator").features["a"], whole)


def test_large_offsets_keep_their_digits(tmp_path: Path) -> None:
    """Seconds since 1970 of one day: float32 alone would round them to 128 s."""
    seconds = 1.7e9 + np.arange(90) * 10.0
    base = {**arrays(), "x_a": np.column_stack([seconds, seconds])}
    got = data.load(write(tmp_path / "d.npz", base)).features["a"][:, 0].numpy()
    train = seconds[arrays()["split"] == 0]
    np.testing.assert_allclose(got, (seconds - train.mean()) / train.std(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "int64", "float16", "float32", "float64", ">f4"])
def test_types_of_features(dtype: str, tmp_path: Path) -> None:
    values = (np.arange(360).reshape(90, 4) % 7 > 2).astype(dtype)
    got = data.load(write(tmp_path / "d.npz", {"x_a": values}))
    train = values[:54].astype(np.float64)
    expected = (values.astype(np.float64) - train.mean(0)) / train.std(0)
    np.testing.assert_allclose(got.features["a"].numpy(), expected, rtol=1e-5)


def test_loading_touches_no_global_generator(tmp_path: Path) -> None:
    path = write(tmp_path / "d.npz")
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    dataset = data.load(path)
    data.mcar(dataset.present, 0.4, torch.Generator().manual_seed(0))
    data.synthetic(60)
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
