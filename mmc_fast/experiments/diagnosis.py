"""This project's own models as adapters for :func:`mmc_fast.diagnose`; their batches are parts of a data set."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .data import Part
from .training.model import MultimodalModel
from .training.substitution import source_for

__all__ = ["RunAdapter"]


class RunAdapter:
    """The adapter of a :class:`MultimodalModel`; batches are :class:`~mmc_fast.experiments.data.Part`.

    The features are what the fusion receives: with EBR heads the recovered ones, substituted where a modality is absent.
    ``unimodal_weights``: modality -> ``[h_i, d_i]``, the first layers of unimodal classifiers, for the weight classifier.
    """

    def __init__(self, model: MultimodalModel, unimodal_weights: Mapping[str, Tensor] | None = None) -> None:
        self.model, self.unimodal_weights = model.eval(), unimodal_weights
        self.head: nn.Module | None = getattr(model.fusion, "layers", None)
        self._visible: Tensor | None = None

    @torch.no_grad()
    def encode(self, batch: Part) -> dict[str, Tensor]:
        model = self.model
        present = None if bool(batch.present.all()) else batch.present
        encoded = model.encode(batch.features, present)
        self._visible = present
        if model.head is not None:
            source = None if present is None else source_for(model, present)
            out = model.apply_head(encoded, present, source)
            for slot, column in enumerate(model.columns):
                encoded[column] = out.recovered[slot]
            self._visible = model._visible(present, source)
        encoded = model.weighted(encoded)
        if self._visible is not None:  # the fusion reads zeros there
            encoded = [torch.where(self._visible[:, i, None], z, 0.0) for i, z in enumerate(encoded)]
        return dict(zip(model.modalities, encoded, strict=True))

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor:
        return self.model.fusion(list(features.values()), self._visible)

    def labels(self, batch: Part) -> Tensor:
        return batch.labels

    @torch.no_grad()
    def latents(self, batch: Part) -> dict[str, Tensor]:
        """EBR latents ``[B, k]`` of the modalities with a head, NaN where one is absent; nothing without heads."""
        model = self.model
        if model.head is None:
            return {}
        here = model.head_present(batch.present)
        found = model.latents(batch.features, batch.present)
        found = torch.where(here.t()[:, :, None], found, torch.nan)
        return {model.modalities[column]: z for column, z in zip(model.columns, found, strict=True)}

    def represent(self, features: Mapping[str, Tensor]) -> Tensor:
        """What the last Linear layer of the fusion receives; the logits where there is none."""
        last = getattr(self.model.fusion, "classifier", None)
        if last is None:
            return self.fuse(features)
        seen: list[Tensor] = []
        handle = last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            self.fuse(features)
        finally:
            handle.remove()
        return seen[0]
