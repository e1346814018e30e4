"""Cheap measures of use during training: one function, and a callback for Lightning."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmc_fast._util.extras import require
from mmc_fast.errors import InputError

from .adapter import Adapter, HasAdapter, adapter_of
from .run import diagnose

if TYPE_CHECKING:
    from lightning.pytorch import Callback

LOGGED = ("shuffled", "total_effect", "shapley", "only")
"""Logged for each modality, beside "score.all"."""


def measure_use(
    model: Adapter | HasAdapter,
    batches: Iterable[Any],
    *,
    metric: Any = None,
    absence: str | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """What a log can follow from epoch to epoch: ``{"score.all": …, "shuffled.image": …, "total_effect.image": …, …}``.

    The measures of :func:`mmc_fast.diagnose` of these names without intervals, probes and AGOP: about 2^m + m forwards of the
    fusion on ``batches``; give a few, the same ones each time. The model is put into evaluation mode and back; its weights,
    gradients and the global random state stay. What is not defined, such as a score without labels, is left out.

    Raises InputError as ``diagnose`` does.
    """
    adapter = adapter_of(model)
    modules = [m for m in (getattr(adapter, "model", None), getattr(adapter, "head", None)) if isinstance(m, nn.Module)]
    modes = {part: part.training for m in modules for part in m.modules()}
    try:
        for module in modules:
            module.eval()
        d = diagnose(
            adapter,
            list(batches),
            metric=metric,
            absence=absence,
            seed=seed,
            agop=False,
            probes=False,
            resamples=0,
            draws=1,
        )
    finally:
        for part, mode in modes.items():
            part.training = mode
    names = ["score.all", *(f"{kind}.{name}" for name in d.modalities for kind in LOGGED)]
    found = {name: d.value(name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def use_logger(
    adapter: Callable[[Any], Adapter | HasAdapter],
    batches: Iterable[Any],
    *,
    every: int = 1,
    prefix: str = "use/",
    **options: Any,
) -> Callback:
    """A Lightning callback that logs :func:`measure_use` after every ``every``-th validation.

    ``adapter``: from the LightningModule to its adapter. ``batches``: some batches, kept. ``options``: of :func:`measure_use`.
    Raises InputError for ``every`` below 1; needs ``pip install 'mmc-fast[lightning]'``.
    """
    if every < 1:
        raise InputError(f"use_logger: every is {every}; give a whole number from 1")
    pytorch = require("lightning.pytorch", extra="lightning")
    kept = list(batches)

    class UseLogger(pytorch.Callback):  # type: ignore[misc, name-defined]
        seen = 0

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.seen += 1
            if trainer.sanity_checking or self.seen % every:
                return
            with torch.no_grad():
                found = measure_use(adapter(pl_module), kept, **options)
            pl_module.log_dict({prefix + name: value for name, value in found.items()})

    return UseLogger()
