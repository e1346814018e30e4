"""A GPU for ``--device``: found, or refused with one line that says what is missing."""

from __future__ import annotations

import torch

from mmc_fast.errors import InputError


def gpu(command: str, name: str) -> torch.device:
    """The CUDA device of this name ("cuda" or "cuda:N"); raises :class:`InputError` where torch sees none."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type != "cuda":
        raise InputError(f"{command}: --device {name}; allowed are cpu, cuda and cuda:N")
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise InputError(
            f"{command}: --device {name} needs a GPU and torch sees none (torch {torch.__version__}, {built}); "
            "nothing was run; on a machine with a GPU install a CUDA build of torch, or leave --device out"
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise InputError(f"{command}: --device {name}; {torch.cuda.device_count()} GPUs are here, counted from 0")
    return torch.device("cuda", device.index or 0)
