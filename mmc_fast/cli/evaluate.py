"""``mmc-fast evaluate``: a finished run on its data, or on other data of the same shape."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmc_fast._util.names import choose
from mmc_fast._util.numbers import check_seed
from mmc_fast.experiments.data import MultimodalDataset, load
from mmc_fast.experiments.data.dataset import PARTS
from mmc_fast.experiments.training import LoadedRun, evaluate, load_run
from mmc_fast.experiments.training.parts import fingerprint
from mmc_fast.experiments.training.rows import shift_lines

from .base import AsJson, command, print_json, takes_data_options
from .scores import parse_rates, print_scores
from .terminal import output_console


def dataset_of(run: LoadedRun, data: str | None, options: dict[str, Any]) -> MultimodalDataset:
    """The named data, or those of the run, loaded as they were for the run unless an option says otherwise.

    Other data get the preprocessing of the run; where they state no split, all their rows are test rows.
    """
    info = run.results["data"]["info"]
    before = dict(info.get("loaded") or {"data": run.results["data"]["name"]})
    if "loaded" not in info:
        before |= {name: info.get(name) for name in ("task", "variant", "nan_policy")}
    source = before.pop("data")
    given = {key: value for key, value in options.items() if value is not None}
    purpose = "training"
    if data is not None and Path(data).resolve() != Path(source).resolve():
        before.pop("split_seed", None)  # it drew the parts of the run, not of another cohort
        before.pop("columns", None)
        purpose = "scoring" if run.preprocessing is not None else "training"
    source = source if data is None else data
    return load(source, **(before | given), preprocessing=run.preprocessing, purpose=purpose)


@takes_data_options
def evaluate_command(
    run: Annotated[Path, typer.Option(help="Folder of a finished run.")],
    data: Annotated[
        str | None, typer.Option(help="Other data of the same modalities. (default: the run's data)")
    ] = None,
    part: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    rates: Annotated[
        str | None, typer.Option(help="Missing rates, such as 0.1,0.4. (default: those of the run)")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the masks. (default: the run's seed)")] = None,
    options: dict[str, Any] = {},  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Score a finished run on complete data and at missing rates."""
    choose("part", part, PARTS)
    wanted = parse_rates(rates)
    if seed is not None:
        check_seed(seed)
    loaded = load_run(run)
    dataset = dataset_of(loaded, data, options)
    same = fingerprint(dataset) == loaded.results["data"]["fingerprint"]
    scores = evaluate(
        loaded.model,
        dataset,
        part=part,
        rates=loaded.config.rates if wanted is None else tuple(wanted),
        seed=loaded.results["seed"] if seed is None else seed,
        unimodal=loaded.unimodal,
        reliance=same,  # it holds modalities at means over training rows, which other data do not have
        rates_modality=loaded.config.rates_modality,
    )
    label = loaded.results["label"]
    if as_json:
        about = {"schema_version": loaded.results["schema_version"], "run": str(run), "label": label}
        about |= {"data": {"name": dataset.name, "modalities": dataset.modalities}, "same_data": same}
        about |= {key: dataset.info[key] for key in ("differences", "shift") if key in dataset.info}
        print_json(about | {"scores": scores})
        return
    print_scores(output_console(), f"{label} on {dataset.name}", scores, dataset.modalities)
    if not same:
        typer.echo("These are not the data of the run; they are scaled as its training data were.", err=True)
        for line in shift_lines(dataset.info):
            typer.echo(line, err=True)


COMMAND = command(evaluate_command)
