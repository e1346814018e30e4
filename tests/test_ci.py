"""What CI runs: stages in order with their budgets, a failure that ends it, and the clone that has nothing beside it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / ".ci" / "run").is_file():
    pytest.skip("CI is part of the source tree only", allow_module_level=True)


def ci(tmp_path: Path, make: str, date: str = 'exec /bin/date "$@"') -> subprocess.CompletedProcess[str]:
    """Run ``.ci/run`` with a ``make`` and a ``date`` of our own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in (("make", make), ("date", date)):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run([ROOT / ".ci" / "run"], env={**os.environ, "PATH": path}, capture_output=True, text=True)


def test_every_stage_runs_and_its_time_stands_beside_its_budget(tmp_path):
    done = ci(tmp_path, 'echo "ran $*"')
    assert done.returncode == 0, done.stderr
    ran = re.findall(r"^ran (.+)$", done.stdout, re.MULTILINE)
    assert ran[:3] == ["setup", "lint", "typecheck"]
    assert {"test", "test-bare", "test-core", "sanitize", "compare-smoke", "gpu-check", "docs", "notebooks"} <= set(ran)
    table = re.findall(r"^make (.+?) +\d+:\d\d +(\S+) *$", done.stdout, re.MULTILINE)
    assert [name for name, _ in table] == ran
    assert sum(int(budget) for _, budget in table if budget != "-") <= 45
    assert "over" not in done.stdout


def test_a_stage_over_its_budget_is_told_and_fails_nothing(tmp_path):
    clock = tmp_path / "clock"
    tick = f'echo x >> "{clock}"; echo $(($(wc -l < "{clock}") * 600))'  # every look at the clock is 10 minutes later
    done = ci(tmp_path, "true", tick)
    assert done.returncode == 0, done.stderr
    lines = dict(re.findall(r"^make (\S+) .*10:00 +\S+ *(.*)$", done.stdout, re.MULTILINE))
    assert lines["lint"] == "over its budget"
    assert lines["test"] == lines["setup"] == ""
    assert re.search(r"^all .* over the wall of 90$", done.stdout, re.MULTILINE)


def test_a_failure_ends_the_run_and_is_named(tmp_path):
    done = ci(tmp_path, 'echo "ran $1"; [ "$1" != sanitize ]')
    assert done.returncode == 1
    assert re.findall(r"^ran (.+)$", done.stdout, re.MULTILINE) == [
        "setup",
        "lint",
        "typecheck",
        "docs",
        "notebooks",
        "sanitize",
    ]
    assert re.search(r"^make sanitize +FAILED$", done.stdout, re.MULTILINE)


PURE = ("tests/nn", "tests/agop", "tests/integrations", "tests/ops/ebr")  # what runs without the native library
LIBRARIES = "list(__import__('pathlib').Path('mmc_fast').glob('*.so'))"
INSIDE = """
import os, pathlib
import mmc_fast

def test_nothing_is_beside():
    here = pathlib.Path(__file__).resolve().parents[2]
    assert "MMC_DATA" not in os.environ
    assert [p.name for p in here.parent.iterdir()] == [here.name]
    assert pathlib.Path(mmc_fast.__file__).resolve().parents[1] == here
    assert (here / "mmc_fast" / "library.so").read_text() == "built"
    assert mmc_fast.GREEN
"""


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_bare_clone_is_that_of_the_last_commit(tmp_path):
    root = tmp_path / "checkout"
    (tmp_path / "shared").mkdir()
    for folder in ("tools", "tests/cli", *PURE, "mmc_fast"):
        (root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "test_bare.sh", root / "tools")
    (root / "mmc_fast" / "__init__.py").write_text("GREEN = True\n")
    (root / "tests" / "cli" / "test_inside.py").write_text(INSIDE)
    for n, folder in enumerate(PURE):
        (root / folder / f"test_pure_{n}.py").write_text(f"def test_{n}():\n    assert not {LIBRARIES}\n")
    (root / ".gitignore").write_text("*.so\n__pycache__/\n")

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=root, check=True)

    def bare(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["tools/test_bare.sh", sys.executable, "1", *words]
        temporary = tmp_path / "tmp"
        temporary.mkdir(exist_ok=True)
        env = {**os.environ, "MMC_DATA": str(tmp_path), "TMPDIR": str(temporary)}
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        assert list(temporary.glob("mmc-fast-bare.*")) == [], "the clone stays behind"
        return done

    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "a")
    (root / "mmc_fast" / "library.so").write_text("built")
    done = bare()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert "4 passed" in done.stdout
    assert "uncommitted" not in done.stdout

    (root / "mmc_fast" / "__init__.py").write_text("GREEN = False\n")
    done = bare("tests/cli/test_inside.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 uncommitted changes are not in the clone" in done.stdout

    git("commit", "-q", "-a", "-m", "b")
    assert bare().returncode == 1
