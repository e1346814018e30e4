"""How much memory a run takes, estimated before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mmc_fast._util.memory import check_memory

from .config import TrainConfig

_COPIES = 8  # of every weight: itself, gradient, two moments, best, last, one being saved, the λ = 0 control


def check_size(config: TrainConfig, dims: Mapping[str, int], num_classes: int) -> None:
    """Raise InputError where the weights of a run and what goes with them cannot fit into memory."""
    from .model import MultimodalModel
    from .unimodal import UnimodalModel

    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        weights = sum(p.numel() for p in MultimodalModel(dims, num_classes, config).parameters())
        if config.unimodal_epochs:
            weights += sum(p.numel() for d in dims.values() for p in UnimodalModel(d, num_classes, config).parameters())
    if config.kd is not None:
        weights += 2 * config.kd.embedding_dim * config.encoder_dim
    advice = "give smaller widths (encoder_width, encoder_dim, fusion_hidden, ebr.latent_dim, ebr.hidden_dim, ...)"
    check_memory(4 * _COPIES * weights, f"config: a model of {weights:.3g} weights and its training", advice)
