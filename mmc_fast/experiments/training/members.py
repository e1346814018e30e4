"""An implicit ensemble: members that share all layers but the scales of their inputs and their output layer.

Source: TabM-mini of Gorishniy, Kotelnikov and Babenko, "TabM", ICLR 2025; a presence mask for each member is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Members"]


class Members(nn.Module):
    """``p(y | x) = mean_j softmax(W_j relu(shared(r_j ∘ x)) + b_j)``, scales r_j with entries ±1 to begin with.

    The rows of all members are one batch ``[count * B, ...]``, member after member.
    """

    def __init__(self, widths: Sequence[int], fused: int, num_classes: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.scales = nn.ParameterList(torch.randint(0, 2, (count, d)) * 2.0 - 1.0 for d in widths)
        bound = 1 / math.sqrt(fused)
        self.weight = nn.Parameter(torch.empty(count, fused, num_classes).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, 1, num_classes).uniform_(-bound, bound))

    def repeated(
        self, features: Sequence[Tensor], present: Tensor | None, source: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """The same rows for every member."""
        masks = [t if t is None else t.repeat(self.count, *[1] * (t.dim() - 1)) for t in (present, source)]
        return [x.repeat(self.count, 1) for x in features], masks[0], masks[1]

    def scaled(self, features: Sequence[Tensor]) -> list[Tensor]:
        """``r_j ∘ x`` for the rows of each member."""
        pairs = zip(features, self.scales, strict=True)
        return [(x.unflatten(0, (self.count, -1)) * r[:, None]).flatten(0, 1) for x, r in pairs]

    def logits(self, fused: Tensor) -> Tensor:
        """``[count * B, C]`` from what the fusion gives."""
        own = torch.baddbmm(self.bias, fused.relu().unflatten(0, (self.count, -1)), self.weight)
        return own.flatten(0, 1)
