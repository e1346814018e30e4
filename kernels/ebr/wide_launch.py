"""Launchers of the wide EBR kernels: which groups run together, in which order; tensors in, tensors out.

Forward: encoders' first layer; second layer; normalisation if asked; decoders' first layer with the discriminator's;
decoders' second with the discriminator's next; what is left of its hidden layers; its end with both losses.
Backward: "decoded", "mixed", "hidden", "feature" of ebr_wide.py, the discriminator's layers riding along; with a source
one launch more gathers over slots and one forms the gradient of float weights; one more with normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..common import WideTile, ebr_wide_tile
from . import counter as ebr_counter
from .plan import Inputs, Needs, Sizes, Upstream, float_precision, padded
from .wide import (
    ebr_wide_bwd_kernel,
    ebr_wide_fwd_kernel,
    ebr_wide_loss_kernel,
    ebr_wide_norm_bwd_kernel,
    ebr_wide_norm_fwd_kernel,
    ebr_wide_source_kernel,
)

__all__ = ["backward", "forward", "saved_shapes"]

_LAST_BLOCK = 256  # elements of the last layer's gradient to a program
_NORM_ELEMENTS = 4096  # of a row tile of the normalisation


def _tile(like: Tensor) -> WideTile:
    return ebr_wide_tile(like.dtype, float_precision(like.dtype))


def _ends(counts: Sequence[int]) -> tuple[int, ...]:
    return tuple(sum(counts[: n + 1]) for n in range(len(counts)))


def _options(like: Tensor, tile: WideTile) -> dict[str, object]:
    return {
        "BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "PREC": float_precision(like.dtype),
        "num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers, "enable_fp_fusion": True,
    }  # fmt: skip


def _loss_tiles(like: Tensor, batch: int) -> int:
    return max(1, triton.cdiv(batch, _tile(like).loss_rows))


def saved_shapes(sizes: Sizes, like: Tensor, normalize: bool) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of what forward keeps, in its order."""
    m, batch, dtype, single = sizes.m, like.shape[0], like.dtype, torch.float32
    hidden = [((m, batch, sizes.hidden), dtype)] * 2
    between = [((m, batch, p), dtype) for p in sizes.psi[1:-2]]
    top = sizes.psi[-2]
    last = (m * _loss_tiles(like, batch), m * top + m)
    deviation = [((m, batch), single)] * normalize
    return [((2,), single), *deviation, *hidden, *between, ((m, batch, top), dtype), (last, single)]


def _layers_forward(
    inputs: Inputs, latents: Tensor, squared: Tensor, first: int,
    groups: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], **flags: Any,
) -> None:  # fmt: skip
    """One launch of ``c = a Wᵀ + b`` over groups ``(a, W, b, c)``, heads first; ``first`` is the number of the first."""
    tile, m, batch = _tile(latents), inputs.sizes.m, inputs.batch
    programs = []
    for n, (_, w, _, _) in enumerate(groups):
        rows = batch if first + n < m else batch * m
        programs.append(triton.cdiv(rows, tile.rows) * triton.cdiv(w.shape[0], tile.columns))
    a, w, b, c = zip(*groups, strict=True)
    stride_xb, stride_xd = inputs.strides_x
    ebr_wide_fwd_kernel[(sum(programs),)](
        a, w, b, c, inputs.features, _ends(programs),
        widths_in=tuple(t.shape[1] for t in w), widths_out=tuple(t.shape[0] for t in w),
        stride_ab=tuple(t.stride(0) for t in a), stride_ac=tuple(t.stride(1) for t in a),
        stride_xb=stride_xb, stride_xd=stride_xd, latents=latents, squared=squared, B=batch, K=inputs.sizes.latent,
        M=m, GROUPS=len(groups), FIRST=first, RESIDUAL=inputs.residual,
        **inputs.mask_arguments, **flags, **_options(latents, tile),
    )  # fmt: skip


def forward(inputs: Inputs, train: bool) -> tuple[list[Tensor], Tensor, Tensor, Tensor, list[Tensor]]:
    """At most seven launches; returns (recovered, latents, discrimination loss, reconstruction loss, saved)."""
    like, sizes, batch, m = inputs.features[0], inputs.sizes, inputs.batch, inputs.sizes.m
    tile, device = _tile(like), like.device

    def activations(width: int) -> Tensor:
        return torch.empty(m, batch, width, dtype=like.dtype, device=device)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    latents, h1, h3 = activations(sizes.latent), activations(sizes.hidden), activations(sizes.hidden)
    recovered = [torch.empty(batch, d, dtype=like.dtype, device=device) for d in sizes.dims]
    decode_tiles = sum(triton.cdiv(batch, tile.rows) * triton.cdiv(d, tile.columns) for d in sizes.dims)
    n_squared = decode_tiles * tile.rows
    squared = floats(max(1, n_squared))
    heads = range(m)
    column = [inputs.column(kind) for kind in range(8)]
    plain = {"MIX": False, "DECODE": False, "LAST": False, "RELU": True}

    def layers(first: int, groups: list, **flags: bool) -> None:
        if batch and groups:
            _layers_forward(inputs, latents, squared, first, groups, **{**plain, **flags})

    layers(0, [(inputs.features[i], column[0][i], column[1][i], h1[i]) for i in heads])
    layers(0, [(h1[i], column[2][i], column[3][i], latents[i]) for i in heads], RELU=False)
    saved = [floats(2)]
    if inputs.normalize:
        saved.append(floats(m, batch))
        _normalise(inputs, latents, saved[-1])

    below = latents
    between = [activations(p) for p in sizes.psi[1:-2]]
    psi_groups = []
    for n, out in enumerate(between):
        rows = (below.view(m * batch, -1), inputs.psi[2 * n], inputs.psi[2 * n + 1], out.view(m * batch, -1))
        psi_groups.append(rows)
        below = out
    decode = [(latents[i], column[4][i], column[5][i], h3[i]) for i in heads]
    layers(0, decode + psi_groups[:1], MIX=inputs.source is not None, DECODE=True)
    decode = [(h3[i], column[6][i], column[7][i], recovered[i]) for i in heads]
    layers(0, decode + psi_groups[1:2], DECODE=True, LAST=True)
    for group in psi_groups[2:]:
        layers(m, [group])

    tiles, top = _loss_tiles(like, batch), sizes.psi[-2]
    md, rec, partials = floats(), floats(), floats(m * tiles, 4)
    d_top, last_sums = (activations(top), floats(m * tiles, m * top + m)) if train else (like, partials)
    hidden = len(sizes.psi) > 2
    ebr_wide_loss_kernel[(m * tiles,)](
        below, *(inputs.psi[-4:-2] if hidden else inputs.psi[-2:]), *inputs.psi[-2:],
        squared=squared, d_top=d_top, last_sums=last_sums, partials=partials, counter=ebr_counter.take(device),
        md_out=md, rec_out=rec, counts=saved[0], B=batch, IN=sizes.psi[-3] if hidden else top, P=top, tiles=tiles,
        n_squared=n_squared, M=m, MP=padded(m), BM=tile.loss_rows, BP=tile.loss_units, BK=tile.loss_depth, HIDDEN=hidden,
        TRAIN=train, PREC=float_precision(like.dtype), num_warps=tile.loss_warps, num_stages=tile.stages,
        maxnreg=tile.registers, enable_fp_fusion=True, **inputs.mask_arguments, **inputs.normalizer_arguments,
    )  # fmt: skip
    return recovered, latents, md, rec, [*saved, h1, h3, *between, d_top, last_sums] if train else []


def _normalise(inputs: Inputs, latents: Tensor, rstd: Tensor) -> None:
    k, rows = padded(inputs.sizes.latent), inputs.batch * inputs.sizes.m
    block = max(1, _NORM_ELEMENTS // k)
    arguments = {
        n: v for n, v in inputs.mask_arguments.items() if n in ("present", "stride_pb", "stride_pm", "HAS_PRESENT")
    }
    if rows:
        ebr_wide_norm_fwd_kernel[(triton.cdiv(rows, block),)](
            latents, rstd, B=inputs.batch, K=inputs.sizes.latent, M=inputs.sizes.m, KP=k, BR=block, num_warps=4,
            enable_fp_fusion=True, **arguments,
        )  # fmt: skip


class _Backward:
    """What the launches of one backward share."""

    def __init__(
        self, inputs: Inputs, upstream: Upstream, reversal: Tensor, recovered, latents: Tensor, saved, needs: Needs
    ) -> None:
        self.inputs, self.upstream, self.latents, self.reversal = inputs, upstream, latents, reversal
        self.weights = needs.params
        rest = list(saved)
        self.counts = rest.pop(0)
        self.rstd = rest.pop(0) if inputs.normalize else None
        self.h1, self.h3, *self.between, self.d_top, self.last_sums = rest
        self.given = upstream.given(inputs)
        self.recovered = tuple(recovered)
        # stand-ins where none is wanted: nothing writes to them
        self.d_params = [torch.empty_like(p) for p in inputs.params] if needs.params else list(inputs.params)
        self.d_mixed: Tensor | None = None
        self.psi_d = self.d_top

    def grad_of(self, kind: int, i: int) -> Tensor:
        """Gradient of ``inputs.column(kind)[i]``."""
        m = self.inputs.sizes.m
        return self.d_params[(kind // 4) * 4 * m + 4 * i + kind % 4]

    def launch(self, stage: str, groups: list, first: int = 0, last: bool = False, weights: bool = True) -> None:
        """One launch over groups ``(D, W, S, C or None, dW, db)``; C None: weight gradient only."""
        inputs, latents = self.inputs, self.latents
        weights, last = weights and self.weights, last and self.weights
        sizes, tile, batch, m = inputs.sizes, _tile(latents), inputs.batch, inputs.sizes.m
        weight_programs, data_programs = [], []
        for n, (_, w, _, c, _, _) in enumerate(groups):
            rows = batch if first + n < m else batch * m
            tiles = triton.cdiv(w.shape[0], tile.rows) * triton.cdiv(w.shape[1], tile.columns)
            weight_programs.append(tiles if weights else 0)
            row_tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(w.shape[1], tile.columns)
            data_programs.append(0 if c is None else row_tiles)
        top = sizes.psi[-2]
        last_programs = triton.cdiv(m * top + m, _LAST_BLOCK) if last else 0
        d, w, s, c, d_w, d_b = zip(*groups, strict=True)
        stride_xb, stride_xd = inputs.strides_x
        programs = sum(weight_programs) + sum(data_programs) + last_programs
        if not programs:
            return
        ebr_wide_bwd_kernel[(programs,)](
            d, w, s, tuple(latents if t is None else t for t in c), d_w, d_b, inputs.features, self.recovered,
            self.given, weight_ends=_ends(weight_programs), data_ends=_ends(data_programs),
            widths_d=tuple(t.shape[0] for t in w), widths_s=tuple(t.shape[1] for t in w),
            stride_xb=stride_xb, stride_xd=stride_xd,
            latents=latents, d_mixed=latents if self.d_mixed is None else self.d_mixed, psi_d=self.psi_d,
            psi_w=inputs.psi[0], counts=self.counts, reversal=self.reversal, last_sums=self.last_sums, d_last_w=self.d_params[-2], d_last_b=self.d_params[-1],
            B=batch, K=sizes.latent, psi_width=sizes.psi[1], last_shares=self.last_sums.shape[0], last_width=top,
            M=m, GROUPS=len(groups), FIRST=first, STAGE=stage, RESIDUAL=inputs.residual, HAS_LAST=last,
            PSI_DIRECT=len(sizes.psi) == 2, **self.upstream.arguments(inputs, latents, self.counts),
            **inputs.mask_arguments, **_options(latents, tile),
        )  # fmt: skip


def backward(
    inputs: Inputs,
    upstream: Upstream,
    reversal: Tensor,
    recovered: Sequence[Tensor],
    latents: Tensor,
    saved: Sequence[Tensor],
    needs: Needs,
) -> tuple[Sequence[Tensor | None], Tensor | None, Sequence[Tensor | None]]:
    """Gradients of features, source, parameters, None where none of them is wanted; deterministic.

    Four launches, up to three more for a source and for normalisation.
    """
    sizes, batch, m = inputs.sizes, inputs.batch, inputs.sizes.m
    run = _Backward(inputs, upstream, reversal, recovered, latents, saved, needs)
    heads = range(m)
    column = [inputs.column(kind) for kind in range(8)]
    d_features = [torch.empty_like(r) for r in recovered] if needs.features else [None] * m
    d_h = torch.empty_like(run.h3)
    d_z = torch.empty_like(latents)

    def flat(t: Tensor) -> Tensor:
        return t.view(m * batch, t.shape[-1])

    def psi_group(layer: int, c: Tensor | None) -> tuple:
        s = latents if layer == 0 else run.between[layer - 1]
        base = 8 * m + 2 * layer
        out = None if c is None else flat(c)
        return flat(run.psi_d), inputs.psi[2 * layer], flat(s), out, run.d_params[base], run.d_params[base + 1]

    def below(layer: int) -> Tensor:
        return torch.empty_like(run.between[layer - 1])

    def head_groups(kind: int, d: Sequence[Tensor], s: Sequence[Tensor], c: Sequence[Tensor | None]) -> list:
        return [
            (d[i], column[kind][i], s[i], c[i], run.grad_of(kind, i), run.grad_of(kind + 1, i)) for i in heads
        ]  # fmt: skip

    layers = list(range(len(sizes.psi) - 3, 0, -1))  # hidden layers of the discriminator above its first, top first
    groups = head_groups(6, run.given, run.h3, d_h)
    riding = below(layers[0]) if layers else None
    if riding is not None:
        groups.append(psi_group(layers[0], riding))
    run.launch("decoded", groups, last=True)
    if riding is not None:
        run.psi_d = riding
    for layer in layers[1:]:
        out = below(layer)
        run.launch("decoded", [psi_group(layer, out)], first=m)
        run.psi_d = out

    own = inputs.source is None
    d_u = d_z if own else torch.empty_like(latents)
    groups = head_groups(4, d_h, latents, d_u)
    run.launch("mixed", groups + ([psi_group(0, None)] if len(sizes.psi) > 2 else []))
    d_source = None
    if inputs.source is not None and needs.source:
        d_source = _source_grad(inputs, inputs.source, latents, d_u)
    no_params = [None] * len(inputs.params)
    if not (needs.features or needs.params):
        return d_features, d_source, no_params
    if not own:
        run.d_mixed = d_u
        run.launch("latent", head_groups(4, d_h, latents, d_z), weights=False)
    if run.rstd is not None and batch:
        k = padded(sizes.latent)
        block = max(1, _NORM_ELEMENTS // k)
        ebr_wide_norm_bwd_kernel[(triton.cdiv(batch * m, block),)](
            latents, d_z, run.rstd, batch, sizes.latent, M=m, KP=k, BR=block, num_warps=4, enable_fp_fusion=True
        )
    run.launch("hidden", head_groups(2, d_z, run.h1, d_h))  # the decoders' gradient is used up: its buffer serves again
    run.launch("feature", head_groups(0, d_h, inputs.features, d_features))
    return d_features, d_source, run.d_params if needs.params else no_params


def _source_grad(inputs: Inputs, source: Tensor, latents: Tensor, d_u: Tensor) -> Tensor:
    batch, m = inputs.batch, inputs.sizes.m
    d_source = torch.empty(batch, m, m, dtype=source.dtype, device=source.device)
    rows = 32
    tiles = triton.cdiv(batch, rows)
    if tiles:
        ebr_wide_source_kernel[(m * tiles,)](
            latents, d_u, d_source, B=batch, K=inputs.sizes.latent, tiles=tiles, M=m, BM=rows, BK=64, num_warps=4,
            enable_fp_fusion=True, **inputs.mask_arguments,
        )  # fmt: skip
    return d_source
