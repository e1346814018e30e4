"""``mmc-fast diagnose``: a run of this project, or a model of one's own through an adapter."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mmc_fast._util.extras import require
from mmc_fast._util.names import choose
from mmc_fast.diagnose import Diagnosis, diagnose
from mmc_fast.diagnose.options import DiagnoseOptions
from mmc_fast.errors import InputError

from .base import AsJson, command, takes_data_options
from .terminal import PassDisplay, error_console, output_console, print_table


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
    save_every: float = 30.0,
) -> Diagnosis:
    """Diagnose a run, or ``weights`` behind ``adapter`` (``module:function``) on ``data``.

    The function of ``adapter`` gets the weights as a mapping of tensors and returns an adapter. Where that has a method
    ``load(data)`` it gives the batches; else ``data`` is a data set of this project and the batches are parts of it.
    Unfinished sums are kept beside the run or the weights, and a killed diagnosis goes on with them.
    """
    if (run is None) == (adapter is None):
        raise InputError("diagnose: give either --run, or --weights, --adapter and --data")
    choose("part", part, ("train", "validation", "test"))
    DiagnoseOptions().override(settings)  # before any data are read
    given = {key: value for key, value in options.items() if value is not None}
    training = None
    if run is not None:
        if weights is not None:
            raise InputError("diagnose: --weights belongs to --adapter; a run has its own")
        model, loader, training = _run_parts(run, data, part, given)
        state = state or run / f"diagnose-{part}.state"
    else:
        if weights is None or data is None or adapter is None:
            raise InputError("diagnose: --adapter needs --weights and --data too")
        model = _make(adapter, weights)
        if hasattr(model, "load"):
            loader = model.load(data)
        else:
            loader, training = _parts(data, part, given)
        state = state or weights.with_name(weights.name + ".diagnose.state")
    with PassDisplay(error_console()) as display:
        return diagnose(
            model, loader, probe_data=training, state=state, save_every=save_every, progress=display, **settings
        )


def _parts(data: str, part: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """The part of a data set to diagnose, and the part that probes train on (None where it is the same)."""
    from mmc_fast.experiments.data import load

    dataset = load(data, **options)
    return dataset.part(part), dataset.part("train") if part != "train" else None


def _run_parts(run: Path, data: str | None, part: str, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """A finished run and its parts as in :func:`_parts`."""
    from mmc_fast.experiments.training import load_run

    from .evaluate import dataset_of

    loaded = load_run(run)
    dataset = dataset_of(loaded, data, options)
    training = dataset
    if not bool((dataset.split == 0).any()):  # a cohort to test on: probes learn from the rows of the run
        training = dataset_of(loaded, None, {})
    return loaded, dataset.part(part), training.part("train") if part != "train" else None


def print_diagnosis(console: Console, diagnosis: Diagnosis, other: Diagnosis | None) -> None:
    """The summary, a table of the main numbers per modality, and what differs from ``other``."""
    rows = []
    kinds = {v.modality: v.kind for v in diagnosis.verdicts}
    shown = {
        "alone": "alone",
        "shuffled": "shuffled",
        "Shapley": "shapley",
        "use over ability": "use_index",
        "only it": "only",
        "use share": "use_share",
    }
    for name in diagnosis.modalities:
        cells = [str(diagnosis.measures.get(f"{prefix}.{name}", "–")) for prefix in shown.values()]
        rows.append([name, kinds[name], *cells])
    title = f"{diagnosis.n_samples} samples" + (f", {diagnosis.metric}" if diagnosis.metric else "")
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
    safetensors, reader = require("safetensors", extra="experiments"), require("safetensors.torch", extra="experiments")
    try:
        tensors = reader.load_file(weights)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"--weights {weights} cannot be read as safetensors ({error})") from error
    try:
        return make(tensors)
    except (RuntimeError, KeyError) as error:  # such as weights of another model
        first = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"--adapter {adapter}: it failed on {weights} ({type(error).__name__}: {first})") from error


@takes_data_options
def diagnose_command(
    run: Annotated[Path | None, typer.Option(help="Folder of a finished run.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of a model of yours, safetensors.")] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="Makes an adapter from these weights.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set, npz file, table, or what the adapter loads. (default: the run's data)")
    ] = None,
    part: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    html: Annotated[Path | None, typer.Option(help="Write the page to this file.")] = None,
    compare: Annotated[
        Path | None, typer.Option(help="An earlier diagnosis (what --json printed) to compare with.")
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also train networks without each modality, as a control.")
    ] = False,
    groups: Annotated[int, typer.Option(help="Random groups of samples, for the intervals.")] = 16,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples of them.")] = 100,
    seed: Annotated[int, typer.Option(help="Of groups, samples and probes.")] = 0,
    state: Annotated[
        Path | None, typer.Option(help="Where unfinished sums are kept. (default: beside the run or the weights)")
    ] = None,
    options: dict[str, Any] = {},  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Show which modality a model uses, which it lost, and why. A killed diagnosis goes on where it stopped."""
    other = None if compare is None else Diagnosis.from_json(compare)
    settings = {"groups": groups, "resamples": resamples, "seed": seed, "control": control}
    found = run_diagnose(run, weights, adapter, data, part=part, options=options, state=state, settings=settings)
    if other is not None:
        found.compare(other)  # refuse what cannot be compared before anything is written
    if html is not None:
        found.save_html(html, other)
    if as_json:
        typer.echo(found.to_json())
        return
    print_diagnosis(output_console(), found, other)
    if html is not None:
        typer.echo(f"Page: {html}")


COMMAND = command(diagnose_command)
