"""The encoder that a configuration asks for."""

from __future__ import annotations

from mmc_fast.nn.encoders import IdentityEncoder, MLPEncoder

from .config import TrainConfig


def build_encoder(dim: int, config: TrainConfig) -> IdentityEncoder | MLPEncoder:
    """The encoder of one modality of width ``dim``."""
    if config.encoder == "identity":
        return IdentityEncoder(dim)
    return MLPEncoder(dim, config.encoder_width, config.encoder_dim, config.encoder_norm, config.encoder_dropout)
