"""Settings of a run from a TOML file, options and ``--set`` assignments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmc_fast._util.toml import merged, parse_toml, read_toml
from mmc_fast.errors import InputError


def collect_settings(
    path: Path | None, method: str | None, epochs: int | None, assignments: Sequence[str]
) -> dict[str, Any]:
    """The file first, then the options, then the assignments. Without any method it is EBR."""
    values = {} if path is None else read_toml(path)
    if method is not None:
        values["method"] = method
    if epochs is not None:
        values["epochs"] = epochs
    values = merged(values, parse_assignments(assignments))
    if "method" not in values and values.get("ebr") is None and values.get("kd") is None:
        values["method"] = "dropout" if values.get("modality_dropout") else "ebr"
    return values


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """``["ebr.reversal=0.1", "fusion=late"]`` as nested tables. Values are TOML, or text where they are no TOML."""
    result: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        names = [name.strip() for name in key.split(".")]
        if not equals or not all(names):
            raise InputError(f"--set {assignment!r} is no assignment; write KEY=VALUE, such as ebr.reversal=0.1")
        value: Any
        try:
            value = parse_toml(f"value = {text.strip()}")["value"]
        except (ValueError, RecursionError):
            value = None if text.strip() in ("none", "None") else text.strip()
        for name in reversed(names):
            value = {name: value}
        result = merged(result, value)
    return result
