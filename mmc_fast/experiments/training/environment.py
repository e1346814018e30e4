"""What a result depends on besides configuration and data."""

from __future__ import annotations

import platform
from typing import Any

import numpy
import sklearn
import torch

from mmc_fast.ops.dispatch import ran

from .model import MultimodalModel

__all__ = ["environment"]


def environment(model: MultimodalModel, before: dict[str, int]) -> dict[str, Any]:
    """Versions, machine, threads, device, and the backends that carried out the EBR step since ``before``.

    ``before``: :func:`mmc_fast.ops.dispatch.ran` at the start of the run. "ebr_backend" is None where the op never ran.
    """
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
        "ebr_backend": _ebr_backend(before),
    }


def _ebr_backend(before: dict[str, int]) -> str | None:
    """What was counted by the code that did the work, not what was asked for: "eager", "reference", "cpp/avx512", ..."""
    prefix = "ebr_step/"
    found = [n.removeprefix(prefix) for n, k in ran().items() if n.startswith(prefix) and k > before.get(n, 0)]
    return " and ".join(found) or None
