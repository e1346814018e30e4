"""The EBR step in Triton: which launches, in which order; tensors in, tensors out.

Forward: the table; encoders' first layer; second layer; normalisation if asked; mixing with a source; decoders' first layer
with the discriminator's; decoders' second with the discriminator's next; what is left of its hidden layers; its end; losses.
Backward: the table; gradient of the decoders' outputs; layers 3, 2, 1, 0 with the discriminator's layers riding along, the
gradient of the latents by rows between 2 and 1 where there is a source or normalisation; the fold of weight gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common import Tile, cdiv, padded, product_kind, usable
from . import products, rows
from .plan import LOSS_TILES, Call, Needs, Sizes, Upstream, product_tile, round16, shares, unsupported

__all__ = ["Needs", "Upstream", "backward", "forward", "saved_like", "unsupported", "usable"]

_ROW_ELEMENTS = 4096  # of a tile of whole rows
_FOLD = 1024  # elements of a gradient to a program
_SHARE, _PSI_SHARE = 1024, 2048  # rows to a share of a weight gradient, at least
_MOST_SHARES = 32


def forward(
    features: Sequence[Tensor], present: Tensor | None, source: Tensor | None, normalizer: Tensor | None,
    params: Sequence[Tensor], residual: bool, normalize: bool, keep: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Return (recovered, latents, both losses, what backward needs); the last is empty unless ``keep``.

    Seven launches; one more for each of: widths that 16 does not divide, normalisation, a source, a hidden layer of the
    discriminator beyond the second.
    """
    call = Call(features, present, source, params, residual, normalize, ("forward", keep), (normalizer,))
    sizes, m, batch = call.sizes, call.sizes.m, call.batch
    recovered = [call.empty(batch, d) for d in sizes.dims]
    call.address(recovered)
    h1, g, h3 = call.rows(sizes.hidden), call.rows(sizes.latent), call.rows(sizes.hidden)
    acts = [call.rows(p) for p in sizes.psi[1:-1]]
    squared = g

    def layer(number: int, a: Tensor, c: Tensor, psi: int = -1) -> None:
        """A layer of the heads, with layer ``psi`` of the discriminator if there is such; number −1: that alone."""
        nonlocal squared
        programs, options = call.once((number, psi), lambda: constants(number, psi))
        rides = 0 <= psi < len(acts)
        if number == 3:
            squared = call.floats(programs)
        below = ([g, *acts])[psi] if rides else a
        call.launch(
            products.ebr_fwd_kernel, programs, call.table, a, c, below, acts[psi] if rides else c, squared, call.present,
            call.source, batch, psi, **options,
        )  # fmt: skip

    def constants(number: int, psi: int) -> tuple[int, dict[str, Any]]:
        """How many programs a layer takes, and what its kernel is compiled for."""
        rides = 0 <= psi < len(acts)
        own = [] if number < 0 else [outputs for _, outputs in _widths(sizes, number)]
        tile = product_tile(call.kind, max(own or [sizes.psi[psi + 1]]))
        widest = max([*own, *([sizes.psi[psi + 1]] if rides else [])])
        tiles = cdiv(batch, tile.blocks["BM"]) * cdiv(round16(widest), tile.blocks["BN"])
        return tiles * m * (2 if rides and own else 1), _constants(call, number, rides, tile)

    layer(0, g, h1)
    layer(1, h1, g)
    rstd = []
    if normalize:
        rstd = [call.floats(m, batch)]
        _by_rows(call, rows.ebr_norm_kernel, g, rstd[0], call.present)
    u = g
    if source is not None:
        u = call.rows(sizes.latent)
        _by_rows(call, rows.ebr_mix_kernel, g, u, call.present, call.source)
    layer(2, u, h3, 0)
    layer(3, h3, h3, 1)
    for psi in range(2, len(acts)):
        layer(-1, g, h1, psi)

    tile = LOSS_TILES[call.kind]
    programs = m * cdiv(batch, tile.blocks["BM"])
    top = round16(sizes.psi[-2])
    train = (call.rows(top), call.floats(programs, m * top + m)) if keep else None
    partials, counts = call.floats(programs, 4), call.floats(2)
    call.launch(
        rows.ebr_loss_kernel, programs, call.table, acts[-1] if acts else g, train, partials, call.present, call.source, batch,
        M=m, LAYERS=call.layers, MP=padded(m), PREC=call.precision, **tile.options,
    )  # fmt: skip
    values = None if normalizer is None else normalizer.reshape(-1)
    second = 0 if values is None else (values.numel() - 1) * values.stride(0)
    md, rec = call.floats(), call.floats()
    call.launch(
        rows.ebr_finish_kernel, 1, partials, programs, squared, squared.numel() if batch else 0, values, second, md, rec, counts,
        BLOCK=256,
    )  # fmt: skip
    odd = sizes.latent % 16 != 0
    latents = g[:, :, : sizes.latent].contiguous() if odd else g
    kept = [counts, *rstd, *([g] if odd else []), *([u] if source is not None else []), h1, h3, *acts[:-1]]
    return recovered, latents, md, rec, [*kept, *train] if train else []


def saved_like(features: Sequence[Tensor], params: Sequence[Tensor], source: Any, normalize: bool) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes that ``forward`` keeps, in its order."""
    sizes, like = Sizes.of(features, params), features[0]
    m, batch, top = sizes.m, like.shape[0], round16(sizes.psi[-2])
    widths = [sizes.latent] * (bool(sizes.latent % 16) + (source is not None))
    widths += [sizes.hidden, sizes.hidden, *sizes.psi[1:-2], top]
    programs = m * cdiv(batch, LOSS_TILES[product_kind(like.dtype)].blocks["BM"])
    return [
        *(like.new_empty(shape, dtype=torch.float32) for shape in [(2,), *[(m, batch)] * normalize]),
        *(like.new_empty(m, batch, round16(width)) for width in widths),
        like.new_empty(programs, m * top + m, dtype=torch.float32),
    ]


def backward(
    upstream: Upstream, features: Sequence[Tensor], present: Tensor | None, source: Tensor | None, reversal: Tensor,
    normalizer: Tensor | None, params: Sequence[Tensor], recovered: Sequence[Tensor], latents: Tensor | None,
    saved: Sequence[Tensor], residual: bool, normalize: bool, needs: Needs,
) -> tuple[Sequence[Tensor | None], Tensor | None, Sequence[Tensor | None]]:  # fmt: skip
    """Gradients of features, source and parameters; a kind of which none is wanted comes back as None. Deterministic.

    Seven launches, one more for each of: widths that 16 does not divide; a source or normalisation; a source that takes a
    gradient; a hidden layer of the discriminator beyond the third.
    """
    if latents is None or not saved:
        recovered, latents, _, _, saved = forward(
            features, present, source, normalizer, params, residual, normalize, keep=True
        )
    outside = (reversal, *upstream.recovered, *upstream[1:])
    inside = (*recovered, latents, *saved)
    call = Call(features, present, source, params, residual, normalize, ("backward", needs), outside, inside)
    sizes, m, batch = call.sizes, call.sizes.m, call.batch
    counts, *rest = saved
    rstd = rest.pop(0) if normalize else None
    g = rest.pop(0) if sizes.latent % 16 else latents
    u = rest.pop(0) if source is not None else g
    h1, h3, *acts, d_top, last = rest
    acts = [g, *acts]  # inputs of the discriminator's layers, but for the last
    d_md = upstream.discrimination if m > 1 else None
    d_latents = None if upstream.latents is None else upstream.latents.contiguous()
    losses = (reversal, d_md, counts)

    d_features = [torch.empty_like(r) for r in recovered] if needs.features else [None] * m
    d_params: list[Any] = [None] * len(params)
    if needs.params:
        d_params = [torch.empty_like(p) if p.is_contiguous() else call.empty(*p.shape) for p in call.params]
    d_source = None
    if source is not None and needs.source:
        d_source = torch.empty(batch, m, m, dtype=source.dtype, device=call.device)
    if not batch:
        return d_features, d_source, [None if d is None else d.zero_() for d in d_params]
    d_y = [call.empty(batch, round16(d)) for d in sizes.dims]
    above = [0 if d is None else d for d in upstream.recovered]
    strides = call.once(
        "strides", lambda: [0 if d is None else d.stride(n) for n in (0, 1) for d in upstream.recovered]
    )
    ours = d_params if needs.params else [0] * len(params)
    down = d_features if needs.features else [0] * m
    slab_size, psi_slab = call.once("slabs", lambda: _slabs(sizes))
    call.address(
        recovered, *call.plan.heads(ours), *down, *d_y, *above, *strides, *ours[8 * m :], slab_size, psi_slab
    )  # fmt: skip

    blocks = {"BR": 32, "BC": 64}
    columns = call.once("columns", lambda: max(cdiv(round16(d), blocks["BC"]) for d in sizes.dims))
    call.launch(
        rows.ebr_output_grad_kernel, (cdiv(batch, blocks["BR"]) * columns, m), call.table, g, upstream.reconstruction,
        counts, call.present, call.source, batch, M=m, LAYERS=call.layers, RESIDUAL=residual, HAND_DOWN=needs.features,
        EVEN=sizes.even, maxnreg=128, **blocks,
    )  # fmt: skip

    n_shares = shares(batch, _SHARE, _MOST_SHARES)
    psi_shares = shares(batch * m, _PSI_SHARE, 2 * _MOST_SHARES)
    folded = needs.params and (n_shares > 1 or not sizes.even)
    slabs = call.floats(4 * m * n_shares, slab_size) if folded else counts
    psi_slabs = call.floats(len(acts) * psi_shares, psi_slab) if needs.params and psi_slab else counts
    direct = source is None and not normalize

    def layer(number: int, d: Tensor, s: Tensor, c: Tensor | None, psi: int = -1, psi_d=d_top, psi_c=None) -> None:
        """Gradients of a layer of the heads, with layer ``psi`` of the discriminator; number −1: that alone."""
        rides = 0 <= psi < len(sizes.psi) - 2 and d_md is not None
        programs, region, options = call.once(
            (number, psi), lambda: constants(number, psi, rides, c is not None, psi_c is not None)
        )
        whole = direct and number == 2
        call.launch(
            products.ebr_bwd_kernel, programs, call.table, (d, s, d if c is None else c), (psi_d, acts[psi] if rides else g, psi_c),
            (slabs, psi_slabs), d_latents if whole else None, losses if whole else None, call.present, call.source, batch, psi,
            n_shares, psi_shares, region, **options,
        )  # fmt: skip

    def constants(number: int, psi: int, rides: bool, below: Any, psi_below: bool) -> tuple[int, int, dict[str, Any]]:
        """How many programs a layer takes, those of weight gradients among them, and what its kernel is compiled for."""
        widths = [] if number < 0 else _widths(sizes, number)
        ins = [inputs for inputs, _ in widths]
        own = sizes.psi[psi], sizes.psi[psi + 1]
        tile = product_tile(call.kind, max(ins or own[:1]), round16(min(outputs for _, outputs in widths or [own])))
        bm, bn = tile.blocks["BM"], tile.blocks["BN"]

        def weight_programs(inputs: int, outputs: int) -> int:
            return cdiv(round16(outputs), bm) * cdiv(round16(inputs), bn) + cdiv(round16(outputs), bn)

        region = 0
        if needs.params:
            region = n_shares * max((weight_programs(*pair) for pair in widths), default=0)
            region = max(region, cdiv(psi_shares * weight_programs(*own), m) if rides else 0)
        below = max([*(ins if below else []), *(own[:1] if rides and psi_below else [])], default=0)
        programs = region + cdiv(batch, bm) * cdiv(round16(below), bn)
        return programs * m * (2 if rides and ins else 1), region, _constants(call, number, rides, tile)

    d_h3, d_u = torch.empty_like(h3), torch.empty_like(u)
    layers = list(range(len(acts) - 1, 0, -1))  # hidden layers of the discriminator above its first, top first
    psi_d = d_top
    belows = {psi: torch.empty_like(acts[psi]) for psi in layers} if d_md is not None else {}
    first = layers[0] if layers else -1
    layer(3, d_h3, h3, d_h3, first, psi_d, belows.get(first))
    for psi in layers[1:]:
        psi_d = belows.get(psi + 1, d_top)
        layer(-1, d_h3, h3, None, psi, psi_d, belows.get(psi))
    psi_d = belows.get(1, d_top)
    back = None if direct or d_md is None else torch.empty_like(g) if len(sizes.psi) > 2 else d_top
    layer(2, d_h3, u, d_u, 0, psi_d, back if len(sizes.psi) > 2 else None)
    if d_source is not None:
        call.launch(
            rows.ebr_source_grad_kernel, (cdiv(batch, 32), m), g, d_u, d_source, call.present, call.source, batch,
            sizes.latent, M=m, BR=32, BK=64, maxnreg=128,
        )  # fmt: skip
    if not (needs.features or needs.params):
        return d_features, d_source, d_params
    d_g = d_u
    if not direct:
        d_g = torch.empty_like(g)
        parts = (d_u, back, d_latents, g, rstd, losses, d_g)
        _by_rows(call, rows.ebr_latent_grad_kernel, *parts, call.present, call.source)
    d_h1 = d_h3  # the decoders' gradient is used up
    layer(1, d_g, h1, d_h1)
    layer(0, d_h1, h1, h1 if needs.features else None)
    if needs.params:
        skipped = 0 if folded else 4 * m
        some = call.params if folded else call.params[8 * m :]
        most = call.once("most", lambda: max(p.numel() + p.shape[0] for p in some))
        call.launch(
            rows.ebr_fold_kernel, (cdiv(most, _FOLD), 4 * m + call.layers - skipped), call.table, g, slabs, n_shares,
            psi_slabs, psi_shares, last, last.shape[0], d_md, counts, skipped, M=m, LAYERS=call.layers, BLOCK=_FOLD,
        )  # fmt: skip
    return d_features, d_source, d_params


def _slabs(sizes: Sizes) -> tuple[int, int]:
    """Elements of one share of a layer's gradient, at most: of the heads, and of the discriminator."""
    heads = round16(max(sizes.latent, *sizes.dims)) * round16(sizes.hidden)
    psi = [round16(w) for w in sizes.psi[:-1]]
    widest = max(sizes.hidden, *sizes.dims, sizes.latent)
    return heads + round16(widest), max([a * b + b for a, b in itertools.pairwise(psi)], default=0)


def _widths(sizes: Sizes, layer: int) -> list[tuple[int, int]]:
    """Inputs and outputs of a layer of each head."""
    k, h = sizes.latent, sizes.hidden
    return [((d, h), (h, k), (k, h), (h, d))[layer] for d in sizes.dims]


def _constants(call: Call, number: int, rides: bool, tile: Tile) -> dict[str, Any]:
    return {
        "M": call.sizes.m, "LAYERS": call.layers, "LAYER": number, "PSI": rides, "RESIDUAL": call.residual,
        "EVEN": call.sizes.even, "PREC": call.precision, **tile.options,
    }  # fmt: skip


def _by_rows(call: Call, kernel: Any, *args: Any) -> None:
    """Launch a kernel whose programs take whole rows of latents."""
    width = 1 << (round16(call.sizes.latent) - 1).bit_length()
    tile = {"KP": width, "BR": max(1, _ROW_ELEMENTS // width)}
    m, batch = call.sizes.m, call.batch
    call.launch(kernel, (cdiv(batch, tile["BR"]), m), *args, batch, call.sizes.latent, M=m, **tile)
