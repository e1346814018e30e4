"""``EBRConfig``: the settings of EBR as one value, with the published readings as named constructors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

__all__ = ["EBRConfig"]

_CHOICES = {
    "schedule": ("joint", "interleave"),
    "ranking": ("reference", "pairwise"),
    "substitute": ("ranked", "mean", "learned"),
    "alignment": ("none", "distance", "contrastive"),
    "backend": ("auto", "cpp", "triton", "cuda", "eager", "reference"),
}


@dataclass(frozen=True)
class EBRConfig:
    """Architecture of the heads, the two-player game and the policy for missing modalities.

    Attributes:
        latent_dim, hidden_dim, psi_dims, residual, normalize: see :class:`mmc_fast.nn.EBRHead`.
        reversal: λ, strength of the gradient reversal (≥ 0).
        reconstruction: λ_rec, weight of the reconstruction loss (≥ 0).
        schedule: "joint" (one backward for all losses) or "interleave" (blocks of ``interleave_epochs``).
        psi_lr_scale, psi_steps: learning rate of ψ relative to the rest; ψ updates per step.
        patience: epochs without improvement after which the adversarial part ends (None: never).
        bounded: cut the reversed gradient while L_md is at or above H(π): there is nothing left to gain.
        alignment, alignment_weight: pull the normalised latents of a sample together ("distance" to their mean, or
            "contrastive" against the batch), beside the game or instead of it (λ = 0).
        cross_recovery: weight of the reconstruction loss of each modality from another one's latent, drawn afresh.
        ranking, substitute: how a missing modality finds its proxy ("ranked", the "mean" of the present latents, or a
            "learned" weighted mean of them).
        modalities: names that get a head (None: all).
        backend: what computes the EBR step; "reference" gives the same numbers with and without the native library.
    """

    latent_dim: int = 512
    hidden_dim: int = 1024
    psi_dims: tuple[int, ...] = (512, 256)
    residual: bool = False
    normalize: bool = False
    reversal: float = 1.0
    reconstruction: float = 0.0
    schedule: str = "joint"
    interleave_epochs: int = 10
    psi_lr_scale: float = 1.0
    psi_steps: int = 1
    patience: int | None = None
    bounded: bool = False
    alignment: str = "none"
    alignment_weight: float = 0.1
    cross_recovery: float = 0.0
    ranking: str = "reference"
    substitute: str = "ranked"
    modalities: tuple[str, ...] | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "psi_dims", tuple(self.psi_dims))
        if self.modalities is not None:
            object.__setattr__(self, "modalities", tuple(self.modalities))
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"EBRConfig: {name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        for name in ("reversal", "reconstruction", "psi_lr_scale", "alignment_weight", "cross_recovery"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"EBRConfig: {name} is {getattr(self, name)}; it must be finite and not negative")
        for name in ("latent_dim", "hidden_dim", "interleave_epochs", "psi_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"EBRConfig: {name} is {getattr(self, name)}; it must be at least 1")
        if self.patience is not None and self.patience < 1:
            raise ValueError(
                f"EBRConfig: patience is {self.patience}; it must be at least 1, or None for no early stop"
            )

    @classmethod
    def paper(cls, **changes: Any) -> EBRConfig:
        """As published in the paper: λ = 1, no reconstruction loss, losses interleaved every 10 epochs."""
        return replace(cls(schedule="interleave"), **changes)

    @classmethod
    def robust(cls, **changes: Any) -> EBRConfig:
        """The form that worked best in this library's study (docs/study.md); not the authors'.

        Residual heads, normalised latents, a weak game, cross-modal recovery, mean of present latents. Meant for the
        loop of ``TrainConfig.preset("robust")``: random masks filled as at inference, and consistency.
        """
        base = cls(residual=True, normalize=True, reversal=0.1, cross_recovery=0.1, substitute="mean")
        return replace(base, **changes)

    @classmethod
    def slides(cls, **changes: Any) -> EBRConfig:
        """As in the authors' slides: adds the reconstruction loss, stops the game when validation drops."""
        return replace(cls(schedule="interleave", reconstruction=1.0, patience=10), **changes)
