"""Launches under watch: private copies of the arguments between red zones, shuffled programs, records of each launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_guard import numerics
from triton_guard.memory import GuardFault, Memory, Region
from triton_guard.specialise import specialisation

__all__ = ["Launch", "Watch", "install", "watch"]

_RED_ZONE = 4096
_ALIGNMENT = 256


@dataclass(frozen=True)
class Launch:
    """What one launch did. Bytes "read" and "written" count each element once, "loaded" and "stored" every access."""

    name: str
    programs: int
    working: int  # programs that touched more than single elements
    read_bytes: int
    written_bytes: int
    loaded_bytes: int
    stored_bytes: int
    atomics: int
    dot_flops: dict[str, int]
    arguments: dict[str, tuple[int, int]]  # name: (read, written) bytes
    specialisation: dict[str, Any]  # what Triton would compile for it, see specialise.py

    @property
    def global_bytes(self) -> int:
        """Bytes between the chip and its memory if every element moves once each way."""
        return self.read_bytes + self.written_bytes


class Watch:
    """The launches of one :func:`watch` block."""

    def __init__(self, seed: int, in_place: Iterable[Tensor], overflow: bool, sample: int | None) -> None:
        self.launches: list[Launch] = []
        self.random = np.random.default_rng(seed)
        self.in_place = list(in_place)
        self.overflow = overflow
        self.sample = sample

    @property
    def global_bytes(self) -> int:
        """Sum of :attr:`Launch.global_bytes`."""
        return sum(launch.global_bytes for launch in self.launches)

    @property
    def dot_flops(self) -> int:
        """Sum over all launches and kinds of operand."""
        return sum(sum(launch.dot_flops.values()) for launch in self.launches)


_watch: Watch | None = None
_reached: list[Tensor] = []  # by the launch under way, through addresses in memory
_memory: Memory | None = None
_order: np.ndarray | None = None


@contextmanager
def watch(
    seed: int = 0, *, in_place: Iterable[Tensor] = (), overflow: bool = False, sample: int | None = None
) -> Iterator[Watch]:
    """Check and count every launch inside the block; raises :class:`GuardFault` at the first wrong access.

    ``seed`` shuffles the programs. ``in_place`` names tensors that kernels reach through addresses in memory, beside those
    that a launch says itself (``common.launch(reaches=...)``): they are checked where they lie, since a copy would have
    other addresses. ``overflow`` also checks that
    32-bit integer sums and products do not wrap, at the price of speed. ``sample`` runs the first so many programs of a
    launch alone: enough to see what is launched, the numbers are worthless.
    """
    global _watch
    before, _watch = _watch, Watch(seed, in_place, overflow, sample)
    try:
        yield _watch
    finally:
        _watch = before


class _Copies:
    """Private copies of the storages of all arguments, each between red zones."""

    def __init__(self, in_place: list[Tensor]) -> None:
        self.regions: dict[int, Region] = {}
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}  # address of the storage: its bytes, their copy
        self._views: list[tuple[str, Tensor]] = []
        self._fixed = {t.untyped_storage().data_ptr() for t in in_place}
        for number, tensor in enumerate(in_place):
            self._views.append((f"in_place[{number}]", tensor))

    def take(self, value: Any, name: str) -> Any:
        if isinstance(value, tuple):
            taken = [self.take(item, f"{name}[{i}]") for i, item in enumerate(value)]
            return type(value)(*taken) if hasattr(value, "_fields") else tuple(taken)
        if isinstance(value, TensorDescriptor):
            base = self.take(value.base, name)
            return TensorDescriptor(base, value.shape, value.strides, value.block_shape, value.padding)
        if not isinstance(value, Tensor):
            return value
        self._views.append((name, value))
        storage = value.untyped_storage()
        if storage.data_ptr() in self._fixed or value.numel() == 0:
            return value
        if storage.data_ptr() not in self._copies:
            original = torch.empty(0, dtype=torch.uint8).set_(storage)
            block = torch.empty(storage.nbytes() + 2 * _RED_ZONE + _ALIGNMENT, dtype=torch.uint8)
            start = _RED_ZONE + -(block.data_ptr() + _RED_ZONE) % _ALIGNMENT
            copy = block[start : start + storage.nbytes()].copy_(original)
            self._copies[storage.data_ptr()] = original, copy
        copy = self._copies[storage.data_ptr()][1]
        offset = copy.storage_offset() // value.element_size() + value.storage_offset()
        flat = torch.empty(0, dtype=value.dtype).set_(copy.untyped_storage())
        return flat.as_strided(value.shape, value.stride(), offset)

    def memory(self) -> Memory:
        by_storage: dict[int, list[tuple[str, Tensor]]] = {}
        for name, view in self._views:
            if view.numel():
                by_storage.setdefault(view.untyped_storage().data_ptr(), []).append((name, view))
        for address, views in by_storage.items():
            low = self._copies[address][1].data_ptr() if address in self._copies else address
            names = "/".join(dict.fromkeys(name for name, _ in views))
            cell = min(view.element_size() for _, view in views)
            region = Region(names, low, views[0][1].untyped_storage().nbytes(), cell)
            for _, view in views:
                region.allow(view)
            self.regions[address] = region
        return Memory(list(self.regions.values()))

    def give_back(self) -> None:
        for address, (original, copy) in self._copies.items():
            if self.regions[address].written_bytes:
                original.copy_(copy)


def _guarded_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _memory, _order
        if _watch is None:
            return original(self, *args, **kwargs)
        builder = interpreter.interpreter_builder
        options = builder.options
        numerics.dot_flops.clear()
        with _disable_current_modes(), np.errstate(all="ignore"):
            copies = _Copies([*_watch.in_place, *_reached])
            taken = [copies.take(a, n) for a, n in zip(args, self.arg_names, strict=False)]
            named = {name: copies.take(a, name) for name, a in kwargs.items()}
            memory = copies.memory()
            try:
                _memory, _order = memory, None
                if _watch.sample is not None and isinstance(self.grid, tuple):
                    self.grid = (min(self.grid[0], _watch.sample),)
                if _watch.overflow:
                    builder.options = interpreter.InterpreterOptions(debug=True)
                original(self, *taken, **named)
            except Exception as error:
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, GuardFault):
                    cause = cause.__cause__
                if cause is None:
                    raise
                raise GuardFault(f"{self.fn.__name__}: {cause}") from None
            finally:
                _memory, builder.options = None, options
            copies.give_back()
        regions = memory.regions
        _watch.launches.append(
            Launch(
                name=self.fn.__name__,
                programs=int(np.prod(builder.grid_dim)),
                working=len(memory.working),
                read_bytes=sum(region.read_bytes for region in regions),
                written_bytes=sum(region.written_bytes for region in regions),
                loaded_bytes=memory.loaded_bytes,
                stored_bytes=memory.stored_bytes,
                atomics=memory.atomics,
                dot_flops=dict(numerics.dot_flops),
                arguments={region.name: (region.read_bytes, region.written_bytes) for region in regions},
                specialisation=specialisation(self.fn, self.constexprs, args, kwargs),
            )
        )
        return None

    return call


def _shuffled(original: Callable[..., None]) -> Callable[..., None]:
    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        global _order
        if _watch is None or _memory is None:
            return original(self, x, y, z)
        _, ny, nz = self.grid_dim
        if _order is None:
            _order = _watch.random.permutation(int(np.prod(self.grid_dim)))
        program = int(_order[(x * ny + y) * nz + z])
        _memory.begin(program)
        return original(self, program // (ny * nz), program // nz % ny, program % nz)

    return set_grid_idx


def _check(kind: str, pointers: Any, mask: Any, cached: bool = True, releases: bool = False) -> None:
    if mask.data.dtype != np.bool_:  # Triton 3.9's own interpreter refuses it
        raise GuardFault(f"{kind} under a mask of integers: a scalar condition and a block's meet in it; use tl.where")
    if _memory is not None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses, active = np.broadcast_arrays(pointers.data, mask.data)
        _memory.access(kind, addresses, active, size, cached, releases)


def _load(original: Callable[..., Any]) -> Callable[..., Any]:
    def load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        modifier, *_, volatile = rest or (None, None)
        past = str(modifier).rpartition(".")[2].lower() in ("cg", "cv")
        _check("load", pointers, mask, not (past or volatile))
        if other is None and not mask.data.all():  # what a GPU leaves undefined
            element = pointers.get_element_ty()
            dtype = interpreter._get_np_dtype(element)
            if dtype.kind == "f":
                garbage = np.full(pointers.data.shape, np.nan, dtype)
            elif element == tl.bfloat16:
                garbage = np.full(pointers.data.shape, 0x7FC0, dtype)
            else:
                garbage = np.full(pointers.data.shape, 0x5A5A5A5A5A5A5A5A, np.uint64).astype(dtype)
            other = TensorHandle(garbage, element)
        return original(self, pointers, mask, other, *rest, **options)

    return load


def _store(original: Callable[..., Any]) -> Callable[..., Any]:
    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        _check("store", pointers, mask)
        return original(self, pointers, value, mask, *rest, **options)

    return store


def _atomic(original: Callable[..., Any]) -> Callable[..., Any]:
    def atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if pointers.get_element_ty() == tl.bfloat16:
            raise GuardFault("an atomic on bfloat16: accumulate in float32")
        _counted_atomic(pointers, mask, *rest)
        return original(self, operation, pointers, value, mask, *rest)

    return atomic


def _compare_and_swap(original: Callable[..., Any]) -> Callable[..., Any]:
    def swap(self: Any, pointers: Any, compared: Any, value: Any, *rest: Any) -> Any:
        _counted_atomic(pointers, TensorHandle(np.ones(pointers.data.shape, bool), tl.int1), *rest)
        return original(self, pointers, compared, value, *rest)

    return swap


def _counted_atomic(pointers: Any, mask: Any, order: Any, scope: Any = None) -> None:
    if scope == ir.MEM_SYNC_SCOPE.CTA:
        raise GuardFault("an atomic of scope 'cta': other programs may not see it")
    releases = pointers.data.size == 1 and order == ir.MEM_SEMANTIC.ACQUIRE_RELEASE and bool(mask.data.all())
    _check("atomic", pointers, mask, releases=releases)
    if _memory is not None and releases:
        _memory.synchronise(int(np.ravel(pointers.data)[0]))


def _barrier(original: Callable[..., Any]) -> Callable[..., Any]:
    def barrier(self: Any, *rest: Any) -> Any:
        if _memory is not None:
            _memory.barrier()
        return original(self, *rest)

    return barrier


def _claim(self: Any, name: str, values: list[int]) -> None:
    """In place of keeping what a kernel tells the compiler: look whether it is so."""
    if name == "tt.divisibility" and (self.data % np.asarray(values, self.data.dtype)).any():
        raise GuardFault(f"tl.multiple_of(..., {values[0]}) of {self.data.flat[0]}")


def _with_reached(original: Callable[..., Any]) -> Callable[..., Any]:
    def launch(*args: Any, reaches: Iterable[Tensor] = (), **options: Any) -> Any:
        _reached[:] = reaches
        try:
            return original(*args, **options)
        finally:
            _reached.clear()

    return launch


def install() -> None:
    """Route launches, memory accesses and barriers of the interpreter through the checks, in this process."""
    wrappers: dict[str, Callable[..., Any]] = {
        "set_grid_idx": _shuffled,
        "create_masked_load": _load,
        "create_masked_store": _store,
        "create_atomic_rmw": _atomic,
        "create_atomic_cas": _compare_and_swap,
        "create_barrier": _barrier,
    }
    for name, wrap in wrappers.items():
        setattr(InterpreterBuilder, name, wrap(getattr(InterpreterBuilder, name)))
    TensorHandle.set_attr = _claim
    InterpreterBuilder.get_cache_policy = lambda self, modifier, eviction: modifier  # what Triton 3.9 forgets
    from mmc_fast.kernels import common

    common.launch = _with_reached(common.launch)
    setattr(GridExecutor, "__call__", _guarded_call(GridExecutor.__call__))  # noqa: B010 (mypy: a method)
