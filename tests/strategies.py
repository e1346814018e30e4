"""Strategies for property tests (needs ``hypothesis``): shapes and heads, presence masks, data sets, settings of runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from mmc_fast.experiments.data import MultimodalDataset
from mmc_fast.experiments.training import KDConfig, TrainConfig
from mmc_fast.nn import EBRConfig

__all__ = ["ACTIVATIONS", "configs", "datasets", "heads", "presence", "sample_counts", "widths"]

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


@st.composite
def presence(draw: st.DrawFn, rows: int, modalities: int) -> torch.Tensor:
    """bool ``[rows, modalities]``: complete, at random, one modality nowhere, or single ones; no row is empty."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    kind = draw(st.sampled_from(["complete", "random", "absent", "single"]))
    if kind == "complete":
        return torch.ones(rows, modalities, dtype=torch.bool)
    present = torch.rand(rows, modalities, generator=generator) < draw(st.sampled_from([0.2, 0.5, 0.9]))
    if kind == "absent":
        present[:, draw(st.integers(0, modalities - 1))] = False
    if kind == "single":
        present[:] = False
    one = torch.randint(0, modalities, (rows,), generator=generator)
    empty = ~present.any(1)
    present[empty, one[empty]] = True
    return present


@st.composite
def datasets(draw: st.DrawFn, largest: int = 60) -> MultimodalDataset:
    """Checked data sets: 1 to 4 modalities, 2 to 4 classes, natural absence, scales from 1e-8 to 1e8, constants."""
    classes, modalities = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    sizes = [draw(st.integers(2 * classes, largest)) for _ in range(3)]
    rows = sum(sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    split = torch.cat([torch.full((size,), code, dtype=torch.uint8) for code, size in enumerate(sizes)])
    labels = torch.cat([torch.arange(size) % classes for size in sizes])
    here = draw(presence(rows, modalities))
    for column in range(modalities):  # a modality that no training row has is refused
        here[column % sizes[0], column] = True
    features, names = {}, {}
    for column in range(modalities):
        name, width = f"m{column}", draw(st.integers(1, 9))
        x = torch.randn(rows, width, generator=generator) + labels[:, None]
        x = x * draw(st.sampled_from([1.0, 1.0, 1.0, 0.0, 1e-8, 1e8]))
        features[name] = torch.where(here[:, column, None], x, 0.0)
        names[name] = [f"{name}_{j}" for j in range(width)]
    metric = "auroc" if classes == 2 and draw(st.booleans()) else "accuracy"
    return MultimodalDataset("drawn", features, here, labels, split, classes, metric, names)


@st.composite
def configs(draw: st.DrawFn) -> TrainConfig:
    """Settings of small runs over the whole space of :class:`~mmc_fast.experiments.training.TrainConfig`, all of them allowed."""
    width = st.integers(1, 8)
    values: dict[str, Any] = {
        "epochs": draw(st.integers(1, 3)),
        "batch_size": draw(st.integers(1, 40)),
        "optimizer": draw(st.sampled_from(["adam", "adamw", "sgd"])),
        "lr": draw(st.sampled_from([1e-4, 1e-2])),
        "weight_decay": draw(st.sampled_from([0.0, 0.01])),
        "encoder": draw(st.sampled_from(["mlp", "identity"])),
        "encoder_width": draw(width),
        "encoder_dim": draw(width),
        "fusion": draw(st.sampled_from(["concat", "late", "transformer"])),
        "fusion_hidden": (draw(width),),
        "fusion_dim": 4,
        "fusion_heads": 2,
        "fusion_depth": 1,
        "selection": draw(st.sampled_from(["complete", "masked", "last"])),
        "modality_dropout": draw(st.sampled_from([0.0, 0.5])),
        "rates": draw(st.sampled_from([(0.3,), (0.1, 0.7)])),
        "accumulate": draw(st.sampled_from([1, 1, 3])),
        "clip_grad_norm": draw(st.sampled_from([None, 1.0])),
        "nonfinite": draw(st.sampled_from(["stop", "skip"])),
        "control": draw(st.booleans()),
    }
    if values["modality_dropout"]:
        values["consistency"] = draw(st.sampled_from([0.0, 1.0]))
    if draw(st.booleans()):
        values["ebr"] = draw(_ebr_configs())
        values["substitute_in_training"] = draw(st.booleans())
    elif values["encoder"] == "mlp" and draw(st.booleans()):
        values["kd"] = KDConfig(epochs=1, batch_size=16, embedding_dim=4)
    return TrainConfig(**values)


@st.composite
def _ebr_configs(draw: st.DrawFn) -> EBRConfig:
    return EBRConfig(
        latent_dim=draw(st.integers(1, 6)),
        hidden_dim=draw(st.integers(1, 8)),
        psi_dims=(draw(st.integers(1, 6)),),
        residual=draw(st.booleans()),
        normalize=draw(st.booleans()),
        reversal=draw(st.sampled_from([0.0, 0.1, 1.0, 100.0])),
        reconstruction=draw(st.sampled_from([0.0, 1.0])),
        schedule=draw(st.sampled_from(["joint", "interleave"])),
        interleave_epochs=1,
        patience=draw(st.sampled_from([None, 1])),
        cross_recovery=draw(st.sampled_from([0.0, 0.3])),
        ranking=draw(st.sampled_from(["reference", "pairwise"])),
        substitute=draw(st.sampled_from(["ranked", "mean"])),
    )
