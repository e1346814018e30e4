"""One forward on an example that leaves no trace: which modules run, in what order, and what they return."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmc_fast.errors import InputError


@dataclass
class Ran:
    """How a module ran: number of calls, place of its first start and last end in the order of events, last output."""

    calls: int = 0
    start: int = -1
    end: int = -1
    output: Any = None


def call(model: nn.Module, example: Any) -> Any:
    """``model(*example)`` for a tuple or list, ``model(**example)`` for a mapping, else ``model(example)``."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def trace(model: nn.Module, example: Any, names: Iterable[str]) -> dict[str, Ran]:
    """Run ``model`` once on ``example`` in evaluation mode without gradients, watching the named submodules.

    Training flags, buffers and random generators are put back afterwards.

    Raises:
        InputError: the forward fails.
    """
    ran = {name: Ran() for name in names}
    clock = iter(range(10**9))
    hooks = []
    for name, record in ran.items():
        module = model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(_starts(record, clock)))
        hooks.append(module.register_forward_hook(_ends(record, clock)))
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            call(model, example)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"apply_ebr: the forward on example failed ({type(error).__name__}: {first}); give the arguments of one "
            "call: a tensor, a tuple or a dict of keywords"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                _put_back(buffer, before)
    return ran


def _put_back(buffer: Tensor, before: Tensor) -> None:
    if not torch.equal(buffer, before):
        buffer.copy_(before)


def _starts(record: Ran, clock: Any) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        record.calls += 1
        if record.start < 0:
            record.start = next(clock)

    return hook


def _ends(record: Ran, clock: Any) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        record.end, record.output = next(clock), output

    return hook
