"""Fusion operators: ``fusion(features: list of [B, d_i], present: bool [B, m] | None) -> logits [B, C]``.

A modality with ``present = False`` is never read (it may hold NaN); ``present=None`` means that nothing is absent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc_fast.errors import InputError


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of the given widths with ReLU between them and none after the last."""
    layers: list[nn.Module] = []
    for n in range(len(sizes) - 1):
        layers += [nn.Linear(sizes[n], sizes[n + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _check_sizes(name: str, dims: Sequence[int], num_classes: int, hidden: Sequence[int]) -> None:
    if not dims or min(dims) < 1:
        raise InputError(f"{name}: dims is {list(dims)}; give one width of 1 or more for each modality")
    if num_classes < 1:
        raise InputError(f"{name}: num_classes is {num_classes}; give the number of outputs, 1 or more")
    if hidden and min(hidden) < 1:
        raise InputError(f"{name}: hidden is {list(hidden)}; give widths of 1 or more")


def _check_inputs(name: str, dims: Sequence[int], features: Sequence[Tensor], present: Tensor | None) -> None:
    widths = [f.shape[-1] for f in features]
    if widths != list(dims):
        raise InputError(f"{name}: features have widths {widths}; this fusion was built for {list(dims)}")
    if present is not None and (present.dtype != torch.bool or present.shape[-1] != len(dims)):
        raise InputError(f"{name}: present is {present.dtype} {list(present.shape)}; give torch.bool [B, {len(dims)}]")


def _masked(features: Sequence[Tensor], present: Tensor | None) -> list[Tensor]:
    if present is None:
        return list(features)
    return [torch.where(present[:, i, None], f, f.new_zeros(())) for i, f in enumerate(features)]


class ConcatFusion(nn.Module):
    """MLP over the concatenated features; an absent modality enters as zeros.

    ``layers`` is a plain ``nn.Sequential`` of ``nn.Linear`` and ``nn.ReLU``: ``sum d_i -> hidden... -> C``.
    """

    def __init__(self, dims: Sequence[int], num_classes: int, hidden: Sequence[int] = (128,)) -> None:
        super().__init__()
        _check_sizes("ConcatFusion", dims, num_classes, hidden)
        self.dims = tuple(dims)
        self.layers = _mlp([sum(dims), *hidden, num_classes])

    def forward(self, features: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        _check_inputs("ConcatFusion", self.dims, features, present)
        return self.layers(torch.cat(_masked(features, present), dim=-1))


class LateFusion(nn.Module):
    """A classifier for each modality; logits are their mean over the modalities that are present.

    A row with nothing present gets zero logits (the uniform prediction).
    """

    def __init__(self, dims: Sequence[int], num_classes: int, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        _check_sizes("LateFusion", dims, num_classes, hidden)
        self.dims = tuple(dims)
        self.classifiers = nn.ModuleList(_mlp([d, *hidden, num_classes]) for d in dims)

    def forward(self, features: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        _check_inputs("LateFusion", self.dims, features, present)
        # Absent values are replaced before a classifier reads them, and its answer to the replacement is dropped.
        features = _masked(features, present)
        votes = [classifier(f) for classifier, f in zip(self.classifiers, features, strict=True)]
        if present is None:
            return torch.stack(votes).mean(0)
        total = torch.stack(_masked(votes, present)).sum(0)
        return total / present.sum(-1, keepdim=True).clamp(min=1).to(total.dtype)


class _Block(nn.Module):
    """Pre-norm transformer block: attention over tokens, then an MLP, each with a residual path."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, tokens: Tensor, visible: Tensor | None) -> Tensor:
        batch, length, dim = tokens.shape
        qkv = self.qkv(self.norm_attention(tokens)).view(batch, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, T, dim / heads]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        tokens = tokens + self.out(mixed.transpose(1, 2).reshape(batch, length, dim))
        return tokens + self.mlp(self.norm_mlp(tokens))


class TransformerFusion(nn.Module):
    """Transformer over one token per modality and a class token; absent modalities are masked as keys.

    Token i is ``W_i z_i + b_i + e_i`` (linear projection and modality embedding); the logits are a linear map of the
    normalised class token. The class token is always visible, so a row with nothing present stays finite.
    """

    def __init__(self, dims: Sequence[int], num_classes: int, dim: int = 64, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        _check_sizes("TransformerFusion", dims, num_classes, ())
        if heads < 1 or dim < 1 or dim % heads:
            raise InputError(f"TransformerFusion: dim {dim} is not a positive multiple of heads {heads}")
        if depth < 1:
            raise InputError(f"TransformerFusion: depth is {depth}; give 1 or more")
        self.dims = tuple(dims)
        self.projections = nn.ModuleList(nn.Linear(d, dim) for d in dims)
        self.modality = nn.Parameter(torch.randn(len(dims), dim) * 0.02)
        self.class_token = nn.Parameter(torch.randn(dim) * 0.02)
        self.blocks = nn.ModuleList(_Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, features: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        _check_inputs("TransformerFusion", self.dims, features, present)
        # Zeros first: a NaN behind the mask would still spread through 0 * NaN in the attention product.
        features = _masked(features, present)
        batch = features[0].shape[0]
        projected = [p(f) for p, f in zip(self.projections, features, strict=True)]
        tokens = torch.stack(projected, dim=1) + self.modality  # [B, m, dim]
        tokens = torch.cat([self.class_token.expand(batch, 1, -1), tokens], dim=1)
        visible = None
        if present is not None:
            visible = F.pad(present, (1, 0), value=True)[:, None, None, :]  # [B, 1, 1, T]
        for block in self.blocks:
            tokens = block(tokens, visible)
        return self.classifier(self.norm(tokens[:, 0]))
