"""Rows (a method with fixed settings) and data sources of a grid, from plain tables such as those of TOML files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmc_fast._util.names import unknown
from mmc_fast.errors import InputError

from ..data import MultimodalDataset, load
from ..data.registry import check_options, why_missing
from ..methods import METHODS, Method, get
from ..methods.base import merged
from ..training import TrainConfig
from ..training.parse import read_toml

__all__ = ["BUDGET", "Row", "Source", "configs_folder", "load_rows", "load_source", "load_sources", "sources_here"]

BUDGET = TrainConfig(epochs=30, batch_size=64, selection="masked", unimodal_share=0.0, control=False)
"""What every method gets where a data source says nothing else."""

_ROW_KEYS = ("method", "title", "settings", "chosen")
_SOURCE_KEYS = ("data", "task", "variant", "nan_policy", "split_seed", "modalities", "budget")


def configs_folder() -> Path:
    """The folder of the shipped rows and data sources."""
    return Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class Row:
    """One line of the table: ``method`` (a plug-in's name) with ``settings`` on top of its own.

    ``chosen``: data source -> the settings that an earlier search on validation data picked.
    """

    name: str
    method: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    chosen: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def plugin(self) -> Method:
        return get(self.method)

    @classmethod
    def parse(cls, name: str, values: Mapping[str, Any]) -> Row:
        """From a table with "method" and optionally "title", "settings", "chosen". Raises InputError, one line."""
        _check_keys(f"row {name}", values, _ROW_KEYS)
        if not isinstance(values.get("method"), str):
            raise InputError(f"row {name}: 'method' is {values.get('method')!r}; give the name of a method")
        plugin = get(values["method"])
        if not isinstance(values.get("title", ""), str):
            raise InputError(f"row {name}: 'title' is {values['title']!r}; give a text")
        tables: dict[str, Mapping[str, Any]] = {key: values.get(key, {}) for key in ("settings", "chosen")}
        for key, table in tables.items():
            if not isinstance(table, Mapping) or (
                key == "chosen" and not all(isinstance(v, Mapping) for v in table.values())
            ):
                raise InputError(f"row {name}: {key!r} is {table!r}; give a table")
        row = cls(name, values["method"], values.get("title", plugin.title), tables["settings"], tables["chosen"])
        for settings in ({}, *row.chosen.values()):  # refuse what does not exist before anything runs
            row.resolve(settings, BUDGET)
        return row

    def resolve(self, settings: Mapping[str, Any], budget: TrainConfig) -> tuple[TrainConfig, dict[str, Any]]:
        """Configuration and options: budget, the method's own, the candidate's, the row's."""
        return self.plugin.resolve(merged(settings, self.settings), budget)


@dataclass(frozen=True)
class Source:
    """Data of a grid: keyword arguments of :func:`mmc_fast.experiments.data.load` and changes of the budget."""

    name: str
    data: str
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, name: str, values: Mapping[str, Any], beside: Path | None = None) -> Source:
        """From a table with "data" (a name, or a file relative to ``beside``), load options and "budget"."""
        _check_keys(f"data {name}", values, _SOURCE_KEYS)
        data = values.get("data")
        if not isinstance(data, str):
            raise InputError(f"data {name}: 'data' is {data!r}; give the name of a data set or the path of an npz file")
        if data.endswith(".npz") and beside is not None:
            data = str((beside / data).resolve())
        budget = values.get("budget", {})
        if not isinstance(budget, Mapping):
            raise InputError(f"data {name}: 'budget' is {budget!r}; give a table of settings")
        options = {k: v for k, v in values.items() if k not in ("data", "budget")}
        source = cls(name, data, options, budget)
        source.budget_with({})
        check_options(data, **options)
        return source

    def budget_with(self, changes: Mapping[str, Any]) -> TrainConfig:
        """The budget on these data, with the changes of a call on top."""
        return TrainConfig.from_dict(BUDGET.to_dict() | dict(self.budget) | dict(changes))

    @property
    def key(self) -> str:
        """Name and options as text, for a worker process."""
        return json.dumps([self.data, dict(self.options)], sort_keys=True)


def load_rows(names: Sequence[str]) -> list[Row]:
    """Rows by name (of a method, or of a file in experiments/configs/rows) or by path of a TOML file."""
    return [_row(name.strip()) for name in names]


def _row(name: str) -> Row:
    path = Path(name)
    if name.endswith(".toml"):
        return Row.parse(path.stem, read_toml(path))
    stored = configs_folder() / "rows" / f"{name}.toml"
    if stored.is_file():
        return Row.parse(name, read_toml(stored))
    if name in METHODS:
        return Row.parse(name, {"method": name})
    raise unknown("method", name, tuple(METHODS))


def load_sources(names: Sequence[str]) -> list[Source]:
    """Data by name (a file in experiments/configs/data, or a data set), or by path of a TOML or npz file."""
    return [_source(name.strip()) for name in names]


def _source(name: str) -> Source:
    path = Path(name)
    if name.endswith(".toml"):
        return Source.parse(path.stem, read_toml(path), path.parent)
    stored = configs_folder() / "data" / f"{name}.toml"
    if stored.is_file():
        return Source.parse(name, read_toml(stored))
    return Source.parse(path.stem if name.endswith(".npz") else name, {"data": name})


def sources_here(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The names whose data can be loaded here; and of the others, name -> what is missing and how to get it."""
    reasons = {name: why_missing(source.data) for name, source in zip(names, load_sources(names), strict=True)}
    return [n for n, r in reasons.items() if r is None], {n: r for n, r in reasons.items() if r is not None}


@lru_cache(maxsize=2)
def load_source(key: str) -> MultimodalDataset:
    """The data set of :attr:`Source.key`; the last two are kept."""
    data, options = json.loads(key)
    try:
        return load(data, **options)
    except InputError as error:
        asked = next((option for option in ("split_seed", "nan_policy") if option in str(error)), None)
        if asked is None:
            raise
        value = {"split_seed": "0", "nan_policy": '"mean"'}[asked]
        advice = f'Here that is a line `{asked} = {value}` below `data = "{data}"` in a TOML file for --data.'
        raise InputError(f"{error} {advice}") from error


def _check_keys(where: str, values: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in values:
        if key not in known:
            raise unknown(f"{where} key", key, known)
