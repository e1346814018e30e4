"""Taking modalities away from a model: by its own mask, by the features of other samples, by the mean."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmc_fast.errors import InputError

from .adapter import Adapter
from .measures.reliance import MAX_MODALITIES

ABSENCES = ("model", "resample", "mean")
_ENOUGH, _MOST = 2048, 4


def has_own_mask(adapter: Adapter) -> bool:
    """Whether the model handles absent modalities itself: ``fuse(features, present)``."""
    try:
        return "present" in inspect.signature(adapter.fuse).parameters
    except (TypeError, ValueError):
        return False


def absence_of(adapter: Adapter, asked: str | None) -> str:
    """How modalities are removed: what was asked for, else "model" where the model can, else "resample"."""
    own = has_own_mask(adapter)
    if asked is None:
        return "model" if own else "resample"
    if asked == "model" and not own:
        raise InputError(
            "diagnose: absence='model' needs fuse(features, present) and this adapter has fuse(features); use 'resample'"
        )
    return asked


def draws_for(samples: int, asked: int | None) -> int:
    """How often other samples stand in for each one: the fewer samples, the more often, so that the noise of it is small."""
    return asked or max(1, min(_MOST, -(-_ENOUGH // max(1, samples))))


@dataclass(frozen=True)
class Condition:
    """Modalities that are in, how the others are removed, and which draw of other samples."""

    members: tuple[bool, ...]
    absence: str
    draw: int = 0


def coalitions_scored(m: int) -> list[int]:
    """The coalitions that are scored, entry i of one is bit i: all 2^m; for many modalities those of none, one, all but one, all."""
    full = (1 << m) - 1
    if m <= MAX_MODALITIES:
        return list(range(full + 1))
    single = [1 << i for i in range(m)]
    return [0, *single, *(full ^ bit for bit in single), full]


def conditions_of(m: int, absence: str, draws: int) -> dict[str, list[Condition]]:
    """What is scored: "coalition.C" for each coalition C (bits), "shuffled.I" for modality I resampled alone, and "resampled.C",
    the coalitions with other samples in place of what is absent, whatever ``absence`` is.

    Their scores are means over draws. Without any modality a model's own mask leaves nothing to ask, so that coalition is missing
    there and counts as chance.
    """
    found: dict[str, list[Condition]] = {}
    full = (1 << m) - 1
    for c in coalitions_scored(m):
        if absence == "model" and not c:
            continue
        count = draws if absence == "resample" and c != full else 1
        found[f"coalition.{c}"] = [Condition(_members(c, m), absence, draw) for draw in range(count)]
    for i in range(m):
        found[f"shuffled.{i}"] = [Condition(_members(full ^ 1 << i, m), "resample", draw) for draw in range(draws)]
    for c in coalitions_scored(m):
        count = 1 if c == full else draws
        found[f"resampled.{c}"] = [Condition(_members(c, m), "resample", draw) for draw in range(count)]
    return found


def _members(coalition: int, m: int) -> tuple[bool, ...]:
    return tuple(bool(coalition >> i & 1) for i in range(m))


class Remover:
    """Outputs of a model under conditions.

    ``kept``: a sample of rows, in random order: "x", their features side by side ``[R, D]``, "row", their number ``[R]``, and
    "place", the group ``[R]`` that they are scored in.
    """

    def __init__(
        self, fuse: Callable[..., Tensor], widths: Mapping[str, int], kept: Mapping[str, Tensor], groups: int
    ) -> None:
        self.fuse, sizes, x = fuse, list(widths.values()), kept["x"]
        self.donors = dict(zip(widths, x.split(sizes, 1), strict=True))
        self.mean = dict(zip(widths, x.mean(0).split(sizes), strict=True))
        self.rows, self.order = kept["row"], kept["place"].argsort(stable=True)
        self.counts = torch.bincount(kept["place"], minlength=groups)
        self.starts = self.counts.cumsum(0) - self.counts

    def drawn(self, rows: Tensor, places: Tensor, random: torch.Generator) -> Tensor:
        """Which kept sample stands in for each of ``rows`` in the groups ``places``: one for all modalities that are removed together.

        It is another sample of the same group, so that groups stay independent of each other and the spread of their scores holds
        that of the draws; a group that has no other takes one of any group.
        """
        count, start = self.counts[places], self.starts[places]
        step = (torch.rand(len(rows), generator=random) * count).long()
        anyone = torch.randint(len(self.rows), (len(rows),), generator=random)

        def member(step: Tensor) -> Tensor:
            return self.order[(start + step % count.clamp(min=1)).clamp(max=len(self.order) - 1)]

        chosen = member(step)
        chosen = torch.where(self.rows[chosen] == rows, member(step + 1), chosen)
        anyone = torch.where(self.rows[anyone] == rows, (anyone + 1) % len(self.rows), anyone)
        return torch.where((count == 0) | (self.rows[chosen] == rows), anyone, chosen)

    def outputs(self, features: Mapping[str, Tensor], condition: Condition, drawn: Tensor) -> Tensor:
        """Outputs ``[B, C]`` with the modalities outside of ``condition.members`` removed; ``drawn``: ``[B]``, or of each one ``[B, m]``."""
        inside = dict(zip(features, condition.members, strict=True))
        if condition.absence == "model" and not all(inside.values()):
            first = next(iter(features.values()))
            present = torch.tensor(condition.members, device=first.device).expand(len(first), -1)
            return self.fuse(dict(features), present)
        chosen = dict(features)
        for i, (name, x) in enumerate(features.items()):
            if not inside[name]:
                if condition.absence == "resample":
                    rows = self.donors[name][drawn if drawn.dim() == 1 else drawn[:, i]]
                else:
                    rows = self.mean[name].expand(len(x), -1)
                chosen[name] = rows.to(x).reshape(x.shape)
        return self.fuse(chosen)
