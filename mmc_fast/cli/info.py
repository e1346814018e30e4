"""``mmc-fast info``: versions, hardware, native library, data sets and environment variables."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from mmc_fast import __version__
from mmc_fast._env import VARIABLES
from mmc_fast.ops.native import describe

from .base import AsJson, command, print_json
from .terminal import output_console, print_table

PACKAGES = ("torch", "numpy", "triton", "scikit-learn", "scipy", "safetensors", "matplotlib", "typer", "rich", "pandas")


def collect_info() -> dict[str, Any]:
    """Everything that a bug report needs, as plain JSON values. "data_sets" is None without the experiments' packages."""
    return {
        "mmc_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "machine": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "native": describe(),
        "data_sets": _data_sets(),
        "environment": {
            v.name: {"value": os.environ.get(v.name), "default": v.default, "meaning": v.meaning} for v in VARIABLES
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _data_sets() -> list[dict[str, Any]] | None:
    try:
        from mmc_fast.experiments.data import available
    except ImportError:
        return None
    return [
        {"name": d.name, "title": d.title, "found": d.found, "metric": d.metric, "licence": d.licence}
        for d in available()
    ]


def print_info(console: Console, info: dict[str, Any]) -> None:
    """The same as tables."""
    cpu, native = info["cpu"], info["native"]
    rows = {
        "mmc-fast": info["mmc_fast"],
        "python": f"{info['python']} on {info['platform']}",
        "packages": ", ".join(f"{name} {number or '(not installed)'}" for name, number in info["packages"].items()),
        "processor": f"{cpu['machine']}, {cpu['capability']}, {cpu['cores']} cores, {cpu['torch_threads']} threads",
        "GPUs": ", ".join(info["gpus"]) or "none visible",
        "native library": f"runs on {native['isa']}" if native["native"] else f"not used: {native['reason']}",
    }
    for name, text in rows.items():
        console.print(Text.assemble((name, "bold"), f": {text}"))
    if info["data_sets"] is None:
        console.print("Data sets: pip install 'mmc-fast[experiments]' brings their loaders.", markup=False)
    else:
        sets = [[d["name"], "yes" if d["found"] else "no", d["metric"], d["title"]] for d in info["data_sets"]]
        print_table(console, "Data sets", ["name", "here", "metric", "what"], sets, numbers=False)
    variables = [[n, str(v["value"] or v["default"] or "–"), v["meaning"]] for n, v in info["environment"].items()]
    print_table(console, "Environment variables", ["name", "value", "meaning"], variables, numbers=False)


def info(as_json: AsJson = False) -> None:
    """Show versions, hardware, the native library, data sets and environment variables."""
    found = collect_info()
    if as_json:
        print_json(found)
    else:
        print_info(output_console(), found)


COMMAND = command(info)
