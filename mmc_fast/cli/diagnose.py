"""``mmc-fast diagnose``: a run of this project, or a model of one's own through an adapter."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmc_fast.diagnose import Diagnosis, diagnose
from mmc_fast.errors import InputError
from mmc_fast.experiments.data import load
from mmc_fast.experiments.training import evaluate, load_run

from .evaluate import dataset_of
from .terminal import PassDisplay, error_console, print_table

__all__ = ["print_diagnosis", "run_diagnose"]


def run_diagnose(
    run: Path | None,
    weights: Path | None,
    adapter: str | None,
    data: str | None,
    *,
    part: str,
    options: Mapping[str, Any],
    state: Path | None,
    settings: Mapping[str, Any],
) -> Diagnosis:
    """Diagnose a run, or ``weights`` behind ``adapter`` (``module:function``) on ``data``.

    The function of ``adapter`` gets the weights as a mapping of tensors and returns an adapter. Where that has a method
    ``load(data)`` it gives the batches; else ``data`` is a data set of this project and the batches are parts of it.
    Unfinished sums are kept beside the run or the weights, and a killed diagnosis goes on with them.
    """
    if (run is None) == (adapter is None):
        raise InputError("diagnose: give either --run, or --weights, --adapter and --data")
    model: Any
    loader: Any
    if run is not None:
        if weights is not None:
            raise InputError("diagnose: --weights belongs to --adapter; a run has its own")
        model = load_run(run)
        dataset = dataset_of(model.results, data, dict(options))
        loader = dataset.part(part)
        training = dataset.part("train") if part != "train" else None
        if model.unimodal is not None:
            scored = evaluate(model.model, dataset, part=part, rates=(), unimodal=model.unimodal)["reliance"]
            known = {name: entry["unimodal"] for name, entry in scored.items() if entry["unimodal"] is not None}
            settings = {"alone": known} | dict(settings)
        state = state or run / f"diagnose-{part}.state"
    else:
        if weights is None or data is None or adapter is None:
            raise InputError("diagnose: --adapter needs --weights and --data too")
        model = _make(adapter, weights)
        training = None
        if hasattr(model, "load"):
            loader = model.load(data)
        else:
            given = {key: value for key, value in options.items() if value is not None}
            dataset = load(data, **given)
            loader = dataset.part(part)
            training = dataset.part("train") if part != "train" else None
        state = state or weights.with_name(weights.name + ".diagnose.state")
    with PassDisplay(error_console()) as display:
        return diagnose(model, loader, probe_data=training, state=state, progress=display, **settings)


def print_diagnosis(console: Console, diagnosis: Diagnosis, other: Diagnosis | None) -> None:
    """The summary, a table of the main numbers per modality, and what differs from ``other``."""
    rows = []
    kinds = {v.modality: v.kind for v in diagnosis.verdicts}
    shown = {
        "use share": "use_share",
        "alone": "alone",
        "without it": "without",
        "only it": "only",
        "Shapley": "shapley",
    }
    for name in diagnosis.modalities:
        cells = [str(diagnosis.measures.get(f"{prefix}.{name}", "–")) for prefix in shown.values()]
        rows.append([name, kinds[name], *cells])
    title = f"{diagnosis.samples} samples" + (f", {diagnosis.metric}" if diagnosis.metric else "")
    print_table(console, title, ["modality", "verdict", *shown], rows)
    console.print(diagnosis.summary(), markup=False)
    if other is not None:
        console.print("\nThis diagnosis minus the other:", markup=False)
        console.print(str(diagnosis.compare(other)), markup=False)


def _make(adapter: str, weights: Path) -> Any:
    module_name, colon, function = adapter.partition(":")
    if not colon or not module_name or not function:
        raise InputError(f"--adapter {adapter!r}: write module:function, such as mypkg.models:make_adapter")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, so that a script beside the caller is found
    try:
        make = getattr(importlib.import_module(module_name), function)
    except ImportError as error:
        raise InputError(f"--adapter {adapter!r}: {module_name} cannot be imported ({error})") from error
    except AttributeError:
        raise InputError(f"--adapter {adapter!r}: {module_name} has no {function}") from None
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise InputError(f"--weights {weights} cannot be read as safetensors ({error})") from error
    try:
        return make(tensors)
    except (RuntimeError, KeyError) as error:  # such as weights of another model
        first = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"--adapter {adapter}: it failed on {weights} ({type(error).__name__}: {first})") from error
