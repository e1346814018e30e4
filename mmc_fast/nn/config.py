"""``EBRConfig``: the settings of EBR as one value, with the published readings as named constructors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from mmc_fast._util.schema import Count, NonNegative, Width, check


@dataclass(frozen=True)
class EBRConfig:
    """Architecture of the heads, the adversarial training and the policy for missing modalities.

    Attributes:
        latent_dim, hidden_dim, psi_dims, residual, normalize: see :class:`mmc_fast.nn.EBRHead`.
        reversal: λ of the gradient reversal (≥ 0).
        reconstruction: λ_rec, weight of the reconstruction loss (≥ 0).
        schedule: "joint" (one backward for all losses) or "interleave" (blocks of ``interleave_epochs``).
        patience: epochs without improvement after which the adversarial part ends (None: never).
        cross_recovery: weight of the reconstruction loss of each modality from another one's latent, drawn afresh.
        ranking, substitute: how a missing modality finds its proxy ("ranked", the "mean" of the present latents,
            or "each": one of them drawn in training, predictions averaged over all of them and their mean).
        modalities: names that get a head (None: all).
        backend: what computes the EBR step; "reference" gives the same numbers with and without the native library.
    """

    latent_dim: Width = 512
    hidden_dim: Width = 1024
    psi_dims: tuple[Width, ...] = (512, 256)
    residual: bool = False
    normalize: bool = False
    reversal: NonNegative = 1.0
    reconstruction: NonNegative = 0.0
    schedule: Literal["joint", "interleave"] = "joint"
    interleave_epochs: Count = 10
    patience: Count | None = None
    cross_recovery: NonNegative = 0.0
    ranking: Literal["reference", "pairwise"] = "reference"
    substitute: Literal["ranked", "mean", "each"] = "ranked"
    modalities: tuple[str, ...] | None = None
    backend: Literal["auto", "cpp", "triton", "cuda", "eager", "reference"] = "auto"

    def __post_init__(self) -> None:
        check("ebr", self)

    @classmethod
    def paper(cls, **changes: Any) -> EBRConfig:
        """As published in the paper: λ = 1, no reconstruction loss, losses interleaved every 10 epochs."""
        return replace(cls(schedule="interleave"), **changes)

    @classmethod
    def robust(cls, **changes: Any) -> EBRConfig:
        """The form that worked best in this library's study (docs/experiments/study.md); not the authors'.

        Residual heads, normalised latents, a small λ, cross-modal recovery, mean of present latents. Meant for the
        loop of ``TrainConfig.preset("robust")``: random masks filled as at inference, and consistency.
        """
        base = cls(residual=True, normalize=True, reversal=0.1, cross_recovery=0.1, substitute="mean")
        return replace(base, **changes)

    @classmethod
    def slides(cls, **changes: Any) -> EBRConfig:
        """As in the authors' slides: adds the reconstruction loss, ends the adversarial part when validation drops."""
        return replace(cls(schedule="interleave", reconstruction=1.0, patience=10), **changes)
