"""How the native EBR step multiplies: own tiles or the BLAS, by rates measured once per processor, torch and thread count.

A product ``[m, k] [k, n]`` belongs to a class: how its operands lie, which side is short, and how long it takes
(``csrc/core/ways.h``). The first step that needs an answer asks :func:`_answer`, which reads the rates from the user's
cache folder or measures them (under a fifth of a second) and writes them there. Where the folder cannot be read or
written, or the machine is busy with other work, the next process measures again.
``torch.use_deterministic_algorithms(True)`` takes fixed ways.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmc_fast import __version__
from mmc_fast._util.atomic import write_json
from mmc_fast.errors import InputError

from .. import native

NUMBERS = ("float32", "bfloat16")
ORDERS = ("x·wᵀ", "d·w", "dᵀ·x")
# one product per class, by which side is short (none, m, n, k), from the shortest to the longest
SHAPES = (
    ((32, 32, 32), (64, 128, 64), (128, 256, 256), (256, 1024, 512)),
    ((4, 64, 64), (4, 512, 256), (8, 1024, 1024)),
    ((64, 4, 64), (512, 4, 256), (1024, 8, 1024)),
    ((64, 64, 4), (512, 256, 4), (1024, 1024, 8)),
)
_LONGEST = (SHAPES[0][-1:],)
MARGIN = 1.03  # the BLAS has to be that much faster, so that noise does not decide
_SLOW, _LONG = (
    4.0,
    2e-2,
)  # a way that takes so many times as long, and would take so many seconds next, is not timed further
_SHARED = 2**22  # multiplications that several threads share with profit
# what makes MKL and oneDNN act as on an older processor
_LIMITS = ("MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")

Timer = Callable[[int, int, int, int, int, bool], float]
Series = Sequence[Sequence[tuple[int, int, int]]]


class Rate(NamedTuple):
    """Gflop/s of one product by both ways; None where it was far too slow to be timed."""

    order: int
    m: int
    n: int
    k: int
    tiles: float | None
    blas: float | None

    @property
    def by_blas(self) -> bool:
        return (self.blas or 0.0) > MARGIN * (self.tiles or 0.0)

    def __str__(self) -> str:
        ways = (f"{name} {rate:.3g}" for name, rate in (("tiles", self.tiles), ("BLAS", self.blas)) if rate is not None)
        return f"{ORDERS[self.order]} {self.m}x{self.n}x{self.k} {', '.join(ways)}"


class _Known(NamedTuple):
    rates: tuple[Rate, ...]
    origin: str


_lock = threading.Lock()
_known: dict[tuple[str, int, str | None], _Known] = {}


def measure(number: str, timer: Timer | None = None, shapes: Series = SHAPES) -> tuple[Rate, ...]:
    """Time every representative product both ways."""
    timer = timer or native.native().time_product
    code, rates = NUMBERS.index(number), []
    for order in range(len(ORDERS)):
        for series in shapes:
            speed: dict[bool, float] = {}  # of the product before, by tiles (False) and by the BLAS (True)
            for m, n, k in series:
                flops = 2.0 * m * n * k
                slow = {w for w, s in speed.items() if _SLOW * s < max(speed.values()) and flops > _LONG * s}
                speed = {
                    way: flops / max(timer(code, order, m, n, k, way), 1e-9)
                    for way in (False, True)
                    if way not in slow and (not speed or way in speed)
                }
                rates.append(
                    Rate(order, m, n, k, *(1e-9 * speed[way] if way in speed else None for way in (False, True)))
                )
    return tuple(rates)


def classes_by_blas(rates: Sequence[Rate]) -> int:
    """The classes that go through the BLAS, as bits; a class without a rate of its own does as the next shorter one."""
    ways = {_class_of(r.order, r.m, r.n, r.k): r.by_blas for r in rates}
    for c in range(3 * 4 * 4):
        if c not in ways and c % 4:
            ways[c] = ways.get(c - 1, False)
    return sum(1 << c for c, blas in ways.items() if blas)


def _class_of(order: int, m: int, n: int, k: int) -> int:
    return int(native.native().product_class(order, m, n, k))


def serve() -> None:
    """Answer the native library where it asks how to multiply."""
    native.native().set_ways_source(_answer)


def _answer(number: int, threads: int) -> None:
    """What the library asks when it first multiplies numbers of this kind on so many threads."""
    _rates(NUMBERS[number], threads)


def _rates(number: str, threads: int) -> _Known:
    with _lock:
        if number != NUMBERS[0]:
            _learn(NUMBERS[0], threads)  # widened bfloat16 is multiplied in float32
        return _learn(number, threads)


def _learn(number: str, threads: int) -> _Known:
    place = number, threads, native.current_isa()
    if place not in _known:
        _known[place] = _found(number, threads)
    if not native.native().has_ways(NUMBERS.index(number), threads):
        native.native().set_ways(NUMBERS.index(number), threads, classes_by_blas(_known[place].rates))
    return _known[place]


def _found(number: str, threads: int) -> _Known:
    key = _key(number, threads)
    path = _file(key)
    if path is not None and (found := _read(path, key)):
        return _Known(found, f"read from {path}")
    if threads > 1:
        alone = _on_one_thread(number)
        busy = _Known(alone, "measured now, on one thread as this machine is busy, in memory only")
        if _disturbed(measure(number, shapes=_LONGEST), alone):  # all shapes would take seconds
            return busy
    rates = measure(number)
    if threads > 1 and _disturbed(rates, alone):
        return busy
    kept = path is not None and _write(path, key, rates)
    return _Known(rates, f"measured now, {path}" if kept else "measured now, in memory only")


def _on_one_thread(number: str) -> tuple[Rate, ...]:
    """Rates by a thread's own CPU time, to which a neighbour adds nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return measure(number)
    finally:
        torch.set_num_threads(threads)


def _disturbed(rates: Sequence[Rate], alone: Sequence[Rate]) -> bool:
    """Whether several threads took clearly longer than one over a product that is worth sharing: other work took the cores."""
    single_by_shape = {one[:4]: one for one in alone}
    long = [(r, single_by_shape[r[:4]]) for r in rates if r.m * r.n * r.k >= _SHARED]
    pairs = [pair for r, one in long for pair in ((r.tiles, one.tiles), (r.blas, one.blas))]
    return any(single is not None and (several is None or several < 0.7 * single) for several, single in pairs)


def _key(number: str, threads: int) -> dict[str, Any]:
    return {
        "processor": _processor(),
        "instruction_set": native.current_isa(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "limits": {name: os.environ[name] for name in _LIMITS if os.environ.get(name)},
        "torch": torch.__version__,
        "mmc_fast": __version__,
        "threads": threads,
        "number": number,
        "shapes": [list(map(list, shapes)) for shapes in SHAPES],
    }


@lru_cache(maxsize=1)
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = ("vendor_id", "model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part")
    pairs = ((a.strip(), b.strip()) for a, _, b in (line.partition(":") for line in lines))
    return ", ".join(f"{a} {b}" for a, b in pairs if a in names) or platform.machine()


def _file(key: Mapping[str, Any]) -> Path | None:
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # this user has no home
        return None
    return folder / "mmc-fast" / f"products-{name}.json"


def _read(path: Path, key: Mapping[str, Any]) -> tuple[Rate, ...] | None:
    """The rates in a file that was written for this key, None for any other file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rates = tuple(Rate(*row) for row in found["rates"])
        wanted = [(order, *shape) for order in range(len(ORDERS)) for shapes in SHAPES for shape in shapes]
        sound = all(v is None or 0 < v < 1e9 for r in rates for v in (r.tiles, r.blas))
        return rates if sound and found["key"] == key and [r[:4] for r in rates] == wanted else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _write(path: Path, key: Mapping[str, Any], rates: Sequence[Rate]) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "rates": [list(r) for r in rates]})
    except OSError:
        return False
    return True


def stored(number: str = "float32") -> dict[str, Any]:
    """What a run keeps so that :func:`restore` repeats its products: the ways in force for this number of threads."""
    if native.load_ebr() is not None:
        return {}
    threads, fixed = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    ways = native.native().ways(NUMBERS.index(number), threads, fixed)
    return {"number": number, "threads": threads, "by_blas": f"{ways:#x}"}


def restore(state: Mapping[str, Any]) -> None:
    """Multiply as the run that :func:`stored` this; a way that is pinned here, and another number of threads, go before.

    Raises :class:`InputError` for what :func:`stored` did not return.
    """
    if not state or native.load_ebr() is not None:
        return
    try:
        number, threads, ways = NUMBERS.index(state["number"]), int(state["threads"]), int(state["by_blas"], 16)
        native.native().set_ways(number, threads, ways)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"products: {state!r} is no stored choice ({error}); remove it to measure again") from None


def describe(number: str) -> str:
    """How products of float32 or bfloat16 are multiplied here and why, for ``explain``: the ways and the measured rates."""
    module, threads = native.native(), torch.get_num_threads()
    known = _rates(number, threads)
    fixed = torch.are_deterministic_algorithms_enabled()
    bits, pinned = module.ways(NUMBERS.index(number), threads, fixed), module.pinned_ways()
    here = [(bool(bits >> _class_of(r.order, r.m, r.n, r.k) & 1), r) for r in known.rates]
    if pinned != "auto":
        why = f"all by {'BLAS' if pinned == 'blas' else 'tiles'} (MMC_GEMM={pinned})"
    else:
        why = f"{sum(not blas for blas, _ in here)} of {len(here)} classes by tiles, the others by BLAS"
        why += " (fixed: deterministic algorithms)" if fixed else " (measured)"
    parts = {"tf32": "three bfloat16 products", "bf16": "one bfloat16 product"}.get(
        torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
        "",
    )
    if number == "float32" and parts and module.split_depth():
        why = f"by {parts} each, as torch's float32 precision allows; those below depth {module.split_depth()} or added: {why}"
    longest = [r for _, r in here if (r.m, r.n, r.k) == SHAPES[0][-1]]
    against = [r for blas, r in here if blas != r.by_blas]
    slower = f"; the measured rates speak against {len(against)}, as {against[-1]}" if against else ""
    return (
        f"{number} products on {threads} thread{'s' * (threads > 1)}: {why}{slower}; "
        f"Gflop/s {'; '.join(map(str, longest))} ({known.origin})"
    )
