"""``mmc_fast.explain``: which backends can run an op, and why; ``agop`` too, which is made of several."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmc_fast.errors import InputError
from mmc_fast.ops.dispatch import Backend
from mmc_fast.ops.dispatch import explain as explain_op

from .accumulator import AGOPAccumulator

__all__ = ["explain"]


def explain(op_name: str, *args: Any) -> list[Backend]:
    """Say which backends of an op can run and why, best first; the first usable row is what ``backend="auto"`` takes.

    Args:
        op_name: "ebr_step", "agop", or one of the primitives that AGOP is made of ("relu_coactivation_update",
            "derivative_gram_update", "syrk_update", "chain_gram_update", "agop_finalise").
        args: the tensors of the call; for "agop" the head and, if at hand, its inputs. Without them only what holds for
            every call is judged (installed, built, device there), for "agop" that of a head with one hidden ReLU layer.

    Raises:
        InputError: an unknown op, and for "agop" what :func:`mmc_fast.agop` raises for the head.

    Examples:
        >>> [row.backend for row in mmc_fast.explain("ebr_step") if row.backend in ("eager", "reference")]
        ['eager', 'reference']
    """
    if op_name != "agop":
        return explain_op(op_name, *args)
    if not args:
        return explain_op("relu_coactivation_update")
    head, *inputs = args
    if not isinstance(head, nn.Module):
        raise InputError(f"explain: 'agop' takes the head, a torch.nn.Module; got {type(head).__name__}")
    method = AGOPAccumulator(head)._method
    if method is None:
        return [Backend("eager", True, "usable: vector-Jacobian products, as this head is no chain of known layers")]
    if method.primitive is None:
        return [Backend("eager", True, f"usable: {method.name}, which needs no kernel")]
    rows = explain_op(method.primitive, *head.parameters(), *inputs)
    return [row._replace(reason=f"usable: {method.name}") if row.usable else row for row in rows]
