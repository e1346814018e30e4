"""Encoders of one modality: a small MLP, or nothing at all."""

from __future__ import annotations

from torch import Tensor, nn

from mmc_fast.errors import InputError


class MLPEncoder(nn.Module):
    """Two-layer perceptron ``z = W_2 relu(W_1 x + b_1) + b_2`` on rows ``[B, dim] -> [B, out_dim]``.

    ``norm``: layer normalisation before the ReLU and behind the second layer. ``dropout``: probability that a hidden value or
    a feature is zeroed in training.
    """

    def __init__(self, dim: int, width: int, out_dim: int, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("width", width), ("out_dim", out_dim)):
            if value < 1:
                raise InputError(f"MLPEncoder: {name} is {value}; give a width of 1 or more")
        self.out_dim = out_dim
        norms = [[nn.LayerNorm(size)] if norm else [] for size in (width, out_dim)]
        drops = [[nn.Dropout(dropout)] if dropout > 0 else [] for _ in norms]
        first = [nn.Linear(dim, width), *norms[0], nn.ReLU(), *drops[0]]
        self.layers = nn.Sequential(*first, nn.Linear(width, out_dim), *norms[1], *drops[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class IdentityEncoder(nn.Module):
    """Pass features on unchanged, so that the fusion sees the modality itself: ``[B, dim] -> [B, dim]``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise InputError(f"IdentityEncoder: dim is {dim}; give a width of 1 or more")
        self.out_dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return x
