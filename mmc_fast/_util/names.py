"""One wording for a name that is not known: what was got, the nearest, and all that is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from mmc_fast.errors import InputError

__all__ = ["choose", "nearest", "unknown"]


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that is closest to ``name`` in spelling, or None where nothing is close."""
    by_lower = {option.lower(): option for option in allowed}
    close = difflib.get_close_matches(str(name).lower(), list(by_lower), n=1, cutoff=0.6)
    return by_lower[close[0]] if close else None


def unknown(kind: str, name: object, allowed: Sequence[str]) -> InputError:
    """The error for a name outside of ``allowed``; the caller raises it."""
    guess = nearest(str(name), allowed)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return InputError(f"Unknown {kind} {name!r}.{hint} Allowed: {', '.join(allowed)}.")


def choose(kind: str, name: str | None, allowed: Sequence[str]) -> str:
    """``name`` if it is allowed, the first allowed one for None; else raises :class:`InputError`."""
    if name is None:
        return allowed[0]
    if name not in allowed:
        raise unknown(kind, name, allowed)
    return name
