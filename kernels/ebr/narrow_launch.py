"""Launchers of the narrow EBR kernels: allocate, choose tiles, launch; tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import triton
from torch import Tensor

from ..common import NarrowTile, ebr_narrow_tile
from . import counter as ebr_counter
from .narrow_bwd import ebr_narrow_bwd_kernel, ebr_narrow_finish_kernel
from .narrow_fwd import ebr_narrow_fwd_kernel
from .plan import Inputs, Needs, Upstream, float_precision, index_type, padded

__all__ = ["backward", "forward", "saved_shapes"]

_FINISH_BLOCK = 1024
_SLICES = 128  # programs of the weight gradients over all modalities: about one for each multiprocessor


def _constants(inputs: Inputs, tile: NarrowTile) -> dict[str, object]:
    sizes, dtype = inputs.sizes, inputs.features[0].dtype
    return {
        "M": sizes.m,
        "PSI_DIMS": sizes.psi,
        "PSI_PADS": tuple(padded(p) for p in sizes.psi),
        "HIDDEN": len(sizes.psi) - 2,
        "BM": tile.rows,
        "BH": tile.hidden,
        "BD": tile.features,
        "DEPTH": tile.depth,
        "RESIDUAL": inputs.residual,
        "NORMALIZE": inputs.normalize,
        "PREC": float_precision(dtype),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "maxnreg": tile.registers,
        "enable_fp_fusion": True,
    }


def saved_shapes(m: int, batch: int, normalize: bool) -> list[tuple[int, ...]]:
    """Shapes of what forward keeps, all float32: denominators, and reciprocal standard deviations."""
    return [(2,), (m, batch)] if normalize else [(2,)]


def forward(inputs: Inputs) -> tuple[list[Tensor], Tensor, Tensor, Tensor, list[Tensor]]:
    """One launch; returns (recovered, latents, discrimination loss, reconstruction loss, saved)."""
    like, sizes, batch = inputs.features[0], inputs.sizes, inputs.batch
    tile = ebr_narrow_tile(like.dtype, "forward", float_precision(like.dtype), sizes.latent)
    tiles = max(1, triton.cdiv(batch, tile.rows))
    recovered = [torch.empty(batch, d, dtype=like.dtype, device=like.device) for d in sizes.dims]
    latents = torch.empty(sizes.m, batch, sizes.latent, dtype=like.dtype, device=like.device)

    def scalars(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=like.device)

    md, rec, counts, partials = scalars(), scalars(), scalars(2), scalars(sizes.m * tiles, 4)
    saved = [counts, scalars(sizes.m, batch)] if inputs.normalize else [counts]
    index = index_type([*inputs.features, *recovered, latents, *inputs.masks])
    stride_xb, stride_xd = inputs.strides_x
    ebr_narrow_fwd_kernel[(sizes.m * tiles,)](
        inputs.features, tuple(recovered), *(inputs.column(kind) for kind in range(8)), inputs.psi,
        latents=latents, rstd_out=saved[-1], partials=partials, counter=ebr_counter.take(like.device),
        md_out=md, rec_out=rec, counts=counts, dims=sizes.dims, stride_xb=stride_xb, stride_xd=stride_xd,
        B=batch, H=sizes.hidden, tiles=tiles,
        INDEX=index, **inputs.mask_arguments, **inputs.normalizer_arguments, **_constants(inputs, tile),
    )  # fmt: skip
    return recovered, latents, md, rec, saved


def backward(
    inputs: Inputs,
    upstream: Upstream,
    reversal: Tensor,
    recovered: Sequence[Tensor],
    latents: Tensor,
    saved: Sequence[Tensor],
    needs: Needs,
) -> tuple[Sequence[Tensor | None], Tensor | None, Sequence[Tensor | None]]:
    """Gradients of features, source, parameters, None where none of them is wanted: three launches, or fewer.

    A memset where atomics are allowed, rows and weights, and the sums. Some tiles take rows (with the memset) and weights
    in two launches. Without gradients of parameters the rows are all.
    """
    like, sizes, batch, m = inputs.features[0], inputs.sizes, inputs.batch, inputs.sizes.m
    with_source = needs.source and inputs.source is not None
    tile = ebr_narrow_tile(like.dtype, "backward", float_precision(like.dtype), sizes.latent, with_source)
    slices = max(1, min(triton.cdiv(batch, tile.rows), _SLICES // m))
    slice_rows = triton.cdiv(max(1, triton.cdiv(batch, tile.rows)), slices) * tile.rows
    atomic = not torch.are_deterministic_algorithms_enabled()

    numels = [p.numel() for p in inputs.params]
    starts = [sum(numels[:n]) for n in range(8 * m)]
    heads_size, psi_size = sum(numels[: 8 * m]), sum(numels[8 * m :])
    head_slabs, psi_slabs = (1, 1) if atomic else (slices, m * slices)
    slab_size = (head_slabs * heads_size + psi_slabs * psi_size) if needs.params else 0
    together = needs.params and tile.weights is None
    allocate = torch.zeros if atomic and together else torch.empty
    slabs = allocate(slab_size, dtype=torch.float32, device=like.device)

    d_features = [torch.empty_like(r) for r in recovered] if needs.features else [None] * m
    d_source = torch.empty(batch, m, m, dtype=inputs.source.dtype, device=like.device) if with_source else None
    given = upstream.given(inputs)
    gradients = [*given, latents if upstream.latents is None else upstream.latents]
    written = [] if d_source is None else [d_source]
    index = index_type([*inputs.features, *recovered, latents, *gradients, *inputs.masks, *written])
    stride_xb, stride_xd = inputs.strides_x
    launch = partial(
        ebr_narrow_bwd_kernel[(m * slices,)],
        inputs.features, tuple(recovered), given, tuple(d_features) if needs.features else tuple(recovered),
        *(inputs.column(kind) for kind in (0, 1, 2, 4, 5, 6)), inputs.psi,
        latents=latents, rstd_in=saved[-1], counts=saved[0], reversal=reversal,
        d_source=latents if d_source is None else d_source, d_z=torch.empty_like(latents), slabs=slabs,
        dims=sizes.dims, stride_xb=stride_xb, stride_xd=stride_xd,
        enc_at=tuple(starts[4 * i] for i in range(m)), dec_at=tuple(starts[4 * m + 4 * i] for i in range(m)),
        B=batch, H=sizes.hidden, slices=slices, slice_rows=slice_rows, heads_size=heads_size,
        psi_at=head_slabs * heads_size, psi_size=psi_size, slab_size=slab_size if atomic else 0,
        FEATURES=needs.features, HAS_D_SOURCE=with_source, ATOMIC=atomic, INDEX=index,
        **upstream.arguments(inputs, latents, saved[0]), **inputs.mask_arguments,
    )  # fmt: skip
    launch(ROWS=True, WEIGHTS=together, **_constants(inputs, tile))
    if needs.params and tile.weights is not None:
        launch(ROWS=False, WEIGHTS=True, **_constants(inputs, tile.weights))
    if not needs.params:
        return d_features, d_source, [None] * len(numels)

    d_params = [torch.empty_like(p) for p in inputs.params]
    blocks = [triton.cdiv(n, _FINISH_BLOCK) for n in numels]
    psi_starts = [sum(numels[8 * m : n]) for n in range(8 * m, len(numels))]
    ebr_narrow_finish_kernel[(sum(blocks),)](
        tuple(d_params), slabs, tuple(sum(blocks[: n + 1]) for n in range(len(blocks))), tuple(numels),
        tuple(starts + psi_starts), heads_size, head_slabs * heads_size, psi_size, head_slabs, psi_slabs,
        N_PARAMS=len(numels), N_HEADS=8 * m, BLOCK=_FINISH_BLOCK, num_warps=4,
    )  # fmt: skip
    return d_features, d_source, d_params
