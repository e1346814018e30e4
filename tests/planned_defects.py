"""Break the code in named ways and see that the tests notice: ``python tests/planned_defects.py [--only NAME]``.

Each entry of ``planned_defects.toml`` names a file, a text that occurs in it exactly once, its replacement and the
tests that must turn red. The tree is copied, the defect applied to the copy, the tests run there. Exit code 1 if a
defect survives or no longer applies. To add one: append a table to the TOML file, nothing else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
LEAVE_OUT = (".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")


@dataclass(frozen=True)
class Defect:
    name: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]
    build: bool = False  # compile the native library of the copy before the tests run


def load() -> list[Defect]:
    with open(Path(__file__).with_suffix(".toml"), "rb") as f:
        entries = tomllib.load(f)["defect"]
    return [Defect(**{**e, "tests": tuple(e["tests"])}) for e in entries]


def problem(defect: Defect) -> str | None:
    """Why the defect cannot be applied to the tree, or None."""
    path = ROOT / defect.file
    if not path.exists():
        return f"{defect.file} does not exist"
    count = path.read_text().count(defect.find)
    if count != 1:
        return f"its text occurs {count} times in {defect.file}; it must occur once"
    missing = [t for t in defect.tests if not (ROOT / t.split("::")[0]).exists()]
    return f"no such test file: {missing[0]}" if missing else None


def run(defect: Defect) -> tuple[str, str]:
    """(verdict, detail); verdict is "caught", "SURVIVED" or "BROKEN"."""
    why = problem(defect)
    if why:
        return "BROKEN", why
    with tempfile.TemporaryDirectory(prefix="defect-") as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEAVE_OUT))
        target = copy / defect.file
        target.write_text(target.read_text().replace(defect.find, defect.replace))
        env = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        env.setdefault("MMC_DATA", str(ROOT.parent / "shared" / "data"))
        if defect.build:
            built = subprocess.run(
                [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=copy, env=env, capture_output=True
            )
            if built.returncode:
                return "BROKEN", "the copy does not compile: " + built.stderr.decode()[-400:]
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *defect.tests],
            cwd=copy, env=env, capture_output=True, text=True,
        )  # fmt: skip
    lines = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if result.returncode == 1 and lines and lines[0].startswith("FAILED"):
        return "caught", lines[0].removeprefix("FAILED ").split(" - ")[0]
    if result.returncode == 0:
        return "SURVIVED", "all of its tests are green"
    return "BROKEN", (lines or (result.stdout + result.stderr).strip().splitlines() or ["no output"])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="run the defects whose name contains this text")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    defects = [d for d in load() if not options.only or any(text in d.name for text in options.only)]
    start, bad = time.monotonic(), 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for defect, (verdict, detail) in zip(defects, pool.map(run, defects), strict=True):
            bad += verdict != "caught"
            print(f"{verdict:9} {defect.name:45} {detail}", flush=True)
    print(f"{len(defects) - bad} of {len(defects)} defects caught in {time.monotonic() - start:.0f} s")
    return 1 if bad or not defects else 0


if __name__ == "__main__":
    sys.exit(main())
