"""Method configs (a method with fixed settings) and data configs of a comparison, from plain tables such as TOML files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mmc_fast._util.names import unknown
from mmc_fast._util.toml import merged, read_toml
from mmc_fast.errors import InputError

from ..data import MultimodalDataset, load
from ..data.registry import check_options, is_table, why_missing
from ..methods import METHODS, Method, get
from ..training import TrainConfig
from ..training.parts import fingerprint

BUDGET = TrainConfig(epochs=30, batch_size=64, selection="masked", unimodal_share=0.0, control=False)
"""What every method gets where a data config says nothing else."""

_METHOD_KEYS = ("method", "title", "settings", "selected")
_DATA_KEYS = ("data", "task", "variant", "nan_policy", "split_seed", "kind", "modalities", "columns", "budget")


def configs_folder() -> Path:
    """The folder of the shipped configs."""
    return Path(__file__).resolve().parents[1] / "configs"


@dataclass(frozen=True)
class MethodConfig:
    """One line of the table: ``method`` (a plug-in's name) with ``settings`` on top of its own.

    ``selected``: data config -> the hyper-parameters that an earlier search on validation data selected.
    """

    name: str
    method: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    selected: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def plugin(self) -> Method:
        return get(self.method)

    @classmethod
    def parse(cls, name: str, values: Mapping[str, Any]) -> MethodConfig:
        """From a table with "method" and optionally "title", "settings", "selected". Raises InputError, one line."""
        where = f"method config {name}"
        _check_keys(where, values, _METHOD_KEYS)
        if not isinstance(values.get("method"), str):
            raise InputError(f"{where}: 'method' is {values.get('method')!r}; give the name of a method")
        plugin = get(values["method"])
        if not isinstance(values.get("title", ""), str):
            raise InputError(f"{where}: 'title' is {values['title']!r}; give a text")
        tables: dict[str, Mapping[str, Any]] = {key: values.get(key, {}) for key in ("settings", "selected")}
        for key, table in tables.items():
            inner = table.values() if key == "selected" and isinstance(table, Mapping) else ()
            if not all(isinstance(t, Mapping) for t in (table, *inner)):
                raise InputError(f"{where}: {key!r} is {table!r}; give a table")
        config = cls(name, values["method"], values.get("title", plugin.title), tables["settings"], tables["selected"])
        for settings in ({}, *config.selected.values()):  # refuse what does not exist before anything runs
            config.resolve(settings, BUDGET)
        return config

    def resolve(self, settings: Mapping[str, Any], budget: TrainConfig) -> tuple[TrainConfig, dict[str, Any]]:
        """Configuration and options: budget, the method's own, the candidate's, this config's."""
        return self.plugin.resolve(merged(settings, self.settings), budget)


@dataclass(frozen=True)
class DataConfig:
    """Data of a comparison: keyword arguments of :func:`mmc_fast.experiments.data.load` and changes of the budget."""

    name: str
    data: str
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, name: str, values: Mapping[str, Any], beside: Path | None = None) -> DataConfig:
        """From a table with "data" (a name, or a file relative to ``beside``), load options and "budget"."""
        _check_keys(f"data {name}", values, _DATA_KEYS)
        data = values.get("data")
        if not isinstance(data, str):
            raise InputError(f"data {name}: 'data' is {data!r}; give the name of a data set or the path of a file")
        files = [values[key] for key in ("data", "columns") if isinstance(values.get(key), str)]
        places = {f: str((beside / f).resolve()) for f in files if beside is not None and (beside / f).exists()}
        data, values = places.get(data, data), {**values, "data": data}
        if values.get("columns") in places:
            values["columns"] = places[values["columns"]]
        budget = values.get("budget", {})
        if not isinstance(budget, Mapping):
            raise InputError(f"data {name}: 'budget' is {budget!r}; give a table of settings")
        options = {k: v for k, v in values.items() if k not in ("data", "budget")}
        check_options(data, **options)
        config = cls(name, data, options, budget)
        config.budget_with({})
        return config

    def budget_with(self, changes: Mapping[str, Any]) -> TrainConfig:
        """The budget on these data, with the changes of a call on top."""
        return TrainConfig.from_dict(BUDGET.to_dict() | dict(self.budget) | dict(changes))

    @property
    def key(self) -> str:
        """Name and options as text, for the settings of a job."""
        return json.dumps([self.data, dict(self.options)], sort_keys=True)


def load_method_configs(names: Sequence[str]) -> list[MethodConfig]:
    """By name (of a method, or of a file in experiments/configs/methods) or by path of a TOML file."""
    return [_method_config(name.strip()) for name in names]


def _method_config(name: str) -> MethodConfig:
    path = Path(name)
    if name.endswith(".toml"):
        return MethodConfig.parse(path.stem, read_toml(path))
    stored = configs_folder() / "methods" / f"{name}.toml"
    if stored.is_file():
        return MethodConfig.parse(name, read_toml(stored))
    if name in METHODS:
        return MethodConfig.parse(name, {"method": name})
    raise unknown("method", name, tuple(METHODS))


def load_data_configs(names: Sequence[str]) -> list[DataConfig]:
    """By name (a file in experiments/configs/data, or a data set), or by path of a TOML or npz file."""
    return [_data_config(name.strip()) for name in names]


def _data_config(name: str) -> DataConfig:
    path = Path(name)
    if name.endswith(".toml"):
        return DataConfig.parse(path.stem, read_toml(path), path.parent)
    stored = configs_folder() / "data" / f"{name}.toml"
    if stored.is_file():
        return DataConfig.parse(name, read_toml(stored))
    return DataConfig.parse(path.stem if name.endswith(".npz") or is_table(name) else name, {"data": name})


def data_here(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The names whose data can be loaded here; and of the others, name -> what is missing and how to get it."""
    reasons = {name: why_missing(c.data) for name, c in zip(names, load_data_configs(names), strict=True)}
    return [n for n, r in reasons.items() if r is None], {n: r for n, r in reasons.items() if r is not None}


@lru_cache(maxsize=2)
def load_data(key: str) -> MultimodalDataset:
    """The data set of :attr:`DataConfig.key`; the last two are kept."""
    data, options = json.loads(key)
    try:
        return load(data, **options)
    except InputError as error:
        values = {"split_seed": "0", "nan_policy": '"mean"', "kind": '"classification"'}
        asked = next((option for option in values if f"{option} " in str(error) or f"{option}=" in str(error)), None)
        if asked is None:
            raise
        advice = f'Here that is a line `{asked} = {values[asked]}` below `data = "{data}"` in a TOML file for --data.'
        raise InputError(f"{error} {advice}") from error


@lru_cache(maxsize=64)
def fingerprint_of(key: str) -> str:
    """Hash of the content of the data set of :attr:`DataConfig.key`."""
    return fingerprint(load_data(key))


@lru_cache(maxsize=64)
def kind_of(key: str) -> str:
    """Kind of the task of the data set of :attr:`DataConfig.key`."""
    fingerprint_of(key)  # while the data are in memory
    return load_data(key).task.kind


def _check_keys(where: str, values: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in values:
        if key not in known:
            raise unknown(f"{where} key", key, known)
