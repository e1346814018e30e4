"""Zeroed counters by which the last program of a launch knows that it is the last.

A kernel leaves its counter at zero, so one memset serves all launches of a process. Launches that may run at the same
time hold different counters: calls take them in turn, and a call that is captured into a CUDA graph keeps its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["take"]

_COUNT = 1024
_pools: dict[torch.device, Tensor] = {}
_taken: dict[torch.device, list[int]] = {}  # calls, captured calls


def take(device: torch.device) -> Tensor:
    """An int32 ``[1]`` that is zero before the launch and after it."""
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if device not in _pools:
        if capturing:  # a pool made now would belong to the graph
            return torch.zeros(1, dtype=torch.int32, device=device)
        _pools[device], _taken[device] = torch.zeros(_COUNT, dtype=torch.int32, device=device), [0, 0]
    taken = _taken[device]
    half = _COUNT // 2
    if capturing:
        if taken[1] == half:  # the graph gets a counter, and a memset, of its own
            return torch.zeros(1, dtype=torch.int32, device=device)
        at, taken[1] = half + taken[1], taken[1] + 1
    else:
        at, taken[0] = taken[0] % half, taken[0] + 1
    return _pools[device][at : at + 1]
