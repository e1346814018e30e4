"""AGOP sums of every layer of a fusion head, for random groups of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmc_fast.agop.accumulator import AGOPAccumulator
from mmc_fast.agop.head import is_linear
from mmc_fast.errors import InputError


class ChainSums:
    """The fast path: a chain of Linear layers and activations on the features side by side.

    One forward gives the inputs of all layers; the AGOP at each is that of the rest of the chain, from the fast op.
    """

    def __init__(self, modules: list[nn.Module], groups: int) -> None:
        self.modules = modules
        self.positions = [i for i, module in enumerate(modules) if is_linear(module)]
        self.tails = [nn.Sequential(*modules[i:]) for i in self.positions]
        self.accumulators = [[AGOPAccumulator(tail) for _ in range(groups)] for tail in self.tails]

    @property
    def names(self) -> list[str]:
        return [str(index) for index in range(len(self.positions))]

    @property
    def weights(self) -> list[Tensor]:
        """``[h, d]`` of each Linear layer."""
        return [self.modules[i].weight.detach().cpu() for i in self.positions]  # type: ignore[union-attr,operator]

    @torch.no_grad()
    def inputs(self, x: Tensor) -> list[Tensor]:
        """What each Linear layer receives; the first receives ``x [B, D]``."""
        found = [x]
        for start, stop in pairwise(self.positions):
            for module in self.modules[start:stop]:
                x = module(x)
            found.append(x)
        return found

    def add(self, group: int, inputs: list[Tensor]) -> None:
        """Rows of one group, as the layers receive them."""
        for accumulators, u in zip(self.accumulators, inputs, strict=True):
            accumulators[group].update(u)

    def finish(self) -> dict[str, list[Tensor]]:
        """Layer name -> AGOP sums ``[d, d]`` float64 of each group."""
        return {
            name: [a.compute().matrix.double().cpu() for a in accumulators]
            for name, accumulators in zip(self.names, self.accumulators, strict=True)
        }

    def method(self) -> str:
        """How the first layer's AGOP was summed, and by which backend."""
        result = self.accumulators[0][0].compute()
        return f"{result.method} ({result.backend})"

    def to_state(self) -> list[Any]:
        return [[a.state_dict() for a in accumulators] for accumulators in self.accumulators]

    def load_state(self, stored: list[Any]) -> None:
        for accumulators, states in zip(self.accumulators, stored, strict=True):
            for accumulator, state in zip(accumulators, states, strict=True):
                accumulator.load_state_dict(state)


class JacobianSums:
    """The general path: one backward pass per output through whatever the fusion is."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self.grams: list[Tensor] | None = None

    names = ("input",)

    def add(
        self, fuse: Callable[[Mapping[str, Tensor]], Tensor], features: Mapping[str, Tensor], places: Tensor
    ) -> None:
        """Add ``Σ J_nᵀ J_n`` of a batch; ``places [B]`` is the group of each row."""
        rows = list(jacobian_rows(fuse, features))
        if self.grams is None:
            width = rows[0].shape[1]
            self.grams = [torch.zeros(width, width, dtype=torch.float64) for _ in range(self.groups)]
        for group, gram in enumerate(self.grams):
            mine = places == group
            if mine.any():
                for row in rows:
                    part = row[mine].double().cpu()
                    gram.addmm_(part.t(), part)

    def finish(self) -> dict[str, list[Tensor]]:
        return {"input": list(self.grams or [])}

    def method(self) -> str:
        return "vector-Jacobian products"

    def to_state(self) -> list[Any]:
        return list(self.grams or [])

    def load_state(self, stored: list[Any]) -> None:
        self.grams = list(stored) or None


def jacobian_rows(
    fuse: Callable[[Mapping[str, Tensor]], Tensor], features: Mapping[str, Tensor], units: list[int] | None = None
) -> Any:
    """Rows ``∂y_c/∂u [B, D]`` for every output c (or the ``units`` of them), D = all features side by side."""
    with torch.enable_grad():
        leaves = {name: x.detach().clone().requires_grad_() for name, x in features.items()}
        y = fuse({name: leaf.clone() for name, leaf in leaves.items()})  # a copy, since a model may work in place
        if not y.requires_grad:
            raise InputError(
                "diagnose: the logits do not depend on the features that fuse() was given; let fuse() compute them from "
                "its argument, without no_grad() or detach()"
            )
    wanted = range(y.shape[1]) if units is None else units
    for c in wanted:
        with torch.enable_grad():
            total = y[:, c].sum()
        try:
            grads = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, materialize_grads=True)
        except RuntimeError as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise InputError(
                f"diagnose: the fusion has no gradients ({first}); agop=False gives scores and verdicts without them"
            ) from error
        yield torch.cat([g.flatten(1) for g in grads], 1)


def combine_grams(grams: list[Tensor], weights: np.ndarray) -> Tensor:
    """``Σ_k weights[k] G_k``."""
    total = torch.zeros_like(grams[0])
    for gram, weight in zip(grams, weights, strict=True):
        if weight:
            total.add_(gram, alpha=float(weight))
    return total
