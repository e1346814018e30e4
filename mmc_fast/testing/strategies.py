"""Shapes and heads for property tests (needs ``hypothesis``): sizes around 64-sample words and register tiles."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import nn

__all__ = ["ACTIVATIONS", "heads", "sample_counts", "widths"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "elu": lambda: nn.ELU(0.7),
    "softplus": lambda: nn.Softplus(1.5),
    "identity": nn.Identity,
}


def widths(largest: int = 70) -> st.SearchStrategy[int]:
    """Layer widths, with those at and beside multiples of the tile sizes drawn often."""
    edges = [size for size in (1, 3, 15, 16, 17, 63, 64, 65) if size <= largest]
    return st.one_of(st.sampled_from(edges), st.integers(1, largest))


def sample_counts(largest: int = 520) -> st.SearchStrategy[int]:
    """Numbers of samples: none, one, and those at and beside whole words of 64."""
    edges = [count for count in (0, 1, 2, 63, 64, 65, 127, 128, 511, 512, 513) if count <= largest]
    return st.one_of(st.sampled_from(edges), st.integers(0, largest))


@st.composite
def heads(draw: st.DrawFn, max_depth: int = 4, largest: int = 70) -> nn.Sequential:
    """``nn.Sequential`` of 1 to ``max_depth`` Linear layers and activations, float32, weights from a drawn seed.

    Some have no bias, some are nested, some end in an activation, some hold a dropout in evaluation mode.
    """
    depth = draw(st.integers(1, max_depth))
    sizes = [draw(widths(largest)) for _ in range(depth + 1)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    modules: list[nn.Module] = []
    for index in range(depth):
        linear = nn.Linear(sizes[index], sizes[index + 1], bias=draw(st.booleans()))
        for parameter in linear.parameters():
            parameter.data.normal_(generator=generator).mul_(sizes[index] ** -0.5)
        block: list[nn.Module] = [linear]
        if index + 1 < depth or draw(st.integers(0, 4)) == 0:
            block.append(ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))]())
        if draw(st.integers(0, 4)) == 0:
            block.append(nn.Dropout(0.5))
        modules += [nn.Sequential(*block)] if draw(st.booleans()) else block
    return nn.Sequential(*modules).eval()
