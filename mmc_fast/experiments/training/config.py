"""``TrainConfig``: every setting of a run as one checked, frozen value that survives a round trip through a dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from mmc_fast._util.names import unknown
from mmc_fast._util.schema import (
    Count,
    Depth,
    NonNegative,
    Positive,
    Range,
    Share,
    Width,
    check,
    from_mapping,
    to_plain,
)
from mmc_fast.errors import InputError
from mmc_fast.nn import EBRConfig

METHODS = ("vanilla", "dropout", "kd", "ebr")
PRESETS = (*METHODS, "robust", "recommended", "ebr-best")
"""The methods; "robust", the study's form of ebr; and what docs/experiments/learner.md found: the best learner, and the best one on
EBR's shared latent."""


_LEARNER: dict[str, Any] = {
    "encoder_norm": True, "encoder_dropout": 0.2, "optimizer": "adamw", "weight_decay": 0.01, "weight_average": 0.99,
    "experts": True,
}  # fmt: skip


@dataclass(frozen=True)
class KDConfig:
    """Cross-modal distillation of unimodal teachers into the encoders of weaker modalities, before the run itself.

    Attributes:
        epochs: epochs for each (teacher, student) pair. batch_size: in-batch negatives + 1. lr: of Adam.
        temperature: T of the symmetric InfoNCE loss. embedding_dim: width of the L2-normalised projections.
        teachers: "strongest" (one teacher for all) or "stronger" (every stronger modality teaches in turn).
        order: in which the teachers of one student take turns, or "simultaneous": all in the same steps, the mean of
            their losses. Matters only with ``teachers="stronger"``.
        loss: "info_nce", "kl" (of the teacher's class probabilities from those of a linear classifier on the student,
            both softened by ``kl_temperature``, times its square; Hinton et al. 2015) or "mse" (of the teacher's
            features from a linear map of the student's).
    """

    epochs: Count = 20
    batch_size: Annotated[int, Range(2, 1e9)] = 256
    lr: Positive = 1e-3
    temperature: Positive = 0.07
    embedding_dim: Width = 128
    teachers: Literal["strongest", "stronger"] = "strongest"
    order: Literal["weakest_first", "strongest_first", "random", "simultaneous"] = "weakest_first"
    loss: Literal["info_nce", "kl", "mse"] = "info_nce"
    kl_temperature: Positive = 4.0

    def __post_init__(self) -> None:
        check("kd", self)


@dataclass(frozen=True)
class TrainConfig:
    """Settings of :func:`mmc_fast.experiments.training.train`; vanilla, modality dropout, KD and EBR differ only in them.

    Attributes:
        epochs, batch_size: passes over the train part; rows per step.
        optimizer: "adam", "adamw" or "sgd". lr, weight_decay: as usual. momentum: of SGD only.
        lr_decay, lr_decay_every: the learning rate is multiplied by ``lr_decay`` every so many epochs.
        encoder: "mlp" (d -> encoder_width -> encoder_dim) or "identity".
        fusion: "concat", "late" or "transformer". fusion_hidden: hidden widths of concat and late.
        fusion_dim, fusion_heads, fusion_depth: token width, heads and blocks of the transformer.
        modality_dropout: probability that a present modality is hidden from a training row (no row loses all).
        substitute_in_training: fill hidden modalities during training as at inference (EBR only).
        consistency: weight c of KL(prediction on complete data, held fixed || prediction on masked data); the step then
            takes both, and L_sem is the mean of the two. Needs ``modality_dropout``.
        noise_modality, noise_rate: uniform noise on one modality in training, ``(1 - r) x + r U std(x)``.
        adversarial_stop: what ``ebr.patience`` watches: "score" (validation) or "loss" (training L_sem).
        selection: which epoch is kept: best validation score on "complete" data, best mean over "masked" validation
            data, or the "last".
        unimodal_share: epochs of the unimodal models as a share of ``epochs``; 0 trains none.
        control: also train the λ = 0 control (EBR only; doubles the cost) to measure what λ changed.
        rates: MCAR missing rates at which the finished model is scored.
        rates_modality: the one modality that ``rates`` hide; None: each, independently.
        checkpoint_every, keep_checkpoints: epochs between checkpoints, and how many are kept.
        checkpoint_seconds: a checkpoint is also written when so much time has passed since the last one, in the middle
            of an epoch too: what a killed run loses at most.
        accumulate: pieces in which the rows of a step are processed, one after the other; changes only rounding.
        clip_grad_norm: largest norm of the gradient over all parameters that move; None for no limit.
        nonfinite: what happens where loss or gradient is NaN or infinite: "stop", or "skip" the batch and count it.
        reweight_modality, reweight, reweight_form: give one modality the weight 1 + β, β = ``reweight``: "features" scales
            what the fusion receives of it, in training and inference; "loss" adds β times the cross-entropy of a linear
            classifier on its encoder, over the rows that have it, divided by all rows of the step.
        ebr, kd: settings of the parts, None where the method has none.
        encoder_norm, encoder_dropout: layer normalisation and dropout behind each layer of the MLP encoders.
        experts: the answer is the product of the fused model and the unimodal ones, with weights fitted on masked validation rows
            (:class:`mmc_fast.experiments.training.experts.ExpertProduct`). Needs unimodal models;
            for classes only, other tasks are answered by the fused model alone.
        weight_average: decay a of the average of weights, θ̄ ← a θ̄ + (1 - a) θ after every step, that validation, selection
            and the finished model use; 0 for none.
        class_weights: "balanced": each class counts alike in the loss, N / (C n_c) a row; of several labels, the positives as
            much as the negatives.

    Examples:
        >>> TrainConfig = mmc_fast.experiments.training.TrainConfig
        >>> config = TrainConfig.preset("dropout", epochs=5)
        >>> config.modality_dropout, TrainConfig.from_dict(config.to_dict()) == config
        (0.5, True)
    """

    epochs: Count = 40
    batch_size: Count = 256
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.0
    momentum: Share = 0.0
    lr_decay: Positive = 0.9
    lr_decay_every: Count = 100
    encoder: Literal["mlp", "identity"] = "mlp"
    encoder_width: Width = 128
    encoder_dim: Width = 64
    fusion: Literal["concat", "late", "transformer"] = "concat"
    fusion_hidden: tuple[Width, ...] = (128,)
    fusion_dim: Width = 64
    fusion_heads: Count = 4
    fusion_depth: Depth = 2
    modality_dropout: Share = 0.0
    substitute_in_training: bool = False
    consistency: NonNegative = 0.0
    noise_modality: str | None = None
    noise_rate: Annotated[float, Range(0, 1, high_closed=True)] = 0.0
    adversarial_stop: Literal["score", "loss"] = "score"
    selection: Literal["complete", "masked", "last"] = "complete"
    unimodal_share: Annotated[float, Range(0, 1000, high_closed=True)] = 1.0
    control: bool = True
    rates: tuple[Share, ...] = (0.1, 0.2, 0.3, 0.4, 0.7)
    checkpoint_every: Count = 1
    keep_checkpoints: Count = 2
    ebr: EBRConfig | None = None
    kd: KDConfig | None = None
    checkpoint_seconds: Positive = 300.0
    accumulate: Count = 1
    clip_grad_norm: Positive | None = None
    nonfinite: Literal["stop", "skip"] = "stop"
    rates_modality: str | None = None
    reweight_modality: str | None = None
    reweight: NonNegative = 0.0
    reweight_form: Literal["features", "loss"] = "features"
    encoder_norm: bool = False
    encoder_dropout: Share = 0.0
    weight_average: Share = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    experts: bool = False

    def __post_init__(self) -> None:
        check("config", self)
        needs_unimodal = "kd" if self.kd is not None else "the ranking of ebr" if self.needs_reference else None
        needs_unimodal = "experts" if self.experts else needs_unimodal
        for refused, reason in (
            (not self.fusion_hidden and self.fusion == "concat", "fusion_hidden is empty; concat needs a hidden width"),
            (
                self.fusion_dim % self.fusion_heads > 0,
                f"fusion_dim {self.fusion_dim} is not a multiple of fusion_heads {self.fusion_heads}",
            ),
            (
                self.selection == "masked" and not self.rates,
                "selection is 'masked' but rates is empty; give missing rates to select by",
            ),
            (
                self.momentum > 0 and self.optimizer != "sgd",
                f"momentum is {self.momentum} but the optimizer is {self.optimizer}, not sgd",
            ),
            (
                self.consistency > 0 and not self.modality_dropout,
                "consistency compares masked with complete data; set modality_dropout above 0",
            ),
            (
                (self.noise_rate > 0) != (self.noise_modality is not None),
                "noise needs both noise_modality and a noise_rate above 0",
            ),
            (
                (self.reweight > 0) != (self.reweight_modality is not None),
                "re-weighting needs both reweight_modality and a reweight above 0",
            ),
            (
                self.substitute_in_training and self.ebr is None,
                "substitute_in_training needs EBR heads; add an 'ebr' section",
            ),
            (
                self.kd is not None and self.encoder == "identity",
                "kd distils into encoders and encoder is 'identity'; use encoder 'mlp'",
            ),
            (
                self.unimodal_epochs == 0 and needs_unimodal is not None,
                f"unimodal_share is {self.unimodal_share}, but {needs_unimodal} needs unimodal models; raise it",
            ),
        ):
            if refused:
                raise InputError(f"config: {reason}")

    @property
    def method(self) -> str:
        """ "ebr" with EBR heads, else "kd" with distillation, else "dropout" with modality dropout, else "vanilla"."""
        if self.ebr is not None:
            return "ebr"
        if self.kd is not None:
            return "kd"
        return "dropout" if self.modality_dropout > 0 else "vanilla"

    @property
    def unimodal_epochs(self) -> int:
        """Epochs that the unimodal models are trained for."""
        return 0 if self.unimodal_share == 0 else max(1, round(self.epochs * self.unimodal_share))

    @property
    def needs_reference(self) -> bool:
        """Whether substitution ranks modalities by similarity to the strongest one."""
        return self.ebr is not None and self.ebr.substitute == "ranked" and self.ebr.ranking == "reference"

    @classmethod
    def preset(cls, method: str, **changes: Any) -> TrainConfig:
        """The small-scale settings of ``method`` (one of :data:`PRESETS`), with ``changes`` on top.

        EBR heads have hidden width 128 and latent width 64, normalised latents and a reversal of 0.01, as chosen on the
        validation part of mfeat (docs/experiments/training.md); all else is equal between the methods. "robust" is EBR in the
        form of docs/experiments/study.md: ``EBRConfig.robust()``, random masks that are filled as at inference, and consistency. "recommended": modality
        dropout and consistency with normalised encoders, dropout, weight decay, averaged weights and a product with the unimodal models; "ebr-best": the same with
        EBR heads (docs/experiments/learner.md says when to use which).
        """
        if method == "vanilla":
            base = cls()
        elif method == "dropout":
            base = cls(modality_dropout=0.5)
        elif method == "kd":
            base = cls(kd=KDConfig())
        elif method == "ebr":
            heads = EBRConfig(hidden_dim=128, latent_dim=64, psi_dims=(64, 32), normalize=True, reversal=0.01)
            base = cls(ebr=heads)
        elif method == "robust":
            heads = EBRConfig.robust(hidden_dim=128, latent_dim=64, psi_dims=(64, 32))
            base = cls(ebr=heads, modality_dropout=0.5, substitute_in_training=True, consistency=1.0)
        elif method == "recommended":
            base = cls(modality_dropout=0.5, consistency=1.0, **_LEARNER)
        elif method == "ebr-best":
            heads = EBRConfig.robust(hidden_dim=128, latent_dim=64, psi_dims=(64, 32), cross_recovery=0.0)
            base = cls(ebr=heads, modality_dropout=0.5, substitute_in_training=True, consistency=1.0, **_LEARNER)
        else:
            raise unknown("method", method, PRESETS)
        return replace(base, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Build a config from plain values; what is not given keeps the preset of ``values["method"]``.

        ``method`` defaults to the one whose section is given ("ebr", "kd"), else to "vanilla". Unknown keys are refused
        with the nearest known one, wrong types with what is allowed. ``from_dict(c.to_dict()) == c``.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"config is {type(values).__name__}; give a table of settings")
        values = dict(values)
        implied = next((name for name in ("ebr", "kd") if values.get(name) is not None), "vanilla")
        if "method" not in values and values.get("modality_dropout") and implied == "vanilla":
            implied = "dropout"
        method = values.pop("method", implied)
        config = from_mapping(cls.preset(method), values, "config")
        if config.method != cls.preset(method).method:
            raise InputError(
                f"config: method is {method!r} but the other settings describe {config.method!r}; change one of them"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of every setting, and ``method``."""
        return {"method": self.method} | to_plain(self)
