"""How a diagnosis sees a model: encode a batch into features, fuse features into logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from mmc_fast.agop.head import refuse_training_mode
from mmc_fast.errors import InputError


@runtime_checkable
class Adapter(Protocol):
    """A model as two functions. Batches are whatever the loader gives.

    ``encode(batch)``: modality name -> features ``[B, ...]`` as the fusion receives them, in a fixed order and of fixed
    width. ``fuse(features)``: logits ``[B, C]``, differentiable in the features, row by row; it is called after ``encode``
    with features of that same batch, some of them replaced.

    Optional, used where present:

    - ``forward(batch) -> Tensor [B, C]``: the logits of the untouched model, which ``fuse(encode(batch))`` is compared with
      before any number (:func:`prove`).
    - ``labels(batch)``: class numbers ``[B]``, 0/1 labels or numbers ``[B, C]``, text where the adapter has ``classes``, or None.
      Without it a batch that is a tuple or list of two or more ends in its labels.
    - ``fuse(features, present)``: the model's own handling of absent modalities, ``present`` bool ``[B, m]``.
    - ``inputs(batch) -> {name: Tensor [B, ...]}``: what the encoders receive; and ``unimodal(batch) -> {name: [B, C]}``: outputs of
      models that know one modality only. Both tell what a modality allows by itself.
    - ``head``: the ``nn.Module`` that maps the flattened features side by side to the logits. A chain of Linear layers and
      activations gets exact numbers for each layer and neuron from the fast AGOP.
    - ``represent(features) -> Tensor [B, r]``: the fused representation, where there is no such chain.
    - ``latents(batch) -> {name: [B, k]}``: representations that should not tell their modality, NaN where one is absent.
    - ``metric``: the score where the options name none. ``model``: the ``nn.Module`` whose training mode is checked.
    - ``unimodal_weights``: modality -> ``[h_i, d_i]`` of unimodal models, where the options give none.
    """

    def encode(self, batch: Any) -> Mapping[str, Tensor]: ...

    def fuse(self, features: Mapping[str, Tensor]) -> Tensor: ...


@runtime_checkable
class HasAdapter(Protocol):
    """A model that knows its adapter, such as a finished run: ``diagnose`` takes it as it is."""

    def as_adapter(self) -> Adapter: ...


def adapter_of(model: Adapter | HasAdapter) -> Adapter:
    """``model`` itself if it is an adapter, else the one that it brings; InputError or TypeError for anything else."""
    if isinstance(model, HasAdapter):
        model = model.as_adapter()
    if isinstance(model, Adapter):
        return model
    if isinstance(model, nn.Module):
        raise InputError(
            f"diagnose: {type(model).__name__} has no encode() and fuse(); wrap it: "
            "mmc_fast.ModelAdapter(model, features={'image': 'encoders.image', ...}, head='classifier')"
        )
    raise TypeError(f"diagnose: got {type(model).__name__}; give an adapter with encode(batch) and fuse(features)")


def flat(features: Mapping[str, Tensor]) -> Tensor:
    """All features side by side, ``[B, D]``."""
    return torch.cat([x.flatten(1) for x in features.values()], 1)


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


_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@torch.no_grad()
def prove(adapter: Adapter, batch: Any) -> str:
    """Compare ``fuse(encode(batch))`` with the model's own ``forward(batch)``; says what was compared.

    Allowed is a difference of 1e-4 of the largest logit in float32 (1e-9 in float64, 0.01 in float16, 0.05 in bfloat16).

    Raises InputError where they differ by more, with the first module that differs where the adapter can tell
    (``difference(batch) -> str``), and what ``check_order(batch)`` of an adapter raises.
    """
    forward = getattr(adapter, "forward", None)
    if not callable(forward) or isinstance(adapter, nn.Module):
        return "not compared: the adapter has no forward(batch)"
    truth = forward(batch)
    if isinstance(truth, Tensor) and not bool(torch.isfinite(truth).all()):
        row = int((~torch.isfinite(truth.flatten(1)).all(1)).nonzero()[0])
        raise InputError(
            f"diagnose: the model gives NaN or infinite outputs in row {row} of the first batch; drop or repair such samples, or "
            "check the weights"
        )
    getattr(adapter, "check_order", lambda batch: None)(batch)
    found = adapter.fuse(adapter.encode(batch))
    if not isinstance(truth, Tensor) or not isinstance(found, Tensor) or truth.shape != found.shape:
        got = [list(y.shape) if isinstance(y, Tensor) else type(y).__name__ for y in (truth, found)]
        raise InputError(
            f"diagnose: the model gives {got[0]} and fuse(encode(batch)) {got[1]}; both must be the logits"
        )
    gap, size = float((truth - found).abs().max()) if truth.numel() else 0.0, float(truth.abs().max().clamp(min=1e-30))
    if not gap <= _ROUNDING.get(truth.dtype, 1e-4) * size:
        where = getattr(adapter, "difference", lambda batch: "")(batch)
        raise InputError(
            f"diagnose: fuse(encode(batch)) is not what the model gives: {gap:.3g} apart where logits reach {size:.3g}"
            + (f"; {where}" if where else "; check that fuse() uses what encode() returned")
        )
    return f"fuse(encode(batch)) is the model's output on {len(truth)} samples (at most {gap / size:.1e} of the largest apart)"


@torch.no_grad()
def beyond_features(features: Mapping[str, Tensor], logits: Tensor, adapter: Adapter) -> float:
    """How much of the outputs comes from the batch itself and not from the named features, relative to their spread.

    All features of a batch are dealt out anew among its rows: where they are all that the fusion sees, the logits move along.
    """
    order = torch.arange(len(logits), device=logits.device).roll(1)
    moved = adapter.fuse({name: x[order.to(x.device)] for name, x in features.items()})
    spread = float((logits - logits.mean(0)).square().mean())
    return float((moved - logits[order]).square().mean()) / spread if spread > 0 else 0.0
