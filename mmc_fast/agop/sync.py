"""Sum the state of an accumulator over processes with one all-reduce of one float64 vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["all_reduce_sums"]

_EXACT = 2**53  # integers below are exact in float64


def all_reduce_sums(
    states: list[Any], nonfinite: Tensor, n: int, fingerprint: str, seed: int | None, group: Any
) -> int:
    """Replace ``states`` and ``nonfinite`` by their sums over the group; returns the total number of samples.

    Symmetric matrices travel as triangles. Each process also writes a hash of its head and its probe seed into a slot
    of its own, so that the same all-reduce shows to all whether the sums belong together.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("agop: sync() needs a process group; call torch.distributed.init_process_group() first")
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if n >= _EXACT // world:
        raise RuntimeError(f"agop: {n} samples in each of {world} processes exceed 2^53, where counts stop being exact")
    device = nonfinite.device
    slots = torch.zeros(3, world, dtype=torch.float64, device=device)
    slots[0, rank] = int(fingerprint[:12], 16)  # 48 bits
    slots[1, rank] = 0 if seed is None else seed % 2**52
    slots[2, rank] = n
    parts = [slots.reshape(-1), nonfinite.double()]
    parts += [part.reshape(-1) for state in states for part in state.to_sums()]
    packed = torch.cat(parts)
    dist.all_reduce(packed, group=group)
    pieces = iter(packed.split([len(part) for part in parts]))
    heads, seeds, counts = next(pieces).reshape(3, world)
    if len(set(heads.tolist())) > 1:
        raise RuntimeError("agop: the processes hold different heads or options; load the same checkpoint in each")
    if seed is not None and len({s for s, c in zip(seeds.tolist(), counts.tolist(), strict=True) if c}) < int(
        (counts > 0).sum()
    ):
        raise RuntimeError("agop: two processes drew their probes with one seed; pass seed=base + rank")
    nonfinite.copy_(next(pieces).to(torch.int64))
    for state in states:
        state.load_sums(pieces)
    return int(counts.sum())
