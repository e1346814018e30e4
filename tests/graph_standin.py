"""A stand-in for CUDA graphs on the CPU: a capture records operators, a replay runs them into the memory that they had."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from mmc_fast.nn import graphs

__all__ = ["Graph", "install"]


class Graph:
    """Stands for ``torch.cuda.CUDAGraph``; ``made``: all since :func:`install`."""

    made: ClassVar[list[Graph]] = []

    def __init__(self) -> None:
        self.operators: list[Any] = []
        self.replays = 0
        Graph.made.append(self)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, results in self.operators:
            for old, new in zip(results, pytree.tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.detach().copy_(new)


class _Capture(TorchDispatchMode):
    def __init__(self, graph: Graph, pool: Any = None, **stream: Any) -> None:
        super().__init__()
        self.graph = graph
        graph.casts_kept = torch.is_autocast_cache_enabled()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.graph.operators.append((function, args, kwargs or {}, pytree.tree_leaves(out)))
        return out


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.cuda`` captures and replays on the CPU, and ``mmc_fast.graphed`` takes CPU tensors."""
    Graph.made.clear()
    monkeypatch.setattr(graphs, "_DEVICE", "cpu")
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": Graph, "graph": _Capture, "is_available": lambda: True, "synchronize": lambda: None,
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": nullcontext, "device": nullcontext,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
