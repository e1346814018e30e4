"""``mmc_fast.explain``: which backends can run an op, and why; ``agop`` too, which is made of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmc_fast.errors import InputError
from mmc_fast.nn.ebr import EBRHead, plain_parameters
from mmc_fast.ops.dispatch import Backend
from mmc_fast.ops.dispatch import explain as explain_op

from .accumulator import AGOPAccumulator


def explain(op_name: str, *args: Any) -> list[Backend]:
    """Say which backends of an op can run and why, best first; the first usable row is what ``backend="auto"`` takes.

    Args:
        op_name: "ebr_step", "agop", or one of the primitives that AGOP is made of ("relu_coactivation_update",
            "derivative_gram_update", "syrk_update", "chain_gram_update", "agop_finalise").
        args: the tensors of the call; for "ebr_step" also an :class:`EBRHead` and, if at hand, its features; for "agop" the
            head (its inputs change nothing, as they are converted to what it computes in). Without them only what holds for
            every call is judged (installed, built, device there), for "agop" that of a head with one hidden ReLU layer.

    Raises:
        InputError: an unknown op, arguments of another kind, and for "agop" what :func:`mmc_fast.agop` raises for the head.

    Examples:
        >>> [row.backend for row in mmc_fast.explain("ebr_step") if row.backend in ("eager", "reference")]
        ['eager', 'reference']
    """
    if not isinstance(op_name, str):
        raise InputError(
            f"explain: the name of an op comes first, as 'ebr_step' or 'agop'; got {type(op_name).__name__}"
        )
    if op_name == "ebr_step" and args and isinstance(args[0], nn.Module):
        return _ebr_head(*args)
    if op_name != "agop":
        if wrong := [type(a).__name__ for a in args if a is not None and not isinstance(a, Tensor)]:
            raise InputError(f"explain: {op_name!r} takes the tensors of the call; got {', '.join(wrong)}")
        return explain_op(op_name, *args)
    if not args:
        return explain_op("relu_coactivation_update")
    head = args[0]
    if not isinstance(head, nn.Module):
        raise InputError(f"explain: 'agop' takes the head, a torch.nn.Module; got {type(head).__name__}")
    method = AGOPAccumulator(head)._method
    if method is None:
        return [Backend("eager", True, "usable: vector-Jacobian products, as this head is no chain of known layers")]
    if method.primitive is None:
        return [Backend("eager", True, f"usable: {method.name}, which needs no kernel")]
    rows = explain_op(method.primitive, torch.empty(0, method.inputs, dtype=method.dtype, device=method.device))
    return [row._replace(reason=f"usable: {method.name}") if row.usable else row for row in rows]


def _ebr_head(head: nn.Module, features: Mapping[str, Tensor | None] | Sequence[Tensor | None] = ()) -> list[Backend]:
    if not isinstance(head, EBRHead):
        raise InputError(f"explain: 'ebr_step' takes an EBRHead, or tensors; got {type(head).__name__}")
    parameters = plain_parameters(head)
    if parameters is None:
        return [Backend("eager", True, "usable: layer by layer, as some layers are no plain linear layers")]
    listed = list(features.values()) if isinstance(features, Mapping) else list(features)
    first = [f for f in listed if f is not None] or [parameters[0][0]]
    return explain_op("ebr_step", first, [p for layer in parameters for p in layer])
