"""Packages and the native library: setuptools calls CMake, CMake calls ninja. Metadata stands in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # under --no-build-isolation the backend's folder is not on the path

import mmc_build  # noqa: E402


class CMakeBuild(build_ext):
    """Build core, operators and ``_C`` in one CMake run, and put them into the package."""

    def run(self) -> None:
        torch = mmc_build.torch_dir()
        if torch is None:
            raise RuntimeError(
                "no torch 2.10 or newer was found; install it first, or name its folder: MMC_TORCH_DIR=..."
            )
        try:
            import pybind11
        except ImportError:
            raise RuntimeError(
                "pybind11 is missing; without build isolation install it first: pip install pybind11"
            ) from None
        cmake = shutil.which("cmake")
        if cmake is None:
            raise RuntimeError("cmake is missing; without build isolation install it first: pip install cmake ninja")
        package = ROOT / "mmc_fast" if self.inplace else Path(self.build_lib).resolve() / "mmc_fast"
        build = Path(self.build_temp).resolve() / f"cmake-{sysconfig.get_config_var('SOABI')}"
        build.mkdir(parents=True, exist_ok=True)
        # a cache names the tools of the isolated environment that made it, which is gone
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        settings = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "MMC_PYTHON": "ON",
            "MMC_TESTS": "OFF",
            "MMC_TORCH_DIR": torch,
            "MMC_PYBIND11_DIR": pybind11.get_include(),
            "MMC_PYTHON_INCLUDE": sysconfig.get_path("include"),
            "MMC_MODULE_SUFFIX": sysconfig.get_config_var("EXT_SUFFIX"),
            "MMC_VERSION": self.distribution.get_version(),
            "MMC_WITH_CUDA": os.environ.get("MMC_WITH_CUDA") or "auto",
        }
        generator = []
        if ninja := shutil.which("ninja"):
            generator, settings["CMAKE_MAKE_PROGRAM"] = ["-G", "Ninja"], ninja
        flags = [f"-D{name}={value}" for name, value in settings.items()]
        self._call([cmake, "-S", str(ROOT), "-B", str(build), *generator, *flags])
        self._call([cmake, "--build", str(build), "--parallel", str(os.cpu_count() or 1)])
        staged = build / "staged"
        self._call([cmake, "--install", str(build), "--prefix", str(staged)])
        package.mkdir(parents=True, exist_ok=True)
        for file in staged.iterdir():  # replaced, not overwritten: a process that has the old one mapped keeps it
            fresh = shutil.copy(file, package / f".{file.name}.new")
            os.replace(fresh, package / file.name)

    def _call(self, command: list[str]) -> None:
        if subprocess.call(command, stdout=None if self.verbose else subprocess.DEVNULL) != 0:
            raise RuntimeError(
                f"building the native library failed in: {' '.join(command[:2])} ...; its messages are above "
                "(pip install -v shows them), and MMC_BUILD=0 installs the pure Python package"
            )


def main() -> None:
    native = mmc_build.native_wanted()
    if not native:
        print("mmc-fast: building without native kernels (no C++ compiler, or MMC_BUILD=0)", file=sys.stderr)
    setup(
        packages=[
            *find_namespace_packages(include=["mmc_fast", "mmc_fast.*"], exclude=["*.__pycache__"]),
            "mmc_fast.kernels",
            "mmc_fast.kernels.ebr",
            "mmc_fast.kernels.agop",
        ],
        package_dir={"mmc_fast.kernels": "kernels"},
        ext_modules=[Extension("mmc_fast._C", sources=[])] if native else [],
        cmdclass={"build_ext": CMakeBuild},
    )


main()
