"""``TrainConfig``: every setting of a run as one checked, frozen value that survives a round trip through a dict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from mmc_fast._util.names import unknown
from mmc_fast._util.numbers import make_plain
from mmc_fast.errors import InputError
from mmc_fast.nn import EBRConfig

from .parse import check_choices, from_mapping

__all__ = ["METHODS", "PRESETS", "KDConfig", "TrainConfig"]

METHODS = ("vanilla", "dropout", "kd", "ebr")
PRESETS = (*METHODS, "robust")  # robust is the study's form of the method ebr
# Settings that came after runs had been recorded.
_LATER: tuple[str, ...] = ("checkpoint_seconds", "accumulate", "clip_grad_norm", "nonfinite", "rates_modality")
_LATER += ("emphasis_modality", "emphasis", "emphasis_form")
_LATER_KD = ("loss", "kl_temperature")


def _at_least(where: str, values: Mapping[str, float], low: float) -> None:
    for name, value in values.items():
        if not low <= value < math.inf:
            raise InputError(f"{where}: {name} is {value}; it must be finite and at least {low:g}")


def _positive(where: str, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise InputError(f"{where}: {name} is {value}; it must be finite and above 0")


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

    epochs: int = 20
    batch_size: int = 256
    lr: float = 1e-3
    temperature: float = 0.07
    embedding_dim: int = 128
    teachers: Literal["strongest", "stronger"] = "strongest"
    order: Literal["weakest_first", "strongest_first", "random", "simultaneous"] = "weakest_first"
    loss: Literal["info_nce", "kl", "mse"] = "info_nce"
    kl_temperature: float = 4.0

    def __post_init__(self) -> None:
        make_plain(self)
        check_choices("kd", self)
        _at_least("kd", {"epochs": self.epochs, "embedding_dim": self.embedding_dim}, 1)
        _at_least("kd", {"batch_size": self.batch_size}, 2)
        _positive("kd", {"lr": self.lr, "temperature": self.temperature, "kl_temperature": self.kl_temperature})


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
        substitute_in_training: fill hidden slots during training as at inference (EBR only).
        consistency: weight c of KL(prediction on complete data, held fixed || prediction on masked data); the step then
            takes both, and L_sem is the mean of the two. Needs ``modality_dropout``.
        noise_modality, noise_rate: uniform noise on one modality in training, ``(1 - r) x + r U std(x)``.
        reversal_schedule: "constant", "linear" (ramp over ``reversal_ramp`` of the run), "dann"
            (2 / (1 + exp(-10 p)) - 1 over the same share) or "balanced" (every step in units of
            ‖∂L_sem‖ / ‖∂L_md‖ at the encoders; a step costs twice). The strength itself is ``ebr.reversal``.
        adversarial_stop: what ``ebr.patience`` watches: "score" (validation) or "loss" (training L_sem).
        selection: which epoch is kept: best validation score on "complete" data, best mean over "masked" validation
            data, or the "last".
        unimodal_share: epochs of the unimodal models as a share of ``epochs``; 0 trains none.
        control: also train the twin with λ = 0 (EBR only; doubles the cost) to measure what the game changed.
        rates: MCAR missing rates at which the finished model is scored.
        rates_modality: the one modality that ``rates`` hide; None: each, independently.
        checkpoint_every, keep_checkpoints: epochs between checkpoints, and how many are kept.
        checkpoint_seconds: a checkpoint is also written when so much time has passed since the last one, in the middle
            of an epoch too: what a killed run loses at most.
        accumulate: pieces in which the rows of a step are processed, one after the other; changes only rounding.
        clip_grad_norm: largest norm of the gradient over all parameters that move; None for no limit.
        nonfinite: what happens where loss or gradient is NaN or infinite: "stop", or "skip" the batch and count it.
        emphasis_modality, emphasis, emphasis_form: give one modality the weight 1 + β, β = ``emphasis``: "features" scales
            what the fusion receives of it, in training and inference; "loss" adds β times the cross-entropy of a linear
            classifier on its encoder, over the rows that have it, divided by all rows of the step.
        ebr, kd: settings of the parts, None where the method has none.
    """

    epochs: int = 40
    batch_size: int = 256
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.0
    lr_decay: float = 0.9
    lr_decay_every: int = 100
    encoder: Literal["mlp", "identity"] = "mlp"
    encoder_width: int = 128
    encoder_dim: int = 64
    fusion: Literal["concat", "late", "transformer"] = "concat"
    fusion_hidden: tuple[int, ...] = (128,)
    fusion_dim: int = 64
    fusion_heads: int = 4
    fusion_depth: int = 2
    modality_dropout: float = 0.0
    substitute_in_training: bool = False
    consistency: float = 0.0
    noise_modality: str | None = None
    noise_rate: float = 0.0
    reversal_schedule: Literal["constant", "linear", "dann", "balanced"] = "constant"
    reversal_ramp: float = 0.5
    adversarial_stop: Literal["score", "loss"] = "score"
    selection: Literal["complete", "masked", "last"] = "complete"
    unimodal_share: float = 1.0
    control: bool = True
    rates: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.7)
    checkpoint_every: int = 1
    keep_checkpoints: int = 2
    ebr: EBRConfig | None = None
    kd: KDConfig | None = field(default=None)
    checkpoint_seconds: float = 300.0
    accumulate: int = 1
    clip_grad_norm: float | None = None
    nonfinite: Literal["stop", "skip"] = "stop"
    rates_modality: str | None = None
    emphasis_modality: str | None = None
    emphasis: float = 0.0
    emphasis_form: Literal["features", "loss"] = "features"

    def __post_init__(self) -> None:
        object.__setattr__(self, "fusion_hidden", tuple(self.fusion_hidden))
        object.__setattr__(self, "rates", tuple(self.rates))
        make_plain(self)
        where = "config"
        check_choices(where, self)
        counts: tuple[str, ...] = ("epochs", "batch_size", "lr_decay_every", "encoder_width", "encoder_dim")
        counts += ("fusion_dim", "fusion_heads", "fusion_depth", "checkpoint_every", "keep_checkpoints", "accumulate")
        _at_least(where, {name: getattr(self, name) for name in counts}, 1)
        _at_least(where, {name: getattr(self, name) for name in ("weight_decay", "unimodal_share")}, 0)
        _positive(where, {"lr": self.lr, "lr_decay": self.lr_decay, "checkpoint_seconds": self.checkpoint_seconds})
        if self.clip_grad_norm is not None:
            _positive(where, {"clip_grad_norm": self.clip_grad_norm})
        for name, value in (("modality_dropout", self.modality_dropout), ("momentum", self.momentum)):
            if not 0 <= value < 1:
                raise InputError(f"{where}: {name} is {value}; it must be at least 0 and below 1")
        if not 0 < self.reversal_ramp <= 1:
            raise InputError(f"{where}: reversal_ramp is {self.reversal_ramp}; it is a share of the run in (0, 1]")
        if not self.fusion_hidden and self.fusion == "concat":
            raise InputError(f"{where}: fusion_hidden is empty; the concat fusion needs at least one hidden width")
        if any(w < 1 for w in self.fusion_hidden):
            raise InputError(f"{where}: fusion_hidden is {list(self.fusion_hidden)}; give widths of 1 or more")
        if self.fusion_dim % self.fusion_heads:
            raise InputError(
                f"{where}: fusion_dim {self.fusion_dim} is not a multiple of fusion_heads {self.fusion_heads}"
            )
        if any(not 0 <= r < 1 for r in self.rates):
            raise InputError(f"{where}: rates is {list(self.rates)}; missing rates are at least 0 and below 1")
        if self.selection == "masked" and not self.rates:
            raise InputError(f"{where}: selection is 'masked' but rates is empty; give missing rates to select by")
        if self.momentum and self.optimizer != "sgd":
            raise InputError(f"{where}: momentum is {self.momentum} but the optimizer is {self.optimizer}, not sgd")
        _at_least(where, {"consistency": self.consistency, "noise_rate": self.noise_rate}, 0)
        if self.consistency and not self.modality_dropout:
            raise InputError(f"{where}: consistency compares masked with complete data; set modality_dropout above 0")
        if self.noise_rate > 1 or (self.noise_rate > 0) != (self.noise_modality is not None):
            raise InputError(f"{where}: noise needs both noise_modality and a noise_rate between 0 and 1")
        _at_least(where, {"emphasis": self.emphasis}, 0)
        if (self.emphasis > 0) != (self.emphasis_modality is not None):
            raise InputError(f"{where}: emphasis needs both emphasis_modality and an emphasis above 0")
        if self.ebr is not None and self.ebr.substitute == "learned" and not self.substitute_in_training:
            raise InputError(f"{where}: substitute 'learned' is trained on hidden slots; set substitute_in_training")
        if self.substitute_in_training and self.ebr is None:
            raise InputError(f"{where}: substitute_in_training needs EBR heads; add an 'ebr' section")
        if self.kd is not None and self.encoder == "identity":
            raise InputError(f"{where}: kd distils into encoders and encoder is 'identity'; use encoder 'mlp'")
        if self.unimodal_epochs == 0 and (self.kd is not None or self.needs_reference):
            part = "kd" if self.kd is not None else "the ranking of ebr"
            raise InputError(
                f"{where}: unimodal_share is {self.unimodal_share}, but {part} needs unimodal models; raise it"
            )

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
        validation part of mfeat (docs/training.md); all else is equal between the methods. "robust" is EBR in the
        form of docs/study.md: ``EBRConfig.robust()``, random masks that are filled as at inference, and consistency.
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
        if config.method != ("ebr" if method == "robust" else method):
            raise InputError(
                f"config: method is {method!r} but the other settings describe {config.method!r}; change one of them"
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of every setting, and ``method``.

        Settings of :data:`_LATER` appear only where they differ from their defaults, which change nothing: so a record
        written before they existed is still equal to, and has the same hash as, that of the same run today.
        """
        values = asdict(self)
        unchanged = [f.name for f in fields(self) if f.name in _LATER and values[f.name] == f.default]
        if values["kd"] is not None:
            plain = KDConfig()
            values["kd"] = {k: v for k, v in values["kd"].items() if k not in _LATER_KD or v != getattr(plain, k)}
        return {"method": self.method} | _plain({k: v for k, v in values.items() if k not in unchanged})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
