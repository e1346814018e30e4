"""``EBRCallback``: EBR in a LightningModule by one argument of the Trainer."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mmc_fast.errors import InputError
from mmc_fast.functional import check_reversal

from .apply import apply_ebr
from .handle import EBRHandle, find_handles
from .site import Site
from .watch import held_by

try:
    import lightning.pytorch as pl
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "mmc_fast.integrations.lightning needs Lightning; install it with: pip install 'mmc-fast[lightning]'"
    ) from error

__all__ = ["EBRCallback"]


class EBRCallback(pl.Callback):
    """Put EBR heads on the LightningModule, add the losses to its training step, and log the adversarial training.

    ``loss = training_step(...) + L_md + reconstruction * L_rec``. The heads are put on in ``setup``, before optimisers
    are configured and checkpoints restored, and stay on after the fit. Logged under ``prefix``: ``loss_md``,
    ``loss_rec`` and ``reversal`` in every step; every ``log_every`` steps also ``loss_md_over_entropy``,
    ``psi_accuracy``, ``grad_norm_psi`` and ``grad_norm_encoders`` (:meth:`EBRHandle.adversarial`).

    Args:
        at: modality -> submodule of the LightningModule; None if :func:`mmc_fast.apply_ebr` was called on it already.
        reversal: λ, or a function of the progress of the fit in [0, 1) that gives it. None: 1, or that of the heads
            that are there already.
        reconstruction: weight of L_rec (>= 0).
        total_steps: length of the schedule ``reversal``; None: the Trainer's number of steps, where it knows one.
        log_every: steps between two looks at :meth:`EBRHandle.adversarial`; None: the Trainer's ``log_every_n_steps``; 0: never.
        prefix: of the logged names.
        options: of :func:`mmc_fast.apply_ebr` (``latent_dim``, ``dims``, ``example``, ``seed``, ...).

    Attributes:
        handle: the :class:`EBRHandle`, from ``setup`` on.

    Raises:
        InputError: λ that is none; in ``setup``: manual optimisation (add ``handle.losses()`` in your own step), no heads or
            several although ``at`` is None, or what ``apply_ebr`` refuses; at the start of training: a schedule without a
            known length.

    A step may run the module more than once, or its submodules one by one: the losses are over all rows of the step.
    ``load_from_checkpoint(path, strict=False)`` and then :func:`mmc_fast.load_ebr` read a checkpoint without a Trainer.
    """

    def __init__(
        self,
        at: Mapping[str, str | Site] | None = None,
        *,
        reversal: float | Tensor | Callable[[float], float] | None = None,
        reconstruction: float = 0.0,
        log_every: int | None = None,
        prefix: str = "ebr/",
        total_steps: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if reversal is not None and not callable(reversal):
            check_reversal(reversal, "EBRCallback(reversal=...)")
        if isinstance(reconstruction, (bool, str)) or not 0 <= reconstruction < float("inf"):
            raise InputError(f"EBRCallback: reconstruction is {reconstruction!r}; it must be finite and not negative")
        if total_steps is not None and total_steps < 1:
            raise InputError(f"EBRCallback: total_steps is {total_steps}; give a number of steps, 1 or more")
        if log_every is not None and log_every < 0:
            raise InputError(f"EBRCallback: log_every is {log_every}; give a number of steps, 0 for never")
        if at is None and options:
            raise InputError(f"EBRCallback: {', '.join(options)} given without at; name the submodules, or drop them")
        self.at, self.options = at, options
        self.reversal, self.reconstruction = reversal, reconstruction
        self.log_every, self.prefix, self.total_steps = log_every, prefix, total_steps
        self._steps: float | None = None  # of the schedule, in this fit
        self.handle: EBRHandle | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.handle = self._find_or_apply(pl_module)
        if self.reversal is not None and not callable(self.reversal):
            self.handle.reversal = self.reversal
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise InputError(
                "EBRCallback: the module optimises by hand; call apply_ebr on it and add handle.losses() in your step"
            )
        original = pl_module.training_step

        @functools.wraps(original)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            return self._step(trainer, pl_module, original, *args, **kwargs)

        # On the instance, so that the class stays as it is; teardown takes it off.
        pl_module.training_step = training_step  # type: ignore[method-assign]

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.handle is not None:
            self.handle.unwatch(initial_only=True)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps = None
        if callable(self.reversal):
            self._steps = self.total_steps or trainer.estimated_stepping_batches
            if not 0 < self._steps < float("inf"):
                raise InputError(
                    "EBRCallback: reversal is a schedule, but the Trainer does not know how many steps it will take (a loader "
                    "without length, or max_epochs=-1); give EBRCallback(total_steps=...), Trainer(max_steps=...), or a number"
                )
        if self.handle is not None and trainer.optimizers:
            held = held_by(getattr(o, "optimizer", o) for o in trainer.optimizers)
            if (
                not any(id(p) in held for p in self.handle.parameters())
                and "FSDP" not in type(trainer.strategy).__name__
            ):
                sites = ", ".join(map(str, self.handle.sites.values()))
                warnings.warn(
                    f"EBRCallback: the heads at {sites} are in no optimiser of the Trainer; let configure_optimizers take "
                    "self.parameters(), or add a group with self.ebr.parameters()",
                    stacklevel=2,
                )
                self.handle.unwatch()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            pl_module.__dict__.pop("training_step", None)
        if self.handle is not None and self.handle.head is not None:
            self.handle.reset()

    def _find_or_apply(self, pl_module: pl.LightningModule) -> EBRHandle:
        handles = find_handles(pl_module)
        if self.handle in handles:  # a second fit, or a test after the fit
            return self.handle  # type: ignore[return-value]
        if self.at is not None:
            return apply_ebr(pl_module, self.at, **self.options)
        if len(handles) != 1:
            raise InputError(
                f"EBRCallback: the module has {len(handles)} EBR handles; give at={{modality: submodule}}, or call "
                "apply_ebr on it once"
            )
        return handles[0]

    def _step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, original: Callable[..., Any], *args: Any, **kw: Any
    ) -> Any:
        handle = self.handle
        if handle is None:
            raise RuntimeError("EBRCallback: the training step ran before setup")
        if callable(self.reversal):
            _set_reversal(handle, self.reversal(min(1.0, trainer.global_step / (self._steps or 1))))
        with handle.step():
            result = original(*args, **kw)
        if result is None:  # Lightning's way to skip a batch
            return None
        losses = handle.losses()
        extra = losses.discrimination + self.reconstruction * losses.reconstruction
        self._log(trainer, pl_module, handle)
        if isinstance(result, Mapping):
            return {**result, "loss": result["loss"] + extra}
        return result + extra

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule, handle: EBRHandle) -> None:
        losses = handle.losses()
        figures: dict[str, Any] = {
            "loss_md": losses.discrimination.detach(),
            "loss_rec": losses.reconstruction.detach(),
            "reversal": handle.reversal,
        }
        every = trainer.log_every_n_steps if self.log_every is None else self.log_every  # type: ignore[attr-defined]
        if every and (trainer.global_step + 1) % every == 0:
            figures |= handle.adversarial()
        pl_module.log_dict({self.prefix + name: value for name, value in figures.items()}, on_step=True, on_epoch=False)


def _set_reversal(handle: EBRHandle, value: float) -> None:
    check_reversal(value, "EBRCallback(reversal=schedule)")
    if isinstance(handle.reversal, Tensor):
        handle.reversal.fill_(value)
    else:
        handle.reversal = value
