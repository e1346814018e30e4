"""``mmc-fast info``: versions, hardware, native library, data sets and environment variables."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from typing import Any

import torch
from rich.console import Console

from mmc_fast import __version__
from mmc_fast._env import VARIABLES
from mmc_fast.experiments.data import available
from mmc_fast.ops.native import describe

from .terminal import print_table

__all__ = ["collect_info", "print_info"]


def collect_info() -> dict[str, Any]:
    """Everything that a bug report needs, as plain JSON values."""
    packages = ("torch", "numpy", "scikit-learn", "scipy", "safetensors", "matplotlib", "typer", "rich", "jinja2")
    return {
        "mmc_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "cpu": {
            "machine": platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "native": describe(),
        "data_sets": [
            {"name": d.name, "title": d.title, "found": d.found, "metric": d.metric, "licence": d.licence}
            for d in available()
        ],
        "environment": {
            v.name: {"value": os.environ.get(v.name), "default": v.default, "meaning": v.meaning} for v in VARIABLES
        },
    }


def print_info(console: Console, info: dict[str, Any]) -> None:
    """The same as tables."""
    cpu, native = info["cpu"], info["native"]
    rows = [
        ["mmc-fast", info["mmc_fast"]],
        ["python", f"{info['python']} on {info['platform']}"],
        ["packages", ", ".join(f"{name} {number}" for name, number in info["packages"].items())],
        ["processor", f"{cpu['machine']}, {cpu['capability']}, {cpu['cores']} cores, {cpu['torch_threads']} threads"],
        ["GPUs", ", ".join(info["gpus"]) or "none visible"],
        ["native library", f"runs on {native['isa']}" if native["native"] else f"not used: {native['reason']}"],
    ]
    for name, text in rows:
        console.print(f"[bold]{name}[/bold]: ", end="")
        console.print(text, markup=False)
    print_table(
        console,
        "Data sets",
        ["name", "here", "metric", "what"],
        [[d["name"], "yes" if d["found"] else "no", d["metric"], d["title"]] for d in info["data_sets"]],
        numbers=False,
    )
    print_table(
        console,
        "Environment variables",
        ["name", "value", "meaning"],
        [[name, str(v["value"] or v["default"] or "–"), v["meaning"]] for name, v in info["environment"].items()],
        numbers=False,
    )
