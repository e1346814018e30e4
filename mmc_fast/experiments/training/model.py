"""The model of every method: encoders, EBR heads where configured, fusion, outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmc_fast._util.names import unknown
from mmc_fast.errors import InputError
from mmc_fast.nn import EBRHead, EBROutput
from mmc_fast.nn.fusion import ConcatFusion, LateFusion, TransformerFusion

from ..tasks import Classification, Task
from .config import TrainConfig
from .encoder import build_encoder
from .experts import Experts


@dataclass
class ModelOutput:
    """Logits ``[B, C]``; with EBR heads, what the heads returned for the modalities that have one; ``own [B, C]``: the
    logits of the unimodal classifier on the re-weighted modality, where there is one."""

    logits: Tensor
    ebr: EBROutput | None
    own: Tensor | None = None


def _build_fusion(dims: Sequence[int], num_classes: int, config: TrainConfig) -> nn.Module:
    if config.fusion == "concat":
        return ConcatFusion(dims, num_classes, config.fusion_hidden)
    if config.fusion == "late":
        return LateFusion(dims, num_classes, config.fusion_hidden)
    return TransformerFusion(dims, num_classes, config.fusion_dim, config.fusion_heads, config.fusion_depth)


def select_modalities(names: Sequence[str], wanted: Sequence[str] | None) -> list[int]:
    """Columns of the modalities that get an EBR head, in data set order; None means all.

    Raises:
        InputError: an unknown, repeated or empty selection.
    """
    if wanted is None:
        return list(range(len(names)))
    for name in wanted:
        if name not in names:
            raise unknown("ebr modality", name, names)
    if not wanted or len(set(wanted)) != len(wanted):
        raise InputError(f"ebr.modalities is {list(wanted)}; name one or more modalities, each once, or none for all")
    return [i for i, name in enumerate(names) if name in wanted]


class MultimodalModel(nn.Module):
    """``x_i -> encoder_i -> (EBR head) -> fusion -> logits`` for ordered modalities.

    Args:
        dims: modality name -> width, in the order of the data set.
        num_classes: C, the width of the outputs.
        config: architecture part of the settings.
        task: what the outputs mean; None: C classes.

    Buffers of the substitution rule, filled by :func:`mmc_fast.experiments.training.substitution.refresh` and saved with the
    weights: ``similarity`` float64 [h, h] and ``order`` int64 [h] over the h modalities that have a head (order -1
    where it was never computed), and ``prior`` [C], the outputs for a row
    without any modality.
    """

    similarity: Tensor
    order: Tensor
    prior: Tensor

    def __init__(
        self, dims: Mapping[str, int], num_classes: int, config: TrainConfig, task: Task | None = None
    ) -> None:
        super().__init__()
        self.task = task or Classification.of(num_classes)
        self.modalities = list(dims)
        self.input_widths = list(dims.values())
        self.num_classes = num_classes
        self.config = config
        self.encoders = nn.ModuleList(build_encoder(d, config) for d in dims.values())
        self.widths = widths = [int(e.out_dim) for e in self.encoders]  # type: ignore[arg-type]
        self.head: EBRHead | None = None
        self.columns: list[int] = []
        if config.ebr is not None:
            e = config.ebr
            self.columns = select_modalities(self.modalities, e.modalities)
            self.head = EBRHead(
                [widths[i] for i in self.columns],
                latent_dim=e.latent_dim,
                hidden_dim=e.hidden_dim,
                psi_dims=e.psi_dims,
                residual=e.residual,
                normalize=e.normalize,
                backend=e.backend,
            )
        self.fusion = _build_fusion(widths, num_classes, config)
        self.reweighted: int | None = None
        if config.reweight_modality is not None:
            if config.reweight_modality not in self.modalities:
                raise unknown("reweight_modality", config.reweight_modality, self.modalities)
            self.reweighted = self.modalities.index(config.reweight_modality)
        self.own: nn.Linear | None = None
        if self.reweighted is not None and config.reweight_form == "loss":
            self.own = nn.Linear(widths[self.reweighted], num_classes)  # last, so that all else starts as without it
        self.experts: Experts | None = None
        if config.experts:
            self.experts = Experts(self.input_widths, num_classes, config, self.task)
        n = len(self.columns)
        self.register_buffer("similarity", torch.zeros(n, n, dtype=torch.float64))
        self.register_buffer("order", torch.full((n,), -1, dtype=torch.int64))
        self.register_buffer("prior", torch.zeros(num_classes))

    @property
    def beyond_fusion(self) -> bool:
        """Whether the answer is more than the fusion of encoded features: experts."""
        return self.experts is not None

    @property
    def all_have_heads(self) -> bool:
        return self.head is not None and len(self.columns) == len(self.modalities)

    def encode(self, features: Sequence[Tensor], present: Tensor | None = None) -> list[Tensor]:
        """Features ``z_i`` ``[B, width_i]``; rows of an absent modality are never read and come out as zeros."""
        if present is None:
            return [encoder(x) for encoder, x in zip(self.encoders, features, strict=True)]
        encoded = []
        for i, (encoder, x) in enumerate(zip(self.encoders, features, strict=True)):
            keep = present[:, i, None]
            z = encoder(torch.where(keep, x, x.new_zeros(())))
            encoded.append(torch.where(keep, z, z.new_zeros(())))
        return encoded

    def head_present(self, present: Tensor) -> Tensor:
        """Columns of ``present`` that belong to modalities with a head."""
        return present if self.all_have_heads else present[:, self.columns]

    def apply_head(
        self,
        encoded: Sequence[Tensor],
        present: Tensor | None,
        source: Tensor | None = None,
        reversal: float | Tensor = 0.0,
        normalizer: Tensor | None = None,
    ) -> EBROutput:
        """The EBR head on the features of its modalities; ``source`` is over these modalities."""
        if self.head is None:
            raise RuntimeError("this model has no EBR heads; give TrainConfig an 'ebr' section")
        inputs = [encoded[i] for i in self.columns]
        available = None if present is None else self.head_present(present)
        return self.head(inputs, present=available, source=source, reversal=reversal, normalizer=normalizer)

    def latents(self, features: Sequence[Tensor], present: Tensor | None = None) -> Tensor:
        """Latents ``g`` ``[h, B, k]`` of the modalities with a head; zeros where absent."""
        return self.apply_head(self.encode(features, present), present).latents

    def forward(
        self,
        features: Sequence[Tensor],
        present: Tensor | None = None,
        source: Tensor | None = None,
        reversal: float | Tensor = 0.0,
        normalizer: Tensor | None = None,
    ) -> ModelOutput:
        """Logits for features ``[B, d_i]`` and presence bool ``[B, m]`` (None: all present).

        ``source`` (see :class:`mmc_fast.nn.EBRHead`) fills absent modalities; a filled one is not masked in the
        fusion. ``reversal`` is the lambda of the gradient reversal inside the head, ``normalizer`` the
        denominators of its losses. With fitted experts the answer in evaluation is that of the product.
        """
        out = self._answer(features, present, source, reversal, normalizer)
        if self.experts is not None and not self.training and bool(self.experts.fitted):
            return ModelOutput(self.experts(features, present, out.logits), out.ebr, out.own)
        return out

    def _answer(
        self,
        features: Sequence[Tensor],
        present: Tensor | None,
        source: Tensor | None,
        reversal: float | Tensor,
        normalizer: Tensor | None,
    ) -> ModelOutput:
        encoded = self.encode(features, present)
        own = None if self.own is None or self.reweighted is None else self.own(encoded[self.reweighted])
        if self.head is None:
            return ModelOutput(self._logits(encoded, present), None, own)
        out = self.apply_head(encoded, present, source, reversal, normalizer)
        for h, i in enumerate(self.columns):
            encoded[i] = out.recovered[h]
        return ModelOutput(self._logits(encoded, self._visible(present, source)), out, own)

    def _logits(self, received: Sequence[Tensor], visible: Tensor | None) -> Tensor:
        return self.fusion(self.weighted(received), visible)

    def weighted(self, received: Sequence[Tensor]) -> list[Tensor]:
        """What the fusion receives, with that of the re-weighted modality scaled by 1 + β where the form is "features"."""
        if self.reweighted is None or self.config.reweight_form != "features":
            return list(received)
        factor = 1 + self.config.reweight
        return [z * factor if i == self.reweighted else z for i, z in enumerate(received)]

    def _visible(self, present: Tensor | None, source: Tensor | None) -> Tensor | None:
        """Presence as the fusion sees it: a modality that a present latent fills counts as present."""
        if present is None or source is None:
            return present
        available = self.head_present(present)
        if source.is_floating_point():
            filled = ((source != 0) & available.unsqueeze(1)).any(-1)
        else:
            filled = (source >= 0) & available.gather(1, source.clamp(min=0))
        if self.all_have_heads:
            return filled
        visible = present.clone()
        visible[:, self.columns] = filled
        return visible

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameter groups: "encoders" (f and h), "task" (decoders and fusion), "discriminator" (psi)."""
        encoders = list(self.encoders.parameters())
        task = list(self.fusion.parameters())
        discriminator: list[nn.Parameter] = []
        if self.own is not None:
            task += self.own.parameters()
        if self.head is not None:
            encoders += self.head.encoders.parameters()
            task = list(self.head.decoders.parameters()) + task
            discriminator = list(self.head.discriminator.parameters())
        return {"encoders": encoders, "task": task, "discriminator": discriminator}
