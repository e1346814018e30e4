"""The running average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """``θ̄ ← a θ̄ + (1 - a) θ``, a = ``decay``, from the initial weights on."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.live = dict(model.named_parameters())
        self.mean = {name: p.detach().clone() for name, p in self.live.items()}
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """After a step."""
        self._average(list(self.mean.values()), [p.detach() for p in self.live.values()], 0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged weights; its own ones are back afterwards."""
        kept = {name: p.detach().clone() for name, p in self.live.items()}
        self._put(self.mean)
        try:
            yield
        finally:
            self._put(kept)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return dict(self.mean)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`."""
        for name, value in self.mean.items():
            value.copy_(tensors[name])

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self.live.items():
            p.copy_(values[name])
