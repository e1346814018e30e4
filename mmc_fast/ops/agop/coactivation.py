"""Co-activation counts of ReLU units, the definition in plain PyTorch and numpy.

Unit ``i`` is active on sample ``n`` when its pre-activation is above zero. The counts
``c[i, j] = #{n : z[n, i] > 0 and z[n, j] > 0}`` are all that a ReLU layer contributes to the AGOP.
The functions here are the contract of the packed kernels:

- bit ``b`` (least significant first) of an int64 word ``w`` belongs to sample ``64 w + b``; bits past the last sample are 0;
- counts are int64 and exact; an update adds to the upper triangle and leaves the strictly lower one alone;
- a NaN or infinite pre-activation raises ``nonfinite[0]`` above zero (how high is unspecified);
- the signs of a row do not depend on the rows beside it, see ``row_stable_linear``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from mmc_fast.errors import InputError

__all__ = ["coactivation_counts", "flag_nonfinite", "pack_signs", "relu_coactivation_update", "row_stable_linear"]

_CHUNK_ROWS = 2048  # a float32 mask of this height counts exactly, and stays in cache
_BYTE_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


def row_stable_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x Wᵀ + b`` whose rows are bitwise the same however the samples are cut into calls: ``[n, d] -> [n, h]``.

    BLAS libraries use other kernels for the last rows of an odd height, and so round them otherwise. A height that is a
    multiple of 64 has no such rows, so a ragged end is computed with zero rows below it.
    """
    rows = x.shape[0]
    ragged = rows % 64
    if not ragged:
        return linear(x, weight, bias)
    padded = x.new_zeros(rows + 64 - ragged, x.shape[1])
    padded[:rows] = x
    return linear(padded, weight, bias)[:rows]


def flag_nonfinite(z: Tensor, nonfinite: Tensor) -> None:
    """Add 1 to the int64 ``nonfinite[0]`` if ``z`` holds a NaN or an infinity, without a host synchronisation."""
    if z.numel():
        low, high = torch.aminmax(z.detach())
        nonfinite += ~(torch.isfinite(low) & torch.isfinite(high))


def pack_signs(z: Tensor) -> Tensor:
    """Pack ``z > 0`` along the samples, 64 to a word: float ``[N, h]`` to int64 ``[h, ceil(N / 64)]``."""
    if z.dim() != 2:
        raise InputError(f"pack_signs: z has shape {list(z.shape)}; pass [samples, units]")
    samples, units = z.shape
    words = -(-samples // 64)
    active = np.zeros((units, 64 * words), dtype=np.uint8)
    active[:, :samples] = (z.detach() > 0).t().cpu().numpy()
    packed = np.packbits(active, axis=1, bitorder="little").view("<i8").astype(np.int64)
    return torch.from_numpy(packed).reshape(units, words).to(z.device)


def coactivation_counts(words: Tensor) -> Tensor:
    """``c[i, j] = Σ_w popcount(words[i, w] & words[j, w])``: int64 ``[h, W]`` to the full, symmetric int64 ``[h, h]``."""
    if words.dim() != 2 or words.dtype != torch.int64:
        raise InputError(
            f"coactivation_counts: words is {words.dtype} of shape {list(words.shape)}; "
            "pass the int64 [units, words] that pack_signs returns"
        )
    units = words.shape[0]
    octets = np.ascontiguousarray(words.cpu().numpy()).view(np.uint8).reshape(units, 8 * words.shape[1])
    counts = np.zeros((units, units), dtype=np.int64)
    for i in range(units):
        counts[i] = _BYTE_ONES[octets & octets[i]].sum(axis=1, dtype=np.int64)
    return torch.from_numpy(counts).to(words.device)


def relu_coactivation_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, nonfinite: Tensor, chunk_rows: int = 0
) -> None:
    """Add the co-activation counts of ``z = x Wᵀ + b`` to the upper triangle of ``counts``, in place.

    ``x [N, d]``, ``weight [h, d]``, ``bias [h]`` or None share one floating dtype; ``counts`` is int64 ``[h, h]`` (its
    diagonal tells how often each unit was active); ``nonfinite`` is int64 ``[1]``. ``chunk_rows = 0`` chooses the step.
    """
    units = weight.shape[0]
    panel = max(64, -(-units // 4))
    for part in x.split(chunk_rows or _CHUNK_ROWS):
        z = row_stable_linear(part, weight, bias)
        flag_nonfinite(z, nonfinite)
        active = (z > 0).to(torch.float32)
        for start in range(0, units, panel):
            stop = min(start + panel, units)
            block = (active[:, start:stop].t() @ active[:, start:]).to(torch.int64)
            block[:, : stop - start].triu_()
            counts[start:stop, start:] += block
