"""Numbers as callers compute them: NumPy's integers and floats count as Python's own, and leave as those."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import numpy as np

from mmc_fast.errors import InputError


def integer(value: object) -> int | None:
    """``value`` as an ``int`` where it is an integer, NumPy's among them; None for all else, booleans too."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return None


def plain(value: Any) -> Any:
    """NumPy scalars as Python values, within lists and tuples too; all else as it is."""
    if isinstance(value, np.generic):
        return value.item()
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def make_plain(settings: Any) -> None:
    """:func:`plain` for every field of a frozen dataclass, so that its values can be stored as JSON."""
    for field in dataclasses.fields(settings):
        object.__setattr__(settings, field.name, plain(getattr(settings, field.name)))


def check_seed(seed: object) -> int:
    """``seed`` as an ``int`` if it is an integer in 0 .. 2^63 - 1, else raise InputError."""
    value = integer(seed)
    if value is None or not 0 <= value < 2**63:
        raise InputError(f"seed is {shown(seed)}; give an integer from 0 to 2^63 - 1")
    return value


def shown(value: object) -> str:
    """A value that was given, in at most 60 printable characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = "an integer of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."
