"""Tests in this folder run kernels in Triton's CPU interpreter, which must be chosen before Triton is imported.

Elsewhere in the suite Triton compiles, and one process cannot do both: a file of this folder is therefore collected as
one test that runs the file in a process of its own. With ``TRITON_INTERPRET=1`` set the tests are collected as usual:
``TRITON_INTERPRET=1 pytest tests/kernels/test_agop_triton.py -k masks``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class _Child(pytest.Item):
    def runtest(self) -> None:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("Triton is not installed: pip install 'mmc-fast[triton]'")
        version = importlib.metadata.version("triton")
        if tuple(map(int, version.split(".")[:2])) < (3, 7):
            pytest.skip(f"Triton {version} is installed and the kernels need 3.7 or newer")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(self.path)]
        seed = self.config.getoption("--seed")
        if seed is not None:
            command += ["--seed", str(seed)]
        if self.config.getoption("maxfail"):
            command.append(f"--maxfail={self.config.getoption('maxfail')}")
        if self.config.getoption("markexpr"):
            command += ["-m", self.config.getoption("markexpr")]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=environment, cwd=self.config.rootpath, capture_output=True, text=True)
        if done.returncode not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            raise _ChildFailed(done.stdout[-12000:] + done.stderr[-2000:])

    def repr_failure(self, excinfo, style=None):
        if isinstance(excinfo.value, _ChildFailed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self):
        return self.path, None, f"{self.path.name} in the interpreter"


class _ChildFailed(Exception):
    pass


class _File(pytest.Module):
    def collect(self) -> Iterator[pytest.Item]:
        yield _Child.from_parent(self, name="interpreted")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if INTERPRETED else _File.from_parent(parent, path=module_path)
