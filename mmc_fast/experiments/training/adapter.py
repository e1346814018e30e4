"""This project's own models as adapters for :func:`mmc_fast.diagnose`; their batches are parts of a data set."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..data import Part
from .model import MultimodalModel
from .substitution import source_for
from .unimodal import UnimodalModels


class RunAdapter:
    """The adapter of a :class:`MultimodalModel`; batches are :class:`~mmc_fast.experiments.data.Part`.

    The features are what the fusion receives: with EBR heads the recovered ones, substituted where a modality is absent. With
    ``present`` the model handles absent modalities by its own rule, and answers with the prior where nothing is left.
    Of a model with experts, which answers with more than its fusion, the features are the inputs.
    ``metric``: the score of its data. ``unimodal_models``: those of the run; their first layers ``[h_i, d_i]`` are the unimodal weights.
    """

    def __init__(
        self, model: MultimodalModel, unimodal_models: UnimodalModels | None = None, metric: str | None = None
    ) -> None:
        self.model, self.metric = model.eval(), metric
        self.unimodal_weights: dict[str, Tensor] | None = None
        if unimodal_models is not None:
            self.unimodal_models = unimodal_models
            self.unimodal_weights = {name: m.classifier[0].weight for name, m in unimodal_models.models.items()}  # type: ignore[misc]
            self.unimodal = self._unimodal
        shown = model.task.ranked(model.prior[None]).shape[1] == model.task.outputs
        chain = shown and not model.beyond_fusion
        self.head: nn.Module | None = getattr(model.fusion, "layers", None) if chain else None
        self._encoded: list[Tensor] = []
        self._present: Tensor | None = None
        self._visible: Tensor | None = None

    @torch.no_grad()
    def encode(self, batch: Part) -> dict[str, Tensor]:
        device = self.model.prior.device
        self._present = None if bool(batch.present.all()) else batch.present.to(device)
        if self.model.beyond_fusion:
            self._visible = self._present
            self._encoded = [x.to(device) for x in self.inputs(batch).values()]
            return dict(zip(self.model.modalities, self._encoded, strict=True))
        self._encoded = self.model.encode([x.to(device) for x in batch.features], self._present)
        received, self._visible = self._received(self._present)
        return dict(zip(self.model.modalities, received, strict=True))

    def _received(self, present: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
        """What the fusion receives of the last batch where only ``present`` is there, and which of it it sees."""
        model, encoded, visible = self.model, list(self._encoded), present
        if model.beyond_fusion:
            return encoded, present
        if present is not None:
            encoded = [torch.where(present[:, i, None], z, 0.0) for i, z in enumerate(encoded)]
        if model.head is not None:
            source = None if present is None else source_for(model, present)
            out = model.apply_head(encoded, present, source)
            for i, column in enumerate(model.columns):
                encoded[column] = out.recovered[i]
            visible = model._visible(present, source)
        encoded = model.weighted(encoded)
        if visible is not None:  # the fusion reads zeros there
            encoded = [torch.where(visible[:, i, None], z, 0.0) for i, z in enumerate(encoded)]
        return encoded, visible

    def fuse(self, features: Mapping[str, Tensor], present: Tensor | None = None) -> Tensor:
        if present is None:
            return self._answers(list(features.values()), self._visible, self._present)
        here = present if self._present is None else present & self._present
        received, visible = self._received(here)
        return self._answers(received, visible, here)

    def _answers(self, received: list[Tensor], visible: Tensor | None, present: Tensor | None) -> Tensor:
        if not self.model.beyond_fusion:
            return self._shown(self.model.fusion(received, visible), present)
        source = None if visible is None else source_for(self.model, visible)
        return self._shown(self.model(received, visible, source).logits, present)

    def _shown(self, outputs: Tensor, present: Tensor | None) -> Tensor:
        """Outputs as the diagnosis takes them, the prior where nothing is present."""
        if present is not None and not bool(present.any(1).all()):
            outputs = torch.where(present.any(1)[:, None], outputs, self.model.prior)
        return self.model.task.ranked(outputs)

    @torch.no_grad()
    def forward(self, batch: Part) -> Tensor:
        """Outputs of the model as training and evaluation call it, the prior where nothing is present."""
        model, present = self.model, batch.present.to(self.model.prior.device)
        whole = bool(present.all())
        source = None if whole or model.head is None else source_for(model, present)
        features = [x.to(present.device) for x in batch.features]
        logits = model(features, None if whole else present, source).logits
        return self._shown(logits, present)

    @torch.no_grad()
    def _unimodal(self, batch: Part) -> dict[str, Tensor]:
        """Outputs of the unimodal models, the prior where a modality is absent."""
        found = {}
        for i, name in enumerate(self.model.modalities):
            here = batch.present[:, i]
            y = self.model.prior.cpu().expand(len(here), -1).clone()
            if bool(here.any()):
                y[here] = self.unimodal_models.outputs(name, batch.features[i][here])
            found[name] = self.model.task.ranked(y)
        return found

    def inputs(self, batch: Part) -> dict[str, Tensor]:
        """What the encoders receive; zeros where a modality is absent."""
        pairs = zip(self.model.modalities, batch.features, strict=True)
        return {name: torch.where(batch.present[:, i, None], x, 0.0) for i, (name, x) in enumerate(pairs)}

    def labels(self, batch: Part) -> Tensor:
        return self.model.task.targets(batch.labels)

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
        last = None if self.model.beyond_fusion else getattr(self.model.fusion, "classifier", None)
        if last is None:
            return self.fuse(features)
        seen: list[Tensor] = []
        handle = last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            self.fuse(features)
        finally:
            handle.remove()
        return seen[0]
