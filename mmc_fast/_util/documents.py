"""Content that was read is held to a schema before anything looks at it (pydantic): no file is trusted because it parses."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

from mmc_fast.errors import InputError

from .extras import require
from .files import open_regular

require("pydantic", extra="diagnose")
import pydantic  # noqa: E402

Count0 = Annotated[int, pydantic.Field(ge=0, le=2**53)]
Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]


def validated(value: Any, schema: Any, where: str, advice: str) -> Any:
    """``value`` itself if it has the form ``schema`` (types, TypedDicts, ``Annotated`` with pydantic's ``Field``).

    Nothing is converted. Raises InputError, one line: ``where``, the place within the value,
    what was got and what belongs there, and ``advice``.
    """
    try:
        _adapter(schema).validate_python(value, strict=True)
    except (pydantic.ValidationError, RecursionError) as error:
        raise InputError(f"{where} cannot be used ({_reason(error)}); {advice}") from None
    return value


def parse_json(content: bytes | str, schema: Any, where: str, advice: str) -> Any:
    """JSON (without NaN and infinity, which JSON does not have) of the form ``schema``; errors as in :func:`validated`."""
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be used ({' '.join(str(error).split())[:200]}); {advice}") from None
    return validated(value, schema, where, advice)


def read_json(path: Path, schema: Any, advice: str) -> Any:
    """:func:`parse_json` of a file."""
    try:
        with open_regular(path) as file:
            content = file.read()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); {advice}") from None
    return parse_json(content, schema, str(path), advice)


@functools.cache
def _adapter(schema: Any) -> Any:
    return pydantic.TypeAdapter(schema)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"it holds {text}, which is no JSON")


def _reason(error: Any) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))
    got = ascii(first["input"])
    got = got if len(got) <= 60 else f"{got[:57]}..."
    text = f"{place}: {first['msg']}, got {got}" if place else f"{first['msg']}, got {got}"
    return " ".join(text.split())
