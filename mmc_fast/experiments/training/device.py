"""The device of a run, checked, and that of one of its processes."""

from __future__ import annotations

import os

import torch

from mmc_fast.errors import InputError

from .world import World

__all__ = ["check_device", "device_of"]


def check_device(device: str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device is {device!r}; allowed are cpu, cuda and cuda:N") from error
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"device is {device!r}; allowed are cpu, cuda and cuda:N")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device is {device!r} but {torch.cuda.device_count()} CUDA devices are visible; use cpu")
    return found


def device_of(device: torch.device, world: World) -> torch.device:
    """The device of this process: with several of them "cuda" is that of the local rank."""
    if device.type != "cuda" or device.index is not None or world.size == 1:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", world.rank % torch.cuda.device_count())))
