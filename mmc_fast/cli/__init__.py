"""The command line ``mmc-fast``: parses, calls, prints. What a command does is in ``mmc_fast.cli``."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, TypeVar

import typer

from mmc_fast import __version__
from mmc_fast.errors import InputError

__all__ = ["app", "main"]

app = typer.Typer(
    name="mmc-fast",
    help="Explicit basis reallocation and modality-collapse diagnosis for PyTorch.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

BAD_INPUT, INTERRUPTED, FAILED = 2, 130, 1
Command = TypeVar("Command", bound=Callable[..., None])


def main() -> None:
    """Entry point of the console script."""
    app()


def _clean(command: Command) -> Command:
    """Turn what a user can cause into one line on standard error and an exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                command(*args, **kwargs)
        except InputError as error:
            _stop(str(error), BAD_INPUT)
        except OSError as error:
            _stop(f"{error.filename or 'file'}: {error.strerror or error}", BAD_INPUT)
        except KeyboardInterrupt as error:
            _stop(str(error) or "interrupted", INTERRUPTED)
        except RuntimeError as error:
            if type(error).__module__.startswith("mmc_fast"):
                _stop(str(error), FAILED)  # such as a run whose loss became NaN
            raise

    return wrapped  # type: ignore[return-value]


def _say(message: str) -> None:
    typer.echo(f"mmc-fast: {' '.join(message.split())}", err=True)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _say(f"warning: {message}")


def _stop(message: str, code: int) -> None:
    _say(message)
    raise typer.Exit(code)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1, allow_nan=False))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmc-fast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Task = Annotated[str | None, typer.Option(help="Which labels, for data with several tasks.")]
Variant = Annotated[str | None, typer.Option(help="Which form of the data set, for sets with several.")]
NanPolicy = Annotated[str | None, typer.Option(help="What happens to NaN in the data: error, mean or indicator.")]
MemoryBudget = Annotated[
    str | None, typer.Option(help="Map the features of an npz file into memory where they exceed this, such as 2GB.")
]
SplitSeed = Annotated[int | None, typer.Option(help="Draw a split with this seed, for a file without one.")]


@app.command()
@_clean
def demo(
    out: Annotated[Path, typer.Option(help="Folder that is written; an earlier demo there is replaced.")] = Path(
        "runs/demo"
    ),
    workers: Annotated[int, typer.Option(help="Processes with one thread each.")] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smoke run: one seed, few epochs, numbers without meaning.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over where an interrupted demo could be continued.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train vanilla, modality dropout, KD and two forms of EBR on two data sets; write tables, figures, a report."""
    from mmc_fast.cli.demo import print_demo, run_demo_command
    from mmc_fast.cli.terminal import output_console
    from mmc_fast.experiments.training.demo import DemoPlan

    plan = DemoPlan.smoke() if quick else DemoPlan()
    results, findings = run_demo_command(plan, out, workers=workers, fresh=fresh)
    if as_json:
        _print_json({key: value for key, value in results.items() if key != "runs"} | {"out": str(out)})
    else:
        print_demo(output_console(), findings, out, quick)


@app.command()
@_clean
def train(
    data: Annotated[str, typer.Option(help="Name of a data set (see `mmc-fast info`) or path of an npz file.")],
    method: Annotated[
        str | None,
        typer.Option(help="vanilla, dropout, kd, ebr or robust. [default: what the configuration says, else ebr]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Everything random is derived from it.")] = 0,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with settings of the run.")] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="One setting, such as ebr.reversal=0.1; repeatable."),
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run, new or empty. [default: runs/DATA-METHOD-SEED]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in the folder.")] = False,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="Continue where the folder holds this run, begin where it holds none.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    task: Task = None,
    variant: Variant = None,
    nan_policy: NanPolicy = None,
    split_seed: SplitSeed = None,
    memory_budget: MemoryBudget = None,
    as_json: AsJson = False,
) -> None:
    """Train one model, select its best epoch and score it on test data."""
    from mmc_fast.cli.settings import build_config
    from mmc_fast.cli.terminal import output_console
    from mmc_fast.cli.train import print_results, run_train
    from mmc_fast.experiments.training.processes import first_process

    settings = build_config(config, method, epochs, assignments or [])
    options: dict[str, Any] = {"task": task, "variant": variant, "nan_policy": nan_policy, "split_seed": split_seed}
    options["memory_budget"] = memory_budget
    again: bool | Literal["auto"] = "auto" if auto_resume else resume
    results = run_train(data, settings, seed=seed, run_dir=run_dir, resume=again, device=device, options=options)
    if not first_process():
        return
    if as_json:
        _print_json(results)
    else:
        print_results(output_console(), results)


@app.command()
@_clean
def evaluate(
    run: Annotated[Path, typer.Option(help="Folder of a finished run.")],
    data: Annotated[
        str | None, typer.Option(help="Other data of the same modalities. [default: the run's data]")
    ] = None,
    part: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    rates: Annotated[
        str | None, typer.Option(help="Missing rates, such as 0.1,0.4. [default: those of the run]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the masks. [default: the run's seed]")] = None,
    task: Task = None,
    variant: Variant = None,
    nan_policy: NanPolicy = None,
    split_seed: SplitSeed = None,
    memory_budget: MemoryBudget = None,
    as_json: AsJson = False,
) -> None:
    """Score a finished run on complete data and at missing rates."""
    from mmc_fast.cli.evaluate import parse_rates, run_evaluate
    from mmc_fast.cli.scores import print_scores
    from mmc_fast.cli.terminal import output_console

    options: dict[str, Any] = {"task": task, "variant": variant, "nan_policy": nan_policy, "split_seed": split_seed}
    options["memory_budget"] = memory_budget
    results = run_evaluate(run, data, part=part, rates=parse_rates(rates), seed=seed, options=options)
    if as_json:
        _print_json(results)
        return
    name, modalities = results["data"]["name"], results["data"]["modalities"]
    print_scores(output_console(), f"{results['label']} on {name}", results["scores"], modalities)
    if not results["same_data"]:
        note = "These are not the data of the run; they are standardised by their own train part."
        typer.echo(note, err=True)


@app.command()
@_clean
def diagnose(
    run: Annotated[Path | None, typer.Option(help="Folder of a finished run.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of a model of yours, safetensors.")] = None,
    adapter: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="Makes an adapter from these weights.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set, npz file, or what the adapter loads. [default: the run's data]")
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
        Path | None, typer.Option(help="Where unfinished sums are kept. [default: beside the run or the weights]")
    ] = None,
    task: Task = None,
    variant: Variant = None,
    nan_policy: NanPolicy = None,
    split_seed: SplitSeed = None,
    as_json: AsJson = False,
) -> None:
    """Show which modality a model uses, which it lost, and why. A killed diagnosis goes on where it stopped."""
    from mmc_fast.cli.diagnose import print_diagnosis, run_diagnose
    from mmc_fast.cli.terminal import output_console
    from mmc_fast.diagnose import Diagnosis

    other = None if compare is None else Diagnosis.from_json(compare)
    options = {"task": task, "variant": variant, "nan_policy": nan_policy, "split_seed": split_seed}
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


@app.command()
@_clean
def compare(
    methods: Annotated[str, typer.Option(help="Rows, separated by commas: methods, or TOML files of your own.")] = (
        "vanilla,unimodal,consistency,late,transformer,kd,ebr-paper,ebr-robust,shaspec,muse"
    ),
    data: Annotated[
        str, typer.Option(help="Data, separated by commas: data sets, npz files, or TOML files with a budget.")
    ] = "mfeat,support2,avmnist-hard",
    seeds: Annotated[int, typer.Option(help="Number of seeds: 0, 1, ...")] = 5,
    rates: Annotated[
        str | None,
        typer.Option(help="Missing rates, such as 0.1,0.4; none for complete data only. [default: .1,.2,.3,.4,.7]"),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Budget of every method. [default: that of the data]")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the grid; a grid there is continued.")] = Path("runs/compare"),
    jobs: Annotated[int, typer.Option(help="Processes with one thread each.")] = 2,
    tune: Annotated[
        str, typer.Option(help="Settings: auto (stored choice, else a search), always (search), never (no search).")
    ] = "auto",
    reference: Annotated[
        str | None, typer.Option(help="Row that the others are tested against. [default: vanilla, else the first]")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Only compute this finished cell again and compare; exit code 1 if different.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods with equal budgets and searches: a resumable grid of trainings, tables, tests, a page."""
    from mmc_fast.cli.compare import check_cell, print_comparison, run_compare
    from mmc_fast.cli.evaluate import parse_rates
    from mmc_fast.cli.terminal import output_console

    if check is not None:
        different = check_cell(check)
        typer.echo(f"different: {', '.join(different)}" if different else "the same numbers")
        if different:
            raise typer.Exit(1)
        return
    if tune not in ("auto", "always", "never"):
        raise InputError(f"--tune is {tune!r}; allowed are auto, always and never")
    wanted = () if rates is not None and rates.strip() == "none" else parse_rates(rates)
    findings = run_compare(
        methods.split(","),
        data.split(","),
        out,
        seeds=seeds,
        rates=None if wanted is None else tuple(wanted),
        epochs=epochs,
        jobs=jobs,
        tune=tune,  # type: ignore[arg-type]
        reference=reference,
    )
    if as_json:
        _print_json([f.to_dict() for f in findings])
    else:
        print_comparison(output_console(), findings, out)


@app.command()
@_clean
def reproduce(
    name: Annotated[str, typer.Argument(help="Which experiment, such as table5; `docs/reproduce.md` lists them.")],
    seeds: Annotated[int, typer.Option(help="Number of seeds: 0, 1, ...")] = 3,
    epochs: Annotated[int | None, typer.Option(help="Budget of every training. [default: that of the data]")] = None,
    data: Annotated[
        str | None, typer.Option(help="Data, separated by commas, as in compare. [default: the experiment's own]")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes with one thread each.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder of all experiments; what is finished there is taken over.")] = Path(
        "runs/reproduce"
    ),
    tune: Annotated[
        str, typer.Option(help="Settings: never (stored choice, else the default), auto (else a search), always.")
    ] = "never",
    reading: Annotated[
        str, typer.Option(help="Tables 3 and 4: audio is missing in training (train), in the test (test), or both.")
    ] = "both",
    as_json: AsJson = False,
) -> None:
    """Repeat an experiment of the paper on open data; print our numbers beside the paper's and which directions agree."""
    from mmc_fast.cli.reproduce import print_outcome, run_reproduce
    from mmc_fast.cli.terminal import output_console

    experiment, outcome, values = run_reproduce(
        name, out, seeds=seeds, epochs=epochs, data=data, jobs=jobs, tune=tune, reading=reading
    )
    if as_json:
        _print_json(values)
    else:
        print_outcome(output_console(), experiment, outcome, out / name)


@app.command()
@_clean
def info(as_json: AsJson = False) -> None:
    """Show versions, hardware, the native library, data sets and environment variables."""
    from mmc_fast.cli.info import collect_info, print_info
    from mmc_fast.cli.terminal import output_console

    found = collect_info()
    if as_json:
        _print_json(found)
    else:
        print_info(output_console(), found)


@app.command()
@_clean
def selftest(
    device: Annotated[str, typer.Option(help="cpu, or cuda (cuda:N) for the kernels of a GPU.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Check every native kernel on every instruction set of this machine; exit code 1 where one is wrong."""
    if device == "cpu":
        from mmc_fast.ops.selftest import selftest as run_checks

        checks = run_checks()
    else:
        from mmc_fast.cli.device import gpu
        from mmc_fast.cli.device_selftest import device_selftest

        checks = device_selftest(gpu("selftest", device))
    if as_json:
        _print_json([{"name": c.name, "passed": c.passed, "detail": c.detail} for c in checks])
    else:
        for check in checks:
            typer.echo(f"{'ok    ' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


@app.command()
@_clean
def bench(
    device: Annotated[str, typer.Option(help="cpu, or cuda (cuda:N) for both ops on a GPU, as JSON.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Time the AGOP core on this machine against the forward product (CPU, one thread, a few seconds)."""
    if device != "cpu":
        from mmc_fast.cli.device import gpu
        from mmc_fast.cli.device_bench import device_bench

        _print_json(device_bench(gpu("bench", device)))
        return
    from mmc_fast.ops.selftest import quick_bench

    speeds = quick_bench()
    if as_json:
        rows = [vars(s) | {"ratio": s.ratio} for s in speeds]
        _print_json(rows)
    else:
        for s in speeds:
            typer.echo(f"{s.name} ({s.shape}) on {s.isa}: {s.milliseconds:.2f} ms, {s.ratio:.2f} x the forward product")
