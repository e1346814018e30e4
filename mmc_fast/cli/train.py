"""``mmc-fast train``: one run on one data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from mmc_fast._util.numbers import check_seed
from mmc_fast.experiments.data import load
from mmc_fast.experiments.report.trained import probe, without_effect
from mmc_fast.experiments.training import TrainConfig, train
from mmc_fast.experiments.training.processes import check_device, first_process

from .base import AsJson, command, print_json, takes_data_options
from .scores import print_scores
from .settings import collect_settings
from .terminal import RunDisplay, error_console, output_console


def print_results(console: Console, results: dict[str, Any], folder: Path) -> None:
    """Scores, the modality probe where there was an adversary, and the folder."""
    data = results["data"]
    title = f"{results['label']} on {data['name']}, seed {results['seed']}"
    if without_effect(results):
        title = f"{results['method']} (adversary without effect) on {data['name']}, seed {results['seed']}"
    print_scores(console, title, results["scores"], data["modalities"])
    found = probe(results)
    if found is not None:
        console.print(
            f"A post-hoc probe names the modality of a latent with balanced accuracy "
            f"{found['balanced_accuracy']:.3f} (chance {found['chance']:.3f})."
        )
    console.print(f"Results, model and predictions: {folder}", markup=False)


@takes_data_options
def train_command(
    data: Annotated[
        str,
        typer.Option(
            help="Name of a data set (see `mmc-fast info`), or path of an npz file, a table or a folder of tables."
        ),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            help="vanilla, dropout, kd, ebr, robust, recommended or ebr-best. (default: what the configuration says, else ebr)"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Everything random is derived from it.")] = 0,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings of the run.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as ebr.reversal=0.1; repeatable."),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run, new or empty. (default: runs/DATA-METHOD-SEED)")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in the folder.")] = False,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="Continue where the folder holds this run, begin where it holds none.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    options: dict[str, Any] = {},  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Train one model, select its best epoch and score it on test data."""
    values = collect_settings(config, method, epochs, assignments or [])
    settings = TrainConfig.from_dict(values)
    check_seed(seed)
    check_device(device)
    dataset = load(data, **options)
    # Kept with the results, so that `evaluate` finds the data again.
    dataset = replace(dataset, info={**dataset.info, "loaded": {"data": data} | options})
    forms = [options[name] for name in ("task", "variant") if name in options]
    called = values.get("method", settings.method)
    folder = run_dir or Path("runs") / "-".join([dataset.name, *forms, called, str(seed)])
    again: bool | Literal["auto"] = "auto" if auto_resume else resume
    with RunDisplay(error_console()) as display:
        result = train(dataset, settings, seed=seed, run_dir=folder, resume=again, progress=display, device=device)
    if not first_process():
        return
    if as_json:
        print_json(result.results | {"run_dir": str(folder)})
    else:
        print_results(output_console(), result.results, folder)


COMMAND = command(train_command)
