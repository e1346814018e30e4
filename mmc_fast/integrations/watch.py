"""``Watch``: tells once where training leaves the heads as they are."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmc_fast.nn import EBRHead

_PATIENCE = 20  # training forwards in which other parameters moved and these did not


def held_by(optimizers: Iterable[torch.optim.Optimizer]) -> set[int]:
    """The ids of all parameters of some optimisers."""
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def _parts(head: EBRHead) -> dict[str, list[nn.Parameter]]:
    parts = {"encoders": head.encoders, "decoders": head.decoders, "discriminator": head.discriminator}
    return {name: list(module.parameters()) for name, module in parts.items()}


class Watch:
    """Looks at parameters when training forwards begin, until the heads have moved."""

    def __init__(self, model: nn.Module, head: EBRHead) -> None:
        self.model, self.head = model, head
        self.done = False
        self.initial: list[tuple[int, int]] | None = [(id(p), p._version) for p in head.parameters()]
        self._forwards = 0
        self._moved = 0  # forwards since others were first seen to move
        self._parts: dict[str, list[nn.Parameter]] = {}
        self._others: list[nn.Parameter] = []
        self._start: tuple[int, dict[str, Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_start": None, "_parts": {}, "_others": []}  # a copy counts its own versions

    def evaluated(self, where: str) -> None:
        """Called when a forward in evaluation begins: tells once where nothing has trained or loaded the heads."""
        before, self.initial = self.initial, None
        if before and before == [(id(p), p._version) for p in self.head.parameters()]:
            warnings.warn(
                f"apply_ebr: the heads at {where} have their initial random weights in evaluation; train them, or take theirs "
                "from a file with mmc_fast.load_ebr(model, path)",
                stacklevel=_users_line(),
            )

    def look(self, where: str) -> None:
        """Called when a training forward begins; ``where``: the sites, for the message."""
        self._forwards += 1
        if self._start is None:
            self._parts = {name: ps for name, ps in _parts(self.head).items() if ps}
            mine = {id(p) for ps in self._parts.values() for p in ps}
            self._others = [p for p in self.model.parameters() if id(p) not in mine]
            values = {name: ps[-1].detach().clone() for name, ps in self._parts.items()}
            self._start = self._versions(), values
            return
        if not self._moved and self._forwards & (self._forwards - 1):  # no step yet: look at 2, 4, 8, ... forwards
            return
        others, values = self._start
        parts = self._parts
        still = [name for name in parts if torch.equal(parts[name][-1], values[name])]
        self.done = not still
        if not still or others == self._versions():
            return
        self._moved += 1
        if self._moved == 1:
            held = held_by(o for o in gc.get_objects() if issubclass(type(o), torch.optim.Optimizer))
            lost = [name for name in still if not any(id(p) in held for p in parts[name])]
            if held and lost:
                frozen = not any(p.requires_grad for name in lost for p in parts[name])
                why = "frozen (requires_grad is False)" if frozen else "in no optimiser"
                self._tell(f"parameters of the heads at {where} are {why}: {', '.join(lost)}")
        elif self._moved >= _PATIENCE:
            told = f"in {self._moved} steps in which the model moved"
            self._tell(f"parameters of the heads at {where} got no gradient {told}: {', '.join(still)}")

    def _versions(self) -> int:
        return sum(p._version for p in self._others)

    def _tell(self, what: str) -> None:
        self.done = True
        warnings.warn(
            f"apply_ebr: {what}; build the optimiser after apply_ebr, or optimizer.add_param_group({{'params': "
            "handle.parameters()}), and add handle.losses() to your loss",
            stacklevel=_users_line(),
        )


def _users_line() -> int:
    """The stack level, seen from the caller, of the first frame that is neither torch's nor ours."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "mmc_fast"):
        level, frame = level + 1, frame.f_back
    return level
