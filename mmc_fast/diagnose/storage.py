"""Unfinished sums on disk: nested states of tensors, numbers and strings as one safetensors file, written in one step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmc_fast._util.atomic import write_tensors
from mmc_fast.errors import InputError

__all__ = ["read_state", "write_state"]

_MARK = "__tensor__"


def write_state(path: Path, state: Any) -> None:
    """Write ``state`` (dicts with string keys, lists, tensors, JSON values)."""
    tensors: dict[str, Tensor] = {}

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value
            return {_MARK: str(len(tensors) - 1)}
        if isinstance(value, dict):
            return {key: take(item) for key, item in value.items()}
        return [take(item) for item in value] if isinstance(value, (list, tuple)) else value

    layout = json.dumps(take(state))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, {"layout": layout})


def read_state(path: Path) -> Any:
    """Inverse of :func:`write_state`. Raises InputError for a file that is damaged or something else."""
    try:
        with safe_open(path, framework="pt") as file:
            layout = json.loads((file.metadata() or {})["layout"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as the state of a diagnosis ({error}); delete it to start over"
        ) from error

    def put(value: Any) -> Any:
        if isinstance(value, dict):
            if set(value) == {_MARK}:
                return tensors[value[_MARK]]
            return {key: put(item) for key, item in value.items()}
        return [put(item) for item in value] if isinstance(value, list) else value

    return put(layout)
