"""The ways to install: pure Python, in isolation, without it, editable, from a source distribution; CMake alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from mmc_fast.ops import native as library

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ["_C", "libmmc_core.so", "libmmc_ops.so"]
HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler: c++, g++ or clang++")
needs_pybind11 = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import pybind11"], capture_output=True).returncode != 0,
    reason="pybind11 is not installed, and without isolation the build needs it",
)
TORCH = str(Path(torch.__file__).parent)

# what a user does first: counts by whichever backend is there, the kernels room, the reason for a missing library
_USE = """
import json, sys, torch, mmc_fast, mmc_fast.kernels
from mmc_fast.ops import native as library
from mmc_fast.ops.agop import op as agop
c, f = torch.zeros(3, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
ran = agop.relu_coactivation_update(torch.ones(70, 2), torch.ones(3, 2), None, c, f)
print(json.dumps({"ran": ran, "sum": int(c.sum()), "reason": library.unavailable_reason(),
                  "file": mmc_fast.__file__, "kernels": mmc_fast.kernels.__file__}))
"""


@pytest.fixture
def sources(tmp_path):
    """A copy of the source tree as version control would give it, without anything that was built."""
    copy = tmp_path / "sources"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for folder in ("mmc_fast", "csrc", "cmake", "kernels"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignore)
    for pattern in ("*.py", "*.toml", "*.in", "*.md", "*.cff", "LICENSE", "CMakeLists.txt"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, copy)
    return copy


def run(command, cwd, **environment):
    clean = {
        k: v for k, v in os.environ.items() if k not in ("MMC_BUILD", "MMC_CPU_ISA", "MMC_WITH_CUDA", "PYTHONPATH")
    }
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def pip_wheel(source, out, *flags, **environment):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "-w", out, *flags, source], source.parent, **environment)
    (wheel,) = out.glob("*.whl")
    folder = out / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return wheel, folder


def use(folder, cwd, python=sys.executable, **environment):
    import json

    done = run([python, "-c", _USE], cwd, PYTHONPATH=str(folder), **environment)
    return json.loads(done.stdout), done.stderr


def natives(folder):
    return [name for name in NATIVE if list((folder / "mmc_fast").glob(f"{name}*"))]


def check_native(folder, cwd, **environment):
    assert natives(folder) == NATIVE
    got, _ = use(folder, cwd, **environment)
    assert got["ran"] == "cpp", got
    assert got["sum"] == 420
    assert str(folder) in got["file"]
    assert Path(got["kernels"]).parent == folder / "mmc_fast" / "kernels"


@needs_pybind11
def test_pure_python_wheel_works_and_says_what_is_missing(sources, tmp_path):
    wheel, folder = pip_wheel(sources, tmp_path / "out", "--no-build-isolation", MMC_BUILD="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert natives(folder) == []
    for part in (
        "py.typed",
        "kernels/agop/coactivation.py",
        "experiments/data/embedded/mfeat.npz",
        "diagnose/template/style.css",
        "experiments/configs/methods/muse.toml",
    ):
        assert (folder / "mmc_fast" / part).is_file(), part
    assert not (folder / "kernels").exists()
    got, _ = use(folder, tmp_path)
    assert (got["ran"], got["sum"]) == ("eager", 420)
    assert "was not built" in got["reason"]


def test_checkout_has_the_kernels_room(tmp_path):
    got, _ = use(ROOT, tmp_path)
    assert Path(got["kernels"]).parent == ROOT / "kernels"


@pytest.mark.skipif(library.unavailable_reason() is not None, reason=library.unavailable_reason() or "")
@pytest.mark.parametrize("damage", ["missing core", "not a library", "other version"])
def test_a_failed_load_names_its_causes_once(sources, tmp_path, damage):
    for name in NATIVE:
        for file in (ROOT / "mmc_fast").glob(f"{name}*"):
            shutil.copy(file, sources / "mmc_fast")
    if damage == "missing core":
        (sources / "mmc_fast/libmmc_core.so").unlink()
    elif damage == "not a library":
        (sources / "mmc_fast/libmmc_ops.so").write_bytes(b"text")
    else:
        init = sources / "mmc_fast/__init__.py"
        init.write_text(init.read_text().replace('__version__ = "', '__version__ = "9.'))
    got, stderr = use(sources, tmp_path)
    assert (got["ran"], got["sum"]) == ("eager", 420)
    assert stderr.count("RuntimeWarning: mmc_fast: the native library") == 1, stderr
    assert "build again" in got["reason"] if damage == "other version" else "likely causes" in got["reason"]
    assert "\n" not in got["reason"]


_HOOKS = """
import sys, os
sys.path.insert(0, sys.argv[1])
import mmc_build
print(mmc_build.torch_dir(), mmc_build.get_requires_for_build_wheel(), "torch" in sys.modules, sep="|")
"""
# the same in an environment whose only torch is too old: 2.9 < 2.10 as numbers, not as text
_OLD_TORCH = """
import sys, os
sys.path.insert(0, sys.argv[1])
import mmc_build
from types import SimpleNamespace
mmc_build.sysconfig = SimpleNamespace(get_path=lambda *a, old=sys.argv[2], **k: old)
mmc_build.site = SimpleNamespace(getusersitepackages=lambda old=sys.argv[2]: old)
mmc_build.sys = SimpleNamespace(path=[], base_prefix="")
print(mmc_build.torch_dir(), mmc_build.get_requires_for_build_wheel(), "torch" in sys.modules, sep="|")
"""


def ask_backend(script, *arguments, **environment):
    """Return the torch that the build backend finds, what it requires, and whether it imported torch."""
    done = run([sys.executable, "-c", script, *arguments], arguments[0], **environment)
    return done.stdout.splitlines()[-1].split("|")


@needs_compiler
def test_backend_finds_torch_by_its_files(sources):
    found, needs, imported = ask_backend(_HOOKS, sources)
    assert Path(found).resolve() == Path(TORCH).resolve()
    assert "torch" not in needs
    assert imported == "False"


@needs_compiler
def test_backend_asks_for_torch_only_where_there_is_none(sources, tmp_path):
    old = tmp_path / "old"
    (old / "torch/include/torch/csrc/stable").mkdir(parents=True)
    (old / "torch/include/torch/csrc/stable/library.h").touch()
    (old / "torch/version.py").write_text("__version__ = '2.9.1+cpu'\n")
    found, needs, _ = ask_backend(_OLD_TORCH, sources, old)
    assert found == "None"
    assert "torch>=2.10" in needs
    found, needs, _ = ask_backend(_OLD_TORCH, sources, old, MMC_TORCH_DIR=TORCH)
    assert found == TORCH
    assert "torch" not in needs
    _, needs, _ = ask_backend(_OLD_TORCH, sources, old, MMC_BUILD="0")
    assert needs == "[]"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MMC_BUILD": "yes"}, "MMC_BUILD=yes; allowed are 0"),
        ({"MMC_TORCH_DIR": "/nowhere"}, "MMC_TORCH_DIR=/nowhere holds no torch package"),
        ({"MMC_BUILD": "1", "CXX": "no-such-compiler"}, "MMC_BUILD=1 but no C++ compiler was found"),
    ],
)
def test_wrong_wishes_fail_with_one_line(sources, environment, message):
    done = subprocess.run(
        [sys.executable, "-c", _HOOKS, str(sources)], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_cmake_alone_builds_and_tests_the_core(sources, tmp_path):
    ninja = ["-G", "Ninja"] if shutil.which("ninja") else []
    run(["cmake", "-S", sources, "-B", tmp_path / "b", *ninja], tmp_path)
    run(["cmake", "--build", tmp_path / "b", "--parallel", "2"], tmp_path)
    assert "100% tests passed" in run(["ctest", "--test-dir", tmp_path / "b"], tmp_path).stdout


@pytest.mark.slow
@needs_compiler
@needs_pybind11
def test_wheel_without_isolation(sources, tmp_path):
    _, folder = pip_wheel(sources, tmp_path / "out", "--no-build-isolation", MMC_BUILD="1")
    check_native(folder, tmp_path)
    got, _ = use(folder, tmp_path, MMC_CPU_ISA="base")
    assert got["ran"] == "cpp"


@pytest.mark.slow
@needs_compiler
def test_isolated_wheel_does_not_install_torch(sources, tmp_path):
    log = tmp_path / "log.txt"
    _, folder = pip_wheel(sources, tmp_path / "out", "--log", log, MMC_BUILD="1")
    check_native(folder, tmp_path)
    assert "Collecting torch" not in log.read_text()


@pytest.mark.slow
@needs_compiler
@needs_pybind11
def test_source_distribution_builds_a_wheel(sources, tmp_path):
    hook = "import mmc_build; print(mmc_build.build_sdist('dist'))"
    (sources / "dist").mkdir()
    name = run([sys.executable, "-c", hook], sources, PYTHONPATH=str(sources)).stdout.split()[-1]
    unpacked = tmp_path / "sdist"
    shutil.unpack_archive(sources / "dist" / name, unpacked)
    (tree,) = unpacked.iterdir()
    _, folder = pip_wheel(tree, tmp_path / "out", "--no-build-isolation", MMC_BUILD="1")
    check_native(folder, tmp_path)


@pytest.mark.slow
@needs_compiler
@needs_pybind11
def test_editable_install_in_an_environment_of_its_own(sources, tmp_path):
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).stdout.strip())
    (site / "outer.pth").write_text(
        str(Path(TORCH).parent) + "\n"
    )  # torch and pip of the environment that runs the tests
    flags = ["--no-deps", "--no-build-isolation", "--ignore-installed", "--editable"]
    run([python, "-m", "pip", "install", *flags, sources], tmp_path, MMC_BUILD="1", MMC_TORCH_DIR=TORCH)
    assert natives(sources) == NATIVE
    got, _ = use(tmp_path, tmp_path, python=python)
    assert got["ran"] == "cpp", got
    assert str(sources) in got["file"]
    assert Path(got["kernels"]).parent == sources / "kernels"
