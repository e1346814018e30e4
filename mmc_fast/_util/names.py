"""One wording for a name that is not known: what was got, the nearest, and all that is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from unicodedata import category

from mmc_fast.errors import InputError

from .numbers import shown

_UNSHOWN = ("Cc", "Cs", "Zl", "Zp")  # control characters, lone surrogates, separators of lines
_TURNING = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # the direction of what follows


def printable(text: str) -> str:
    """``text`` with escapes for what no line can show: control characters, lone surrogates, changes of direction."""
    return "".join(ascii(c)[1:-1] if category(c) in _UNSHOWN or c in _TURNING else c for c in text)


def check_name(kind: str, name: object) -> str:
    """``name`` if it is a text that a table, a page and a drawing can show; else raises :class:`InputError`."""
    if not isinstance(name, str) or not name.strip() or printable(name) != name:
        raise InputError(f"{kind} is named {shown(name)}; give a name without control characters or lone surrogates")
    return name


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that is closest to ``name`` in spelling, or None where nothing is close."""
    by_lower = {option.lower(): option for option in allowed}
    close = difflib.get_close_matches(str(name).lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def unknown(kind: str, name: object, allowed: Sequence[str]) -> InputError:
    """The error for a name outside of ``allowed``; the caller raises it."""
    guess = nearest(name, allowed) if isinstance(name, str) else None
    hint = f" Did you mean {guess!r}?" if guess else ""
    return InputError(f"Unknown {kind} {shown(name)}.{hint} Allowed: {', '.join(allowed)}.")


def choose(kind: str, name: str | None, allowed: Sequence[str]) -> str:
    """``name`` if it is allowed, the first allowed one for None; else raises :class:`InputError`."""
    if name is None:
        return allowed[0]
    if name not in allowed:
        raise unknown(kind, name, allowed)
    return name
