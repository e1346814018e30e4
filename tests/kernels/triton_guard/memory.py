"""Memory of one interpreted launch: which elements exist, who touched them, what that says about races and traffic."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = ["GuardFault", "Memory", "Region"]


class GuardFault(RuntimeError):
    """A kernel did what is wrong or undefined on a GPU."""


class Touched:
    """Which programs loaded, stored or added atomically to the cells of a region: the last, when, and by which addresses.

    Intervals between barriers are numbered through the launch. ``latest``: the last interval of each program in the region.
    """

    def __init__(self, cells: int) -> None:
        self.owner, self.at, self.tile = (np.zeros(cells, np.int32) for _ in range(3))  # tile 0: by several addresses
        self.several = np.zeros(cells, bool)  # programs
        self.latest: dict[int, int] = {}

    def enter(self, cells: np.ndarray, program: int, interval: int, tile: int) -> int:
        """Enter an access; returns how many of the cells had none."""
        owner = self.owner[cells]
        self.several[cells[(owner != 0) & (owner != program)]] = True
        again = (owner == program) & (self.at[cells] == interval) & (self.tile[cells] != tile)
        self.tile[cells] = np.where(again, 0, tile)
        self.owner[cells], self.at[cells] = program, interval
        self.latest[program] = max(interval, self.latest.get(program, 0))
        first = cells[owner == 0]
        return int(np.unique(first).size) if first.size else 0

    def foreign(self, cells: np.ndarray, program: int, ordered: dict[int, int]) -> np.ndarray:
        """Whether another program touched the cell, not in an interval before the one by which it is ``ordered``."""
        owner = self.owner[cells]
        wrong = (owner != 0) & (owner != program)
        for other in np.unique(owner[wrong]) if ordered else ():
            wrong &= (owner != other) | (self.at[cells] >= ordered.get(int(other), 0))
        late = (other for other, at in self.latest.items() if other != program and at >= ordered.get(other, 0))
        return wrong | self.several[cells] if next(late, None) is not None else wrong

    def own(self, cells: np.ndarray, program: int, interval: int, tile: int = 0) -> np.ndarray:
        """Whether this program touched the cell in this interval, by other addresses than those of ``tile``."""
        touched = (self.owner[cells] == program) & (self.at[cells] == interval)
        return touched & (self.tile[cells] != tile) if tile else touched


@dataclass
class Region:
    """One storage: its cells (elements of the narrowest view), and who touched them."""

    name: str
    low: int  # address of the first byte
    size: int  # bytes
    cell: int  # bytes
    allowed: np.ndarray = field(init=False)  # cells that some argument's view covers
    touched: dict[str, Touched] = field(init=False, default_factory=dict)  # by kind of access
    read_bytes: int = 0  # that the launch read at least once
    written_bytes: int = 0  # that the launch wrote at least once

    def __post_init__(self) -> None:
        self.allowed = np.zeros(-(-self.size // self.cell), bool)

    def allow(self, view: Tensor) -> None:
        """Add the elements of a view of this storage to those that may be touched."""
        if view.numel() == 0:
            return
        step = view.element_size() // self.cell
        offset = view.storage_offset() * step
        cells = torch.from_numpy(self.allowed)
        for part in range(step):
            cells.as_strided(view.shape, [s * step for s in view.stride()], offset + part).fill_(True)


class Memory:
    """The regions of one launch and the checks of every access."""

    def __init__(self, regions: list[Region]) -> None:
        self.regions = sorted(regions, key=lambda region: region.low)
        self._lows = np.array([region.low for region in self.regions], np.uint64)
        self.program = 0  # number of the running program, from 1
        self._interval = 0  # between barriers
        self._ordered: dict[int, int] = {}  # program: what it did before this interval is ordered before this program
        self._acquired: dict[int, int] = {}  # the same, once a barrier tells all threads
        self._released: dict[int, dict[int, int]] = {}  # the same, by address of a counter
        self._cached, self._tile = True, 0  # of the access under way
        self.loaded_bytes = self.stored_bytes = self.atomics = 0
        self.working: set[int] = set()  # programs that touched more than single elements

    def begin(self, program: int) -> None:
        """Start the program of this number (from 0)."""
        self.program = program + 1
        self._ordered, self._acquired = {}, {}
        self.barrier()

    def barrier(self) -> None:
        """Order what the program did before against what it does next."""
        self._interval += 1
        self._ordered = self._acquired.copy()

    def access(
        self, kind: str, addresses: np.ndarray, mask: np.ndarray, size: int, cached: bool = True, releases: bool = False
    ) -> None:
        """Check and count one load, store or atomic of elements of ``size`` bytes.

        ``cached``: by the first-level cache. ``releases``: an atomic that is ordered before what its release orders.
        """
        active = addresses[mask]
        if active.size == 0:
            return
        if (active % np.uint64(size)).any():
            raise GuardFault(f"program {self.program - 1}: {kind} at an address that is no multiple of {size} bytes")
        self._cached, self._tile = cached, 1 + zlib.crc32(np.ascontiguousarray(addresses)) // 4
        if active.size > 1:
            self.working.add(self.program)
        if kind == "load":
            self.loaded_bytes += active.size * size
        elif kind == "store":
            self.stored_bytes += active.size * size
        else:
            self.atomics += active.size
        for region, cells in self._cells(kind, active, size):
            self._check(kind, region, cells)
            touched = region.touched.setdefault(kind, Touched(region.allowed.size))
            fresh = touched.enter(cells, self.program, self._interval - releases, self._tile) * region.cell
            region.read_bytes += fresh * (kind != "store")
            region.written_bytes += fresh * (kind != "load")

    def synchronise(self, address: int) -> None:
        """Acquire and release through one counter: what others released there is ordered before this program.

        It releases what all threads did before the last barrier, and what this program acquired itself.
        """
        if address not in self._released and (begin := ctypes.c_int32.from_address(address).value):
            raise GuardFault(f"a counter starts the launch at {begin}: was it reset?")
        known = self._released.setdefault(address, {})
        known[self.program] = self._interval
        for program, interval in known.items():
            self._acquired[program] = max(interval, self._acquired.get(program, 0))
        known |= self._acquired

    def _cells(self, kind: str, active: np.ndarray, size: int) -> Iterator[tuple[Region, np.ndarray]]:
        owner = np.searchsorted(self._lows, active, side="right").astype(np.int64) - 1
        for index in np.unique(owner):
            mine = active[owner == index]
            if index < 0:
                self._outside(kind, int(mine[0]), size)
            region = self.regions[index]
            offset = (mine - np.uint64(region.low)).astype(np.int64)
            if (offset + size > region.size).any():
                self._outside(kind, int(mine[offset + size > region.size][0]), size)
            if size < region.cell:
                raise GuardFault(f"{kind} of {size} bytes in '{region.name}', whose elements have {region.cell}")
            first = offset // region.cell
            cells = first if size == region.cell else (first[:, None] + np.arange(size // region.cell)).ravel()
            forbidden = ~region.allowed[cells]
            if forbidden.any():
                self._outside(kind, region.low + int(cells[forbidden][0]) * region.cell, size)
            yield region, cells

    def _outside(self, kind: str, address: int, size: int) -> None:
        near = min(
            self.regions, key=lambda r: max(r.low - address, address - r.low - r.size + 1, 0), default=None
        )  # fmt: skip
        where = f"byte {address - near.low} of '{near.name}' ({near.size} bytes)" if near else "no tensor argument"
        raise GuardFault(f"out of bounds: program {self.program - 1}, {kind} of {size} bytes at {where}")

    def _check(self, kind: str, region: Region, cells: np.ndarray) -> None:
        if kind == "store" and np.unique(cells).size != cells.size:
            raise GuardFault(f"program {self.program - 1}: two lanes of one store meet in '{region.name}'")
        for other, touched in region.touched.items():
            if kind == other != "store":
                continue
            wrong = touched.foreign(cells, self.program, self._ordered)
            if wrong.any():
                self._fault(f"race: {kind}", region, cells[wrong], f", {other} by another program, unordered")
            # a tile that goes back where it came from, or again where it went, stays with its threads
            same = self._tile if kind == "store" and other != "atomic" else 0
            wrong = touched.own(cells, self.program, self._interval, same)
            if wrong.any():
                self._fault(kind, region, cells[wrong], f" after {other} by its own threads without a barrier between")
            if kind == "load" and self._cached:
                foreign = touched.owner[cells]
                wrong = (foreign != 0) & (foreign != self.program)
                if wrong.any():
                    why = f", {other} by another program, through the first-level cache; use cache_modifier='.cg'"
                    self._fault(kind, region, cells[wrong], why)

    def _fault(self, what: str, region: Region, cells: np.ndarray, why: str) -> None:
        raise GuardFault(f"{what} by program {self.program - 1} of element {int(cells[0])} of '{region.name}'{why}")
