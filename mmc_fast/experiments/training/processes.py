"""The processes of one run, on lightning-fabric: who takes which rows, what they sum, what they agree on."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmc_fast.errors import InputError

from .progress import ProcessesDiffer, ProcessLost

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_TIMEOUT = timedelta(minutes=30)


class Processes:
    """The processes that train one model together; with one process every method returns what it was given.

    Each process holds the same weights and draws the same random numbers; of every batch it takes its own rows. What
    the first process (``first``) decides, reads or writes holds for all. ``device``: where this process trains.
    """

    def __init__(self, fabric: Fabric | None = None, device: torch.device | None = None) -> None:
        self.fabric = fabric
        self.rank, self.size = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)
        self.device = device or torch.device("cpu") if fabric is None else fabric.device
        self.kept: Callable[[], str] = lambda: "start again with resume"  # what a message says about checkpoints

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, n: int) -> slice:
        """The share of this process of ``n`` rows: contiguous, sizes differ by at most one, may be empty."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum(self, value: Tensor) -> Tensor:
        """``value`` summed over the processes (on the device of ``value``)."""
        if self.fabric is None or self.size == 1:
            return value
        with self._together():
            return self.fabric.all_reduce(value.detach().clone(), reduce_op="sum").to(value.device)  # type: ignore[union-attr]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one of the processes."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag))) > 0)

    def gather_rows(self, mine: Tensor, n: int) -> Tensor:
        """All ``n`` rows in order, from the :meth:`rows` that each process has."""
        if self.size == 1:
            return mine
        full = mine.new_zeros(n, *mine.shape[1:])
        full[self.rows(n)] = mine
        return self.sum(full)

    def reduce_gradients(self, parameters: Sequence[torch.nn.Parameter], extras: Tensor) -> Tensor:
        """Sum the gradients and ``extras`` (float32 vector) over the processes in one all-reduce; returns the extras.

        A parameter that has a gradient in one of the processes has one in all of them afterwards; one that has none
        anywhere keeps none, so that it takes no step.
        """
        if self.size == 1:
            return extras
        grads = [p.grad for p in parameters]
        parts = [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(parameters, grads, strict=True)]
        has = torch.tensor([g is not None for g in grads], dtype=torch.float32, device=extras.device)
        flat = self.sum(torch.cat([*parts, has, extras]))
        pieces = flat.split([*(len(part) for part in parts), len(grads), len(extras)])
        for p, piece, found in zip(parameters, pieces, pieces[-2].tolist(), strict=False):
            p.grad = piece.view_as(p) if found else None
        return pieces[-1]

    def broadcast(self, value: Any) -> Any:
        """What the first process gives; the others may give anything."""
        if self.fabric is None or self.size == 1:
            return value
        with self._together():
            return self.fabric.broadcast(value if self.first else None)

    def agree(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns in the first process; its error is raised in all.

        Raises:
            InputError, ProcessLost: where ``work`` failed in the first process.
        """
        if self.size == 1:
            return work()
        value, told, failure = None, None, None
        if self.first:
            try:
                value = work()
            except BaseException as error:
                told, failure = (str(error), isinstance(error, InputError)), error
        value, told = self.broadcast((value, told))
        if failure is not None:
            raise failure
        if told is not None:
            raise (InputError if told[1] else ProcessLost)(f"in the first process: {told[0]}")
        return value

    def check_same(self, what: str, content: bytes, advice: str) -> None:
        """Raise ``ProcessesDiffer`` unless ``content`` is the same in all processes."""
        if self.size == 1:
            return
        mine = hashlib.sha256(content).hexdigest()
        differs = torch.zeros(self.size)
        differs[self.rank] = float(self.broadcast(mine) != mine)
        others = self.sum(differs).nonzero().flatten().tolist()
        if others:
            raise ProcessesDiffer(f"process {others[0]} of {self.size} has other {what} than process 0; {advice}")

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """A collective: where another process is gone it fails here, and the message says what is left."""
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:160]
            raise ProcessLost(
                f"process {self.rank} of {self.size}: another process of this run died or does not answer ({reason}); "
                f"{self.kept()}"
            ) from error


def join(device: str, distributed: bool | None) -> Processes:
    """The processes of a run on ``device``: those that torchrun started, or this one alone.

    ``distributed`` None: several where torchrun started several; True: the same, and an error without torchrun; False:
    this process alone. The process group (gloo on the CPU, nccl on CUDA) lives as long as the process.

    Raises:
        InputError: no such device here, or ``distributed=True`` without torchrun.
    """
    found, launched = check_device(device), dist.is_available() and dist.is_torchelastic_launched()
    if distributed and not launched:
        raise InputError("distributed=True needs several processes; start the program with torchrun")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if distributed is False or not launched or size == 1:
        return Processes(device=found)
    from lightning_fabric import Fabric  # takes seconds
    from lightning_fabric.plugins.environments import TorchElasticEnvironment
    from lightning_fabric.strategies import DDPStrategy

    here = int(os.environ["LOCAL_WORLD_SIZE"])
    strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment(), timeout=_TIMEOUT)
    fabric = Fabric(accelerator=found.type, devices=here, num_nodes=size // here, strategy=strategy)
    fabric.launch()
    atexit.register(_leave)
    return Processes(fabric)


def _leave() -> None:
    """Close the process group before the interpreter ends: its threads abort a process that exits under them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def first_process() -> bool:
    """Whether this is the process that speaks for a distributed run; True outside of one."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


def check_device(device: str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device is {device!r}; allowed are cpu, cuda and cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"device is {device!r}; allowed are cpu, cuda and cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device is {device!r} but {torch.cuda.device_count()} CUDA devices are visible; use cpu")
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else found
