"""The one tolerance rule: as good as plain PyTorch in the same precision, against float64 truth."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_as_accurate", "relative_error"]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """``‖value − truth‖ / ‖truth‖`` in float64; 0 where both are zero, infinity for any NaN or a false zero."""
    value, truth = value.detach().double().cpu(), truth.detach().double().cpu()
    if value.shape != truth.shape:
        raise AssertionError(f"shape {list(value.shape)} against {list(truth.shape)}")
    gap, size = float(torch.linalg.vector_norm(value - truth)), float(torch.linalg.vector_norm(truth))
    if gap == 0:
        return 0.0
    return gap / size if size > 0 and gap == gap else float("inf")


def assert_as_accurate(
    value: Tensor, plain: Tensor, truth: Tensor, *, amplification: float = 1.0, what: str = "value"
) -> None:
    """Require ``‖y − y64‖ / ‖y64‖ ≤ 2 · (the same of plain PyTorch) + 8 eps · amplification``.

    ``plain`` is PyTorch's own result in the precision under test, whose eps counts; ``truth`` is float64.
    ``amplification`` is the condition of the problem where a difference of large numbers is asked for: the size of
    what is subtracted over the size of what is left. Raises AssertionError with all three numbers.
    """
    eps = torch.finfo(plain.dtype).eps
    error, reference = relative_error(value, truth), relative_error(plain, truth)
    allowed = 2 * reference + 8 * eps * max(1.0, amplification)
    if not error <= allowed:
        raise AssertionError(
            f"{what}: relative error {error:.3g}, plain {plain.dtype} {reference:.3g}, allowed {allowed:.3g}"
        )
