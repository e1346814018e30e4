"""Memory of one interpreted launch: which elements exist, who touched them, what that says about races and traffic."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

__all__ = ["GuardFault", "Memory", "Region"]


class GuardFault(RuntimeError):
    """A kernel did what is wrong or undefined on a GPU."""


@dataclass
class Region:
    """One storage: its cells (elements of the narrowest view), and per cell the programs (plus 1) that touched it."""

    name: str
    low: int  # address of the first byte
    size: int  # bytes
    cell: int  # bytes
    allowed: np.ndarray = field(init=False)  # cells that some argument's view covers
    loaded: np.ndarray = field(init=False)
    loaded_by_several: np.ndarray = field(init=False)
    stored: np.ndarray = field(init=False)
    added: np.ndarray = field(init=False)  # atomics
    stored_at: np.ndarray = field(init=False)  # interval between barriers
    loaded_at: np.ndarray = field(init=False)
    read_bytes: int = 0  # that the launch read at least once
    written_bytes: int = 0  # that the launch wrote at least once

    def __post_init__(self) -> None:
        cells = -(-self.size // self.cell)
        self.allowed, self.loaded_by_several = np.zeros(cells, bool), np.zeros(cells, bool)
        self.loaded, self.stored, self.added = (np.zeros(cells, np.int32) for _ in range(3))
        self.stored_at, self.loaded_at = np.zeros(cells, np.int32), np.zeros(cells, np.int32)

    def allow(self, view: Tensor) -> None:
        """Add the elements of a view of this storage to those that may be touched."""
        if view.numel() == 0:
            return
        step = view.element_size() // self.cell
        offset = view.storage_offset() * step
        cells = torch.from_numpy(self.allowed)
        for part in range(step):
            cells.as_strided(view.shape, [s * step for s in view.stride()], offset + part).fill_(True)

    def touch(self, owner: np.ndarray, cells: np.ndarray, program: int) -> int:
        """Enter the program as the owner of cells; returns the bytes of those that had none."""
        first = cells[owner[cells] == 0]
        owner[cells] = program
        return self.cell * (int(np.unique(first).size) if first.size else 0)


class Memory:
    """The regions of one launch and the checks of every access."""

    def __init__(self, regions: list[Region]) -> None:
        self.regions = sorted(regions, key=lambda region: region.low)
        self._lows = np.array([region.low for region in self.regions], np.uint64)
        self.program = 0  # number of the running program, from 1
        self._interval = 0
        self._dirty = False
        self._ordered_before: set[int] = set()  # programs whose stores this one may read
        self._acquired: set[int] = set()  # the same, once a barrier tells all threads
        self._tiles: set[bytes] = set()  # loaded since the last barrier
        self._cached = self._same_tile = False  # of the access under way
        self._released: dict[int, set[int]] = {}  # by address of a counter
        self.loaded_bytes = self.stored_bytes = self.atomics = 0

    def begin(self, program: int) -> None:
        """Start the program of this number (from 0)."""
        self.program = program + 1
        self._ordered_before, self._acquired = set(), set()
        self.barrier()

    def barrier(self) -> None:
        """Order what the program did before against what it does next."""
        self._interval += 1
        self._dirty = False
        self._ordered_before |= self._acquired
        self._tiles.clear()

    def access(self, kind: str, addresses: np.ndarray, mask: np.ndarray, size: int, cached: bool = True) -> None:
        """Check and count one load, store or atomic of elements of ``size`` bytes; ``cached``: by the first-level cache."""
        tile = hashlib.blake2b(np.ascontiguousarray(addresses).tobytes(), digest_size=16).digest()
        self._cached, self._same_tile = cached, tile in self._tiles
        if kind == "load":
            self._tiles.add(tile)
        active = addresses[mask]
        if active.size == 0:
            return
        if (active % np.uint64(size)).any():
            raise GuardFault(f"program {self.program - 1}: {kind} at an address that is no multiple of {size} bytes")
        if kind == "load":
            self.loaded_bytes += active.size * size
        elif kind == "store":
            self.stored_bytes += active.size * size
            self._dirty = True
        else:
            self.atomics += active.size
        for region, cells in self._cells(kind, active, size):
            getattr(self, f"_{kind}")(region, cells)

    def synchronise(self, address: int) -> None:
        """Acquire and release through one counter: what others released there is ordered before this program."""
        if address not in self._released and (begin := ctypes.c_int32.from_address(address).value):
            raise GuardFault(f"a counter starts the launch at {begin}: was it reset?")
        known = self._released.setdefault(address, set())
        self._acquired |= known
        if not self._dirty:  # stores that no barrier follows are not published
            known |= {self.program, *self._acquired}

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

    def _clash(self, kind: str, other: str, region: Region, cells: np.ndarray, owner: np.ndarray) -> None:
        wrong = (owner != 0) & (owner != self.program)
        if wrong.any() and self._ordered_before:
            wrong &= ~np.isin(owner, list(self._ordered_before))
        if wrong.any():
            raise GuardFault(
                f"race: {kind} by program {self.program - 1} and {other} by program {int(owner[wrong][0]) - 1} "
                f"on element {int(cells[wrong][0])} of '{region.name}'"
            )

    def _load(self, region: Region, cells: np.ndarray) -> None:
        self._clash("load", "store", region, cells, region.stored[cells])
        self._clash("load", "atomic", region, cells, region.added[cells])
        if self._cached and (foreign := (region.stored[cells] != 0) & (region.stored[cells] != self.program)).any():
            raise GuardFault(
                f"program {self.program - 1} loads element {int(cells[foreign][0])} of '{region.name}', which another "
                "program stored, through the first-level cache; use cache_modifier='.cg'"
            )
        fresh = (region.stored[cells] == self.program) & (region.stored_at[cells] == self._interval)
        if fresh.any():
            raise GuardFault(
                f"program {self.program - 1} loads element {int(cells[fresh][0])} of '{region.name}', which it stored "
                "itself, without a barrier between"
            )
        before = region.loaded[cells]
        region.loaded_by_several[cells] |= (before != 0) & (before != self.program)
        region.read_bytes += region.touch(region.loaded, cells, self.program)
        region.loaded_at[cells] = self._interval

    def _store(self, region: Region, cells: np.ndarray) -> None:
        if np.unique(cells).size != cells.size:
            raise GuardFault(f"program {self.program - 1}: two lanes of one store meet in '{region.name}'")
        self._clash("store", "store", region, cells, region.stored[cells])
        self._clash("store", "atomic", region, cells, region.added[cells])
        self._clash("store", "load", region, cells, region.loaded[cells])
        if not self._ordered_before and region.loaded_by_several[cells].any():
            raise GuardFault(f"race: program {self.program - 1} stores what several programs load in '{region.name}'")
        early = (region.loaded[cells] == self.program) & (region.loaded_at[cells] == self._interval)
        if early.any() and not self._same_tile:  # a tile that goes back where it came from stays with its threads
            raise GuardFault(
                f"program {self.program - 1} stores element {int(cells[early][0])} of '{region.name}', which another of "
                "its threads may still have to load, without a barrier between"
            )
        region.written_bytes += region.touch(region.stored, cells, self.program)
        region.stored_at[cells] = self._interval

    def _atomic(self, region: Region, cells: np.ndarray) -> None:
        self._clash("atomic", "store", region, cells, region.stored[cells])
        self._clash("atomic", "load", region, cells, region.loaded[cells])
        fresh = region.touch(region.added, cells, self.program)
        region.read_bytes += fresh
        region.written_bytes += fresh
