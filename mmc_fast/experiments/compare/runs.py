"""What the jobs do: train and score a method, train a model that is kept, and check a finished result."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict

from mmc_fast._util.documents import Count0, Finite, parse_json, validated
from mmc_fast._util.schema import from_mapping
from mmc_fast.errors import InputError

from ..data import MultimodalDataset
from ..data.inner import inner_split
from ..jobs import ADVICE, Job, Result, Values, Workspace, perform, read
from ..methods import BATCH_ROWS, Task, get
from ..training import TrainConfig, load_run, train
from ..training.evaluate import hidden_column, masks_at
from .configs import DataConfig, fingerprint_of, load_data

Settings = Mapping[str, Any]


class _Line(TypedDict):
    option: str
    arm: str
    data: str
    seed: Count0
    settings: dict[str, Any]
    scores: dict[str, Finite | None] | None
    failed: str | None
    threads: Count0
    commit: str | None


class _Values(TypedDict):
    metric: str
    batch_rows: int | None
    scores: dict[str, dict[str, Finite | None]]
    realised: dict[str, list[Finite]]


def settings_of(data: DataConfig, seed: int, config: TrainConfig, **more: Any) -> dict[str, Any]:
    """Settings of a job on these data: their name, origin and content, the seed, every setting of the training."""
    about = {"data": data.name, "source": data.key, "fingerprint": fingerprint_of(data.key)}
    return {**about, "seed": seed, "config": config.to_dict(), **more}


def score(settings: Settings, workspace: Workspace) -> tuple[Values, dict[str, np.ndarray]]:
    """Train a method and score it on complete data and at the missing rates.

    Of the settings "part" is "test", or "validation" for a candidate of a search; "method" and "options" belong to the
    method. Test runs keep "labels", "index" and answers (class probabilities, ...) by condition ("complete", "missing_0.3", …).
    """
    dataset = _data(settings)
    method, config = get(settings["method"]), from_mapping(TrainConfig(), _stored(settings["config"]), "config")
    seed, part_name = settings["seed"], settings["part"]
    fitted = method.fitter(Task(dataset, config, settings["options"], seed, workspace.progress))
    part = dataset.part(part_name)
    answers: dict[str, Tensor] = {"complete": fitted.predict(part.features, part.present)}
    realised: dict[str, list[float]] = {}
    column = hidden_column(dataset, config.rates_modality)
    for rate in config.rates:
        present, realised[f"missing_{rate:g}"] = masks_at(part.present, rate, seed, part_name, column)
        answers[f"missing_{rate:g}"] = fitted.predict(part.features, present)
    values: Values = {
        "metric": dataset.metric,
        "batch_rows": BATCH_ROWS if method.batch_dependent else None,
        "scores": {name: dataset.task.scores(p, part.labels) for name, p in answers.items()},
        "realised": realised,
        "training": fitted.record,
    }
    if part_name != "test":
        return values, {}
    arrays = {name: dataset.task.scored(p).numpy() for name, p in answers.items()}
    return values, arrays | {"labels": part.labels.numpy(), "index": part.index.numpy()}


def train_and_keep(settings: Settings, workspace: Workspace) -> tuple[Values, dict[str, np.ndarray]]:
    """Train by the standard loop in the job's own folder; continues what a killed process left there.

    "evaluate_on": parts that are scored. "unimodal": own folder of a finished run whose unimodal models are shared, or None.
    """
    shared = settings["unimodal"]
    train(
        _data(settings),
        TrainConfig.from_dict(settings["config"]),
        seed=settings["seed"],
        run_dir=workspace.own,
        resume="auto",
        unimodal=None if shared is None else load_run(workspace.folder / shared).unimodal,
        evaluate_on=tuple(settings["evaluate_on"]),
        distributed=False,
        progress=workspace.progress,
    )
    return {}, {}


def check(path: Path) -> list[str]:
    """Repeat a finished :func:`score` from its stored settings; names of what is different (empty: the same numbers)."""
    log = ".jsonl:" in path.name
    line = _line(path) if log else None
    stored = read(path) if line is None else _result_of(line)
    if "method" not in stored.settings:
        raise InputError(f"result {path} is of no run of a comparison; give a file of OUT/runs or OUT/search")
    if not log:
        check_cell(path, stored)
    threads = torch.get_num_threads()
    torch.set_num_threads(stored.threads)
    try:
        again = perform(Job(path.name, score, stored.settings), path.parent)
    except InputError as error:
        advice = "" if line is None else f" (the line was run by commit {line['commit']}; check that out to repeat it)"
        raise InputError(f"{error}{advice}") from error
    finally:
        torch.set_num_threads(threads)
    found = [{"failed": r.failed, "scores": r.values.get("scores")} for r in (stored, again)]
    if log:  # that holds the main scores alone
        found[1]["scores"] = {name: s["score"] for name, s in again.values.get("scores", {}).items()}
    different = [name for name, value in found[0].items() if value != found[1][name]]
    if log:
        return different
    names = sorted(stored.arrays.keys() | again.arrays.keys())
    return different + [n for n in names if not _same(stored.arrays.get(n), again.arrays.get(n))]


def check_cell(path: Path, result: Result) -> None:
    """Raise InputError where a stored result of :func:`score` has not the form of one; a diverged one has none."""
    if result.failed is not None:
        return
    found: _Values = validated(result.values, _Values, str(path), ADVICE)
    reason = None
    rows = len(result.arrays.get("labels", ()))
    if result.settings.get("part") == "test" and not {"labels", "index", *found["scores"]} <= result.arrays.keys():
        reason = "predictions are missing"
    for name, array in result.arrays.items():
        if array.dtype.kind not in "iufb" or not array.shape or len(array) != rows:
            reason = f"{name} is {array.dtype} {list(array.shape)} beside {rows} labels"
        elif not np.isfinite(array).all():
            reason = f"{name} holds NaN or infinity"
        elif name not in ("labels", "index") and found["metric"] in ("accuracy", "auroc") and not _shares(array):
            reason = f"{name} holds no class probabilities"
    if reason is not None:
        raise InputError(f"{path} cannot be used ({reason}); {ADVICE}")


def _shares(array: np.ndarray) -> bool:
    """Whether the rows are probabilities of classes."""
    return array.ndim == 2 and array.min(initial=0) >= 0 and np.allclose(array.sum(1), 1, atol=1e-3)


def mean_missing(found: Mapping[str, Mapping[str, float]], key: str = "score") -> float | None:
    """Mean over the missing rates of a run's scores; None without rates."""
    values = [s[key] for name, s in found.items() if name != "complete"]
    return statistics.fmean(values) if values else None


def _data(settings: Settings) -> MultimodalDataset:
    if fingerprint_of(settings["source"]) != settings["fingerprint"]:
        raise InputError(f"the data {settings['data']} have changed since this run was planned; start it anew")
    dataset = load_data(settings["source"])
    return inner_split(dataset, settings["inner"], settings["seed"]) if "inner" in settings else dataset


def read_line(line: str) -> dict[str, Any]:
    """A line of a log of explorations. Raises InputError where it is none."""
    advice = f"give a line of a log of explorations, with {', '.join(_Line.__annotations__)}"
    values = parse_json(line, _Line, "the line", advice)
    return {name: values[name] for name in _Line.__annotations__} | {"line": values}


def _line(path: Path) -> dict[str, Any]:
    """The run in line N (from 1) of a log, for ``LOG.jsonl:N``."""
    name, _, number = str(path).rpartition(":")
    lines = Path(name).read_text(encoding="utf-8").splitlines() if Path(name).is_file() else []
    if not number.isdigit() or not 1 <= int(number) <= len(lines):
        raise InputError(f"{path}: the log has {len(lines)} line(s); give FILE.jsonl:N with N from 1 to that")
    return read_line(lines[int(number) - 1])


def _result_of(found: Mapping[str, Any]) -> Result:
    return Result(found["settings"], {"scores": found["scores"] or {}}, {}, found["failed"], 0.0, found["threads"])


def _stored(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without the name of the method that ``to_dict`` adds."""
    return {name: value for name, value in config.items() if name != "method"}


def _same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and np.array_equal(a, b)
