"""A sample of rows that a pass over the data keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .groups import stream


class Reservoir:
    """A uniform sample of rows without replacement: those with the smallest random keys so far."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.keys = torch.empty(0, dtype=torch.float64)
        self.columns: dict[str, Tensor] = {}

    def _drawn(self, index: int, count: int) -> Tensor:
        return torch.rand(count, generator=stream(self.seed, "reservoir", index), dtype=torch.float64)

    def near(self, index: int, count: int) -> Tensor:
        """Which of the ``count`` rows of batch ``index`` may be kept, bool: only they need be worked out."""
        keys = self._drawn(index, count)
        return keys < (self.keys.max() if len(self.keys) == self.size else 2.0)

    def add(self, index: int, columns: Mapping[str, Tensor], near: Tensor | None = None) -> None:
        """Rows of batch ``index``: tensors of one length; with ``near [B]`` (of :meth:`near`) those rows of it alone."""
        count = len(next(iter(columns.values()))) if near is None else len(near)
        keys = self._drawn(index, count)
        if near is not None:
            keys = keys[near]
        elif len(self.keys) == self.size:
            near = keys < self.keys.max()
            keys, columns = keys[near], {name: x.cpu()[near] for name, x in columns.items()}
        if self.columns:
            columns = {name: torch.cat([self.columns[name], x.cpu()]) for name, x in columns.items()}
        keys = torch.cat([self.keys, keys])
        keep = keys.argsort()[: self.size]
        self.keys, self.columns = keys[keep], {name: x.cpu()[keep] for name, x in columns.items()}

    def to_state(self) -> dict[str, Any]:
        return {"keys": self.keys, "columns": dict(self.columns)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.keys, self.columns = state["keys"], dict(state["columns"])
