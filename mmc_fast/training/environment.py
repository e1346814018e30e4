"""What a result depends on besides configuration and data."""

from __future__ import annotations

import platform
from typing import Any

import numpy
import sklearn
import torch

from .model import MultimodalModel

__all__ = ["environment"]


def environment(model: MultimodalModel) -> dict[str, Any]:
    """Versions, machine, threads, device and the EBR backend that ran (None without heads)."""
    device = model.class_prior.device
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "scikit_learn": sklearn.__version__,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "ebr_backend": _backend(model),
    }


def _backend(model: MultimodalModel) -> str | None:
    if model.head is None:
        return None
    from ..ops.ebr import resolve_backend

    return resolve_backend(model.head.backend, next(model.head.parameters()))
