"""The label rules for npz files and arrays, and what they need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmc_fast.errors import InputError
from mmc_fast.experiments import data
from mmc_fast.experiments.data import MultimodalDataset

N = np.arange(90)


@pytest.mark.parametrize(
    ("y", "meta", "kind", "classes", "labels"),
    [
        (np.array(["eel", "cat", "dog"])[N % 3], {}, "classification", ["cat", "dog", "eel"], (N % 3 + 2) % 3),
        (N % 3 + 1, {"kind": "classification"}, "classification", ["1", "2", "3"], N % 3),
        (np.eye(3)[N % 3], {"classes": ["u", "v", "w"]}, "classification", ["u", "v", "w"], N % 3),
        (N % 3, {"classes": ["u", "v", "w"]}, "classification", ["u", "v", "w"], N % 3),
        (N, {"kind": "regression"}, "regression", ["y"], N[:, None]),
        (N / 7, {}, "regression", ["y"], N[:, None] / 7),
        (np.stack([N % 2, N % 3], 1) > 0, {"kind": "multilabel"}, "multilabel", ["y_0", "y_1"], np.stack([N % 2, N % 3], 1) > 0),
        (np.stack([N + 1, N % 2], 1), {"kind": "survival"}, "survival", ["y_0", "y_1"], np.stack([N + 1, N % 2], 1)),
    ],
)  # fmt: skip
def test_npz_files_follow_the_rules_of_tables(tmp_path: Path, y, meta, kind, classes, labels):
    path = tmp_path / "d.npz"
    x = np.random.default_rng(0).normal(size=(90, 3))
    np.savez(path, x_a=x, y=y, split=N // 30, meta=json.dumps(meta))
    found = data.load(path)
    assert (found.task.kind, found.classes) == (kind, classes)
    np.testing.assert_allclose(found.labels.numpy(), labels)


@pytest.mark.parametrize(
    ("label", "kind", "message"),
    [
        (N, None, 'kind = "classification" or kind = "regression"'),
        (np.where(N == 4, np.nan, N), "regression", "empty in row 4"),
        (np.array(["x", "1"])[N % 2], "regression", "is 'x' in row 0; a target is a finite number"),
        (np.stack([N, N % 2], 1), None, r'kind = "survival"'),
        (np.stack([N, N % 3], 1), "survival", "is 2 in row 2; each of several labels is 0 or 1"),
        (N, "survival", "2 label columns, time and event"),
        (np.stack([N - 1.0, N % 2], 1), "survival", "a time is at least 0"),
        (N % 2, "regresion", "Did you mean 'regression'"),
    ],
)
def test_labels_that_are_refused_name_row_and_repair(label, kind, message):
    with pytest.raises(InputError, match=message) as caught:
        MultimodalDataset.from_arrays({"a": np.ones((90, 1))}, label, kind=kind, split=0)
    assert "\n" not in str(caught.value)


def test_arrays_need_no_pandas():
    code = """
import sys
sys.modules.update(dict.fromkeys(("pandas", "pyarrow", "torchsurv")))  # importing one raises ImportError
import numpy as np
from mmc_fast.experiments.data import MultimodalDataset
x, n = {"a": np.arange(60.0)[:, None]}, np.arange(60)
one = MultimodalDataset.from_arrays(x, np.array(["u", "v"] * 30), id=[f"p{i}" for i in n], split=0)
two = MultimodalDataset.from_arrays(x, np.stack([n + 1, n % 2], 1), kind="survival", split=["train", "test", "validation"] * 20)
print(one.classes, two.task.kind)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "['u', 'v'] survival", done.stderr
