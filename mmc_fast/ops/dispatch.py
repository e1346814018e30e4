"""Which backend runs an op: a registry of reasons against, the choice, and a counter of what ran. Knows no op.

A backend registers, per op, a function of the call's arguments that returns None where it can run and one line of
reason where it cannot. The order of registration is the order of preference. :func:`choose` and :func:`explain` judge
by the same function: ``backend="auto"`` takes the first usable row; an explicit backend works or raises with its reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from mmc_fast.errors import InputError

from . import native

BACKENDS = ("auto", "cpp", "triton", "cuda", "eager", "reference")

Check = Callable[..., "str | None"]

_checks: dict[str, dict[str, Check]] = {}
_notes: dict[tuple[str, str], str | Callable[..., str]] = {}
_first: dict[str, Callable[..., str | None]] = {}
_ran: Counter[str] = Counter()


class Backend(NamedTuple):
    """One line of :func:`explain`."""

    backend: str
    usable: bool
    reason: str


def register(op_name: str, backend: str, check: Check, note: str | Callable[..., str] = "") -> None:
    """Add a backend to an op, after those that are there; ``note``: what :func:`explain` adds where it can run, or a
    function of the call's arguments that says it."""
    _checks.setdefault(op_name, {})[backend] = check
    _notes[op_name, backend] = note


def prefer(op_name: str, first: Callable[..., str | None]) -> None:
    """Let a function of the call's arguments name the backend that comes before the others, None for the usual order."""
    _first[op_name] = first


def _usable(op_name: str, backend: str, args: tuple[Any, ...]) -> str:
    note = _notes[op_name, backend]
    said = note(*args) if callable(note) else note
    return f"usable; {said}" if said else "usable"


def _judge(op_name: str, args: tuple[Any, ...], backend: str = "auto") -> Iterator[tuple[str, str | None]]:
    """One backend of an op, or all in the order of preference, with the reason why it cannot run, None where it can."""
    if op_name not in _checks:
        raise InputError(f"explain: unknown op {op_name!r}; known are {', '.join(sorted(_checks))}")
    checks = _checks[op_name]
    first = _first[op_name](*args) if backend == "auto" and op_name in _first else None
    for name in checks if first is None else (first, *(name for name in checks if name != first)):
        if backend in ("auto", name):
            yield name, checks[name](*args)


def explain(op_name: str, *args: Any) -> list[Backend]:
    """Say which backends of an op can run and why, best first.

    ``args`` are the op's tensors, if any: without them only what holds for every call is judged (installed, built,
    device there). The first usable row is what ``backend="auto"`` takes. Raises :class:`InputError` for an unknown op.
    """
    return [Backend(name, why is None, why or _usable(op_name, name, args)) for name, why in _judge(op_name, args)]


def choose(op_name: str, backend: str, *args: Any) -> str:
    """Return the backend to run; never a fallback for an explicit one.

    Raises :class:`InputError` for an unknown backend and ``RuntimeError`` with the reason for one that cannot run.
    """
    if backend not in BACKENDS:
        raise InputError(f"{op_name}: backend={backend!r}; allowed are {', '.join(map(repr, BACKENDS))}")
    why: str | None = f"this op has no {backend} backend"
    for name, why in _judge(op_name, args, backend):
        if why is None:
            return name
    raise RuntimeError(f"{op_name}: backend={backend!r} cannot run: {why}; backend='auto' takes one that can")


def record(op_name: str, backend: str) -> None:
    """Count a call of ``op_name`` that a backend outside the native library carried out."""
    _ran[f"{op_name}/{backend}"] += 1


def ran() -> dict[str, int]:
    """Count what ran in this process, as ``{"op/backend": calls}`` and ``{"op/cpp/instruction set": calls}``.

    The native rows are counted inside the library by the code that does the work, not by the request. Inside
    ``torch.compile`` the reference becomes part of the compiled graph and is not counted.
    """
    module = native.loaded_module()
    rows = {} if module is None else module.dispatch_counts()
    counted = {"{}/cpp/{}".format(*name.split("/")): calls for name, calls in rows.items()}
    return dict(sorted({**_ran, **counted}.items()))


def reset_ran() -> None:
    """Set every counter of :func:`ran` to zero."""
    _ran.clear()
    module = native.loaded_module()
    if module is not None:
        module.reset_dispatch_counts()
