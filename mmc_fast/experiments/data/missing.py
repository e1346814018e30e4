"""Missingness put on top of what is absent by nature: completely at random, seeded, measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmc_fast.errors import InputError


@dataclass(frozen=True, eq=False)
class Missingness:
    """Result of :func:`mcar`.

    ``present`` bool [N, m]; ``nominal`` the rate asked for (one, or one per modality); ``realised[i]`` the share of
    the rows with modality i that lost it (0 where no row has it). The realised rate is below the nominal one, since
    no row may lose everything: with two modalities, nominal 0.7 becomes 0.41.
    """

    present: Tensor
    nominal: float | tuple[float, ...]
    realised: list[float]


def mcar(present: Tensor, rate: float | Sequence[float], generator: torch.Generator) -> Missingness:
    """Remove modalities completely at random; rows with nothing left are drawn again whole.

    Each present entry is removed with probability ``rate`` (one, or one per modality), independently, given that its
    row keeps at least one. That condition is drawn exactly and in one pass, column by column: while nothing is kept,
    column j is kept with probability ``(1 - q_j) / (1 - prod_{l >= j, present} q_l)``, afterwards with ``1 - q_j``.
    So the law is that of redrawing, without its unbounded loop. A row with one modality keeps it; an empty row stays
    empty; rate 0 changes nothing.

    Args:
        present: bool [N, m], natural presence.
        rate: in [0, 1).
        generator: on the CPU; the same state gives the same mask.

    Raises:
        InputError: rate outside of [0, 1) or of wrong number, ``present`` not bool [N, m].
        TypeError: ``generator`` is not a ``torch.Generator``.

    Source: the protocol behind table 1 of Chaudhuri et al. (ICML 2025), made exact.

    Examples:
        >>> present = torch.ones(10_000, 2, dtype=torch.bool)
        >>> missing = mmc_fast.experiments.data.mcar(present, rate=0.7, generator=torch.Generator().manual_seed(0))
        >>> bool(missing.present.any(1).all()), [round(float(rate), 1) for rate in missing.realised]
        (True, [0.4, 0.4])
    """
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}.")
    if not isinstance(present, Tensor) or present.dtype != torch.bool or present.dim() != 2:
        got = f"{present.dtype} {list(present.shape)}" if isinstance(present, Tensor) else type(present).__name__
        raise InputError(f"mcar: present must be a bool tensor [N, m], got {got}.")
    m = present.shape[1]
    nominal = _rates(rate, m)
    natural = present.cpu()
    q = torch.tensor(nominal if isinstance(nominal, tuple) else [nominal] * m, dtype=torch.float64)
    u = torch.rand(natural.shape, generator=generator, dtype=torch.float64)
    weights = torch.where(natural, q, torch.ones_like(u))
    none_left = weights.flip(1).cumprod(1).flip(1)  # [N, m] chance that columns j and later all go
    kept = torch.zeros_like(natural)
    any_kept = torch.zeros(len(natural), dtype=torch.bool)
    for j in range(m):
        chance = torch.where(any_kept, 1 - q[j], (1 - q[j]) / (1 - none_left[:, j]).clamp_min(1e-300))
        kept[:, j] = natural[:, j] & (u[:, j] < chance)
        any_kept |= kept[:, j]
    had, lost = natural.sum(0), (natural & ~kept).sum(0)
    realised = (lost / had.clamp_min(1)).tolist()
    return Missingness(kept.to(present.device), nominal, [float(r) for r in realised])


def _rates(rate: float | Sequence[float], m: int) -> float | tuple[float, ...]:
    """``rate`` as a number or as m numbers; raises InputError for anything else."""
    if not isinstance(rate, list | tuple):
        return _one_rate(rate)
    if len(rate) != m:
        raise InputError(f"mcar: {len(rate)} rates for {m} modalities; give one number, or {m}.")
    return tuple(_one_rate(r) for r in rate)


def _one_rate(rate: object) -> float:
    if isinstance(rate, int | float | np.integer | np.floating) and not isinstance(rate, bool):
        value = float(rate)
        if 0 <= value < 1:  # NaN fails the comparison
            return value
    raise InputError(f"mcar: rate {rate!r} is not allowed; give a number in [0, 1), or one for each modality.")
