"""How a diagnosis sees a model: encode a batch into features, fuse features into logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from mmc_fast.agop.head import _flatten, _is_chain_member, _is_linear, refuse_training_mode
from mmc_fast.errors import InputError
from mmc_fast.experiments.data import Part
from mmc_fast.experiments.training.model import MultimodalModel
from mmc_fast.experiments.training.substitution import source_for

__all__ = ["Adapter", "RunAdapter", "chain_of", "flat", "labels_of", "model_of"]


@runtime_checkable
class Adapter(Protocol):
    """A model as two functions. Batches are whatever the loader gives.

    ``encode(batch)``: modality name -> features ``[B, ...]`` as the fusion receives them, in a fixed order and of fixed
    width. ``fuse(features)``: logits ``[B, C]``, differentiable in the features, row by row; it is called after ``encode``
    with features of that same batch, some of them replaced.

    Optional, used where present:

    - ``labels(batch) -> Tensor [B]`` of class numbers, or None. Without it a batch that is a tuple or list of two or more
      ends in its labels.
    - ``head``: the ``nn.Module`` that maps the flattened features side by side to the logits. A chain of Linear layers and
      activations gets exact numbers for each layer and neuron from the fast AGOP.
    - ``represent(features) -> Tensor [B, r]``: the fused representation, where there is no such chain.
    - ``latents(batch) -> {name: [B, k]}``: representations that should not tell their modality, NaN where one is absent.
    - ``model``: the ``nn.Module`` whose training mode is checked.
    """

    def encode(self, batch: Any) -> Mapping[str, Tensor]: ...

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor: ...


class RunAdapter:
    """The adapter of this project's own models; batches are :class:`~mmc_fast.experiments.data.Part`.

    The features are what the fusion receives: with EBR heads the recovered ones, substituted where a modality is absent.
    """

    def __init__(self, model: MultimodalModel) -> None:
        self.model = model.eval()
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


def flat(features: Mapping[str, Tensor]) -> Tensor:
    """All features side by side, ``[B, D]``."""
    return torch.cat([x.flatten(1) for x in features.values()], 1)


def chain_of(head: nn.Module | None) -> list[nn.Module] | None:
    """The layers of a head that begins with a Linear layer and is a chain of such and activations; else None."""
    if head is None:
        return None
    modules = _flatten(head)
    if not modules or not _is_linear(modules[0]) or not all(_is_chain_member(m) for m in modules):
        return None
    return modules


def labels_of(adapter: Adapter, batch: Any) -> Tensor | None:
    """Labels ``[B]`` int64 of a batch, or None."""
    own = getattr(adapter, "labels", None)
    if own is not None:
        found = own(batch)
    else:
        found = batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if found is None:
        return None
    if not isinstance(found, Tensor) or found.dim() != 1 or found.is_floating_point():
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f"diagnose: labels are {got}; give class numbers as an integer tensor [B], or None")
    return found.detach().cpu().long()


def model_of(adapter: Adapter) -> nn.Module | None:
    """The adapter's model, refused where batch statistics or dropout are in training mode."""
    model = getattr(adapter, "model", None) or getattr(adapter, "head", None)
    if isinstance(model, nn.Module):
        try:
            refuse_training_mode(model)
        except InputError as error:
            raise InputError(
                str(error).replace("agop: head.", "diagnose: model.").replace("head.eval", "model.eval")
            ) from None
        return cast(nn.Module, model)
    return None
