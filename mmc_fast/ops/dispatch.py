"""Which backend runs an op: a registry of (usable, reason), the choice, and a counter of what ran.

A backend registers, per op, a function of the call's arguments that returns None where it can run and one line of
reason where it cannot. ``backend="auto"`` takes the first usable one in the op's order; an explicit backend works or
raises with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from mmc_fast.errors import InputError

__all__ = ["BACKENDS", "Backend", "choose", "explain", "ran", "record", "register", "reset_ran"]

BACKENDS = ("auto", "cpp", "triton", "cuda", "torch")

Check = Callable[..., "str | None"]

_checks: dict[str, dict[str, Check]] = {}
_ran: Counter[str] = Counter()


class Backend(NamedTuple):
    """One line of :func:`explain`."""

    backend: str
    usable: bool
    reason: str


def register(op_name: str, backend: str, check: Check) -> None:
    """Add a backend to an op, after those that are there: the order of registration is the order of preference."""
    _checks.setdefault(op_name, {})[backend] = check


def explain(op_name: str, *args: Any) -> list[Backend]:
    """Say which backends of an op can run and why, best first.

    ``args`` are the op's tensors, if any: without them only what holds for every call is judged (installed, built,
    device there). The first usable row is what ``backend="auto"`` takes. Raises :class:`InputError` for an unknown op.
    """
    return [Backend(name, reason is None, reason or "usable") for name, reason in _reasons(op_name, args)]


def choose(op_name: str, backend: str, *args: Any) -> str:
    """Return the backend to run; never a fallback for an explicit one.

    Raises :class:`InputError` for an unknown backend and ``RuntimeError`` with the reason for one that cannot run.
    """
    if backend == "auto":
        for name, check in _checks_of(op_name).items():
            if check(*args) is None:
                return name
    if backend not in BACKENDS:
        raise InputError(f"{op_name}: backend={backend!r}; allowed are {', '.join(BACKENDS)}")
    wanted = _checks_of(op_name).get(backend)
    reason = f"this op has no {backend} backend" if wanted is None else wanted(*args)
    if reason is not None:
        raise RuntimeError(f"{op_name}: backend={backend!r} cannot run: {reason}; backend='auto' takes one that can")
    return backend


def record(op_name: str, backend: str) -> None:
    """Count a call of ``op_name`` that a backend outside the native library carried out."""
    _ran[f"{op_name}/{backend}"] += 1


def ran() -> dict[str, int]:
    """Count what ran in this process, as ``{"op/backend": calls}`` and ``{"op/cpp/instruction set": calls}``.

    The native rows are counted inside the library by the code that does the work, not by the request.
    """
    from . import native as library

    native = library.loaded_module()
    rows = {} if native is None else native.dispatch_counts()
    counted = {"{}/cpp/{}".format(*name.split("/")): calls for name, calls in rows.items()}
    return dict(sorted({**_ran, **counted}.items()))


def reset_ran() -> None:
    """Set every counter of :func:`ran` to zero."""
    from . import native as library

    _ran.clear()
    native = library.loaded_module()
    if native is not None:
        native.reset_dispatch_counts()


def _checks_of(op_name: str) -> dict[str, Check]:
    if op_name not in _checks:
        from .ebr import op as ebr  # noqa: F401  (their import registers the ops)
    if op_name not in _checks:
        raise InputError(f"explain: unknown op {op_name!r}; known are {', '.join(sorted(_checks))}")
    return _checks[op_name]


def _reasons(op_name: str, args: tuple[Any, ...]) -> list[tuple[str, str | None]]:
    return [(name, check(*args)) for name, check in _checks_of(op_name).items()]
