"""The processes of one run: who takes which rows, what they sum, and what they agree on."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from mmc_fast.errors import InputError

from .progress import ProcessesDiffer, ProcessLost

__all__ = ["World", "first_process", "join_world"]

_TIMEOUT = timedelta(minutes=30)


class World:
    """The processes that train one model together; with one process every method returns what it was given.

    Each process holds the same weights and draws the same random numbers; of every batch it takes its own rows. What
    the first process (``first``) decides, reads or writes holds for all.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.size = rank, size
        self.device = device or torch.device("cpu")
        self.kept: Callable[[], str] = lambda: "start again with resume"  # what a message says about checkpoints

    @property
    def first(self) -> bool:
        return self.rank == 0

    def rows(self, n: int) -> slice:
        """The share of this process of ``n`` rows: contiguous, sizes differ by at most one, may be empty."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum(self, value: Tensor) -> Tensor:
        """``value`` summed over the processes (on the device of ``value``)."""
        if self.size == 1:
            return value
        moved = value.detach().to(self.device, copy=True)
        with self._together():
            dist.all_reduce(moved)
        return moved.to(value.device)

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
        parts = [torch.zeros_like(p).reshape(-1) if g is None else g.reshape(-1) for p, g in zip(parameters, grads)]  # noqa: B905
        has = torch.tensor([g is not None for g in grads], dtype=torch.float32, device=extras.device)
        flat = self.sum(torch.cat([*parts, has, extras]))
        pieces = flat.split([*(len(part) for part in parts), len(grads), len(extras)])
        wanted = pieces[-2].tolist()
        for p, piece, found in zip(parameters, pieces, wanted, strict=False):
            p.grad = piece.view_as(p) if found else None
        return pieces[-1]

    def agree(self, work: Callable[[], Any]) -> Any:
        """What ``work`` (JSON values) returns in the first process; its error is raised in all.

        Raises:
            InputError, ProcessLost: where ``work`` failed in the first process.
        """
        if self.size == 1:
            return work()
        answer: dict[str, Any] = {}
        failure: BaseException | None = None
        if self.first:
            try:
                answer = {"value": work()}
            except BaseException as error:
                failure = error
                answer = {"error": str(error), "input": isinstance(error, InputError)}
        answer = json.loads(self._broadcast(json.dumps(answer).encode()).decode())
        if failure is not None:
            raise failure
        if "error" in answer:
            raise (InputError if answer["input"] else ProcessLost)(f"in the first process: {answer['error']}")
        return answer["value"]

    def share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The named tensors of the first process, on the CPU; the others give anything."""
        if self.size == 1:
            return dict(tensors)
        content = b""
        if self.first:
            content = tensors_to_bytes({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()})
        return tensors_from_bytes(self._broadcast(content))

    def check_same(self, what: str, content: bytes, advice: str) -> None:
        """Raise ``ProcessesDiffer`` unless ``content`` is the same in all processes."""
        if self.size == 1:
            return
        mine = int.from_bytes(hashlib.sha256(content).digest()[:6], "big")
        slots = torch.zeros(self.size, dtype=torch.float64)  # 48 bits are exact
        slots[self.rank] = mine
        found = self.sum(slots).tolist()
        others = [rank for rank, value in enumerate(found) if value != found[0]]
        if others:
            raise ProcessesDiffer(f"process {others[0]} of {self.size} has other {what} than process 0; {advice}")

    def _broadcast(self, content: bytes) -> bytes:
        length = self.sum(torch.tensor([float(len(content))], dtype=torch.float64) * self.first)
        buffer = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.first:
            buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        with self._together():
            dist.broadcast(buffer, src=0)
        return buffer.cpu().numpy().tobytes()

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


def join_world(device: torch.device, distributed: bool | None) -> World:
    """The world of this process.

    ``distributed`` None: all processes of the default process group where there is one, or those that torchrun started;
    True: the same, and an error where there is neither; False: this process alone. A group that is made here (gloo on
    the CPU, nccl on CUDA) lives as long as the process: under torchrun a second one could not be made.
    """
    if distributed is False or not dist.is_available():
        return World()
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched():
            if distributed:
                raise InputError("distributed=True needs a process group; start the program with torchrun")
            return World()
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return World()
        if device.type == "cuda":
            torch.cuda.set_device(device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
        atexit.register(_leave)
    where = device if dist.get_backend() == "nccl" else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), where)


def first_process() -> bool:
    """Whether this is the process that speaks for a distributed run; True outside of one."""
    return not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
