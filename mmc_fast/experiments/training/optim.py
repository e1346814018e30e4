"""Optimisers and learning rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn, optim

from .config import TrainConfig


def build_optimizer(groups: Mapping[str, Sequence[nn.Parameter]], config: TrainConfig) -> optim.Optimizer:
    """One optimiser with a named parameter group for each entry of ``groups``.

    Parameters whose gradient is None take no step: neither momentum nor weight decay moves them. That is how the loop
    freezes a group.
    """
    params = [{"params": list(p), "name": name} for name, p in groups.items() if p]
    # The fused step costs a third of the others at these sizes.
    if config.optimizer == "sgd":
        sgd = optim.SGD(params, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)
        if config.momentum > 0:
            # The fused step fails where some parameters of a group have a buffer and others, of a modality that no row
            # has had so far, have none. From zeros the first step is the same.
            for p in (p for group in sgd.param_groups for p in group["params"]):
                sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    kind = optim.AdamW if config.optimizer == "adamw" else optim.Adam
    return kind(params, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """``lr * lr_decay ** (epoch // lr_decay_every)``, epochs from 0."""
    return config.lr * config.lr_decay ** (epoch // config.lr_decay_every)


def set_learning_rate(optimizer: optim.Optimizer, config: TrainConfig, epoch: int) -> float:
    """Set every group to the rate of ``epoch``, and return it."""
    rate = learning_rate(config, epoch)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate
