"""The EBR step in Triton at any width: which groups run together, in which order; tensors in, tensors out.

Forward: encoders' first layer; second layer; normalisation if asked; decoders' first layer with the discriminator's;
decoders' second with the discriminator's next; what is left of its hidden layers; its end with both losses.
Backward: the stages "decoded", "mixed", "hidden", "feature" of backward.py, the discriminator's layers riding along; with a
source one launch more gathers over targets and one forms the gradient of float weights; one more with normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from .. import common
from ..common import Tile, input_precision, padded, product_kind, usable
from .backward import ebr_bwd_kernel, ebr_norm_bwd_kernel, ebr_source_kernel
from .forward import ebr_fwd_kernel, ebr_loss_kernel, ebr_norm_fwd_kernel
from .plan import TILES, Inputs, Needs, Sizes, Upstream, unsupported

__all__ = ["Needs", "Upstream", "backward", "forward", "saved_like", "unsupported", "usable"]

_LAST_BLOCK = 256  # elements of the last layer's gradient to a program
_NORM_ELEMENTS = 4096  # of a row tile of the normalisation
_SOURCE_TILE = Tile({"BM": 32, "BK": 64}, 4, 2)


def forward(
    features: Sequence[Tensor],
    present: Tensor | None,
    source: Tensor | None,
    normalizer: Tensor | None,
    params: Sequence[Tensor],
    residual: bool,
    normalize: bool,
    keep: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, list[Tensor]]:
    """Return (recovered, latents, both losses, what backward needs); the last is empty unless ``keep``.

    Five launches and a memset; one launch more with normalisation, one for each hidden layer of the discriminator beyond
    the third.
    """
    inputs = Inputs.of(features, params, present, source, normalizer, residual, normalize)
    sizes, batch, m, device = inputs.sizes, inputs.batch, inputs.sizes.m, features[0].device
    dtype = features[0].dtype

    def activations(width: int) -> Tensor:
        return torch.empty(m, batch, width, dtype=dtype, device=device)

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    latents, h1, h3 = activations(sizes.latent), activations(sizes.hidden), activations(sizes.hidden)
    recovered = [torch.empty(batch, d, dtype=dtype, device=device) for d in sizes.dims]
    column = [inputs.column(kind) for kind in range(8)]
    blocks = _tile(dtype, "product").blocks
    n_squared = sum(_tiles(batch, d, blocks) for d in sizes.dims) * blocks["BM"]
    squared = floats(max(1, n_squared))

    def layers(first: int, groups: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], **flags: bool) -> None:
        """One launch of ``c = a Wᵀ + b`` over groups ``(a, W, b, c)``, heads first; ``first``: the number of the first."""
        if not (batch and groups):
            return
        programs = [_tiles(a.shape[0], w.shape[0], blocks) for a, w, _, _ in groups]
        a, w, b, c = zip(*groups, strict=True)
        usual = {"MIX": False, "DECODE": False, "LAST": False, "RELU": True}
        common.launch(
            ebr_fwd_kernel, (sum(programs),), device,
            (a, w, b, c), (tuple(t.stride(0) for t in a), tuple(t.stride(1) for t in a)), _widths(w), _ends(programs),
            inputs.strided_features, inputs.mask, inputs.routing, latents, squared, batch, sizes.latent,
            M=m, GROUPS=len(groups), FIRST=first, RESIDUAL=inputs.residual, **{**usual, **flags}, **_options(dtype),
        )  # fmt: skip

    layers(0, list(zip(inputs.features, column[0], column[1], h1, strict=True)))
    layers(0, list(zip(h1, column[2], column[3], latents, strict=True)), RELU=False)
    saved = [floats(2)]
    if normalize:
        saved.append(floats(m, batch))
        _normalise(ebr_norm_fwd_kernel, inputs, latents, saved[-1], inputs.mask)

    below, between, riding = latents, [activations(p) for p in sizes.psi[1:-2]], []
    for n, out in enumerate(between):
        riding.append((_stacked(below), inputs.psi[2 * n], inputs.psi[2 * n + 1], _stacked(out)))
        below = out
    decode = list(zip(latents, column[4], column[5], h3, strict=True))
    layers(0, decode + riding[:1], MIX=source is not None, DECODE=True)
    decode = list(zip(h3, column[6], column[7], recovered, strict=True))
    layers(0, decode + riding[1:2], DECODE=True, LAST=True)
    for group in riding[2:]:
        layers(m, [group])

    tile, tiles, top = _tile(dtype, "loss"), _loss_tiles(dtype, batch), sizes.psi[-2]
    md, rec, counter = floats(), floats(), torch.zeros(1, dtype=torch.int32, device=device)
    train = (activations(top), floats(m * tiles, m * top + m)) if keep else None
    common.launch(
        ebr_loss_kernel, (m * tiles,), device,
        below, (*inputs.psi[-4:-2], sizes.psi[-3]) if len(sizes.psi) > 2 else None, inputs.psi[-2:], inputs.mask,
        inputs.routing, inputs.denominators, squared, train, floats(m * tiles, 4), counter, (md, rec, saved[0]),
        batch, top, tiles, n_squared, M=m, MP=padded(m), PREC=input_precision(dtype), **tile.options,
    )  # fmt: skip
    return recovered, latents, md, rec, [*saved, h1, h3, *between, *train] if train else []


def saved_like(features: Sequence[Tensor], params: Sequence[Tensor], normalize: bool) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes that ``forward`` keeps, in its order."""
    sizes, like = Sizes.of(features, params), features[0]
    m, batch, top = sizes.m, like.shape[0], sizes.psi[-2]
    widths = [sizes.hidden, sizes.hidden, *sizes.psi[1:-2], top]
    last = (m * _loss_tiles(like.dtype, batch), m * top + m)
    return [
        *(like.new_empty(shape, dtype=torch.float32) for shape in [(2,), *[(m, batch)] * normalize]),
        *(like.new_empty(m, batch, width) for width in widths),
        like.new_empty(last, dtype=torch.float32),
    ]


def backward(
    upstream: Upstream,
    features: Sequence[Tensor],
    present: Tensor | None,
    source: Tensor | None,
    reversal: Tensor,
    normalizer: Tensor | None,
    params: Sequence[Tensor],
    recovered: Sequence[Tensor],
    latents: Tensor | None,
    saved: Sequence[Tensor],
    residual: bool,
    normalize: bool,
    needs: Needs,
) -> tuple[Sequence[Tensor | None], Tensor | None, Sequence[Tensor | None]]:
    """Gradients of features, source and parameters; a kind of which none is wanted comes back as None. Deterministic.

    Four launches, up to three more for a source and for normalisation.
    """
    if latents is None or not saved:
        recovered, latents, _, _, saved = forward(
            features, present, source, normalizer, params, residual, normalize, keep=True
        )
    inputs = Inputs.of(features, params, present, source, normalizer, residual, normalize)
    sizes, m = inputs.sizes, inputs.sizes.m
    run = _Backward(inputs, upstream, reversal, recovered, latents, saved, needs)
    d_features = [torch.empty_like(r) for r in recovered] if needs.features else [None] * m
    d_h, d_z = torch.empty_like(run.h3), torch.empty_like(latents)

    layers = list(range(len(sizes.psi) - 3, 0, -1))  # hidden layers of the discriminator above its first, top first
    groups = run.heads(6, None, run.h3, d_h)
    below = torch.empty_like(run.between[layers[0] - 1]) if layers else None
    run.launch("decoded", groups + ([run.psi_layer(layers[0], below)] if layers else []), last=True)
    for layer in layers[1:]:
        run.psi_d, below = below, torch.empty_like(run.between[layer - 1])
        run.launch("decoded", [run.psi_layer(layer, below)], first=m)
    if layers:
        run.psi_d = below

    d_u = d_z if source is None else torch.empty_like(latents)
    groups = run.heads(4, d_h, latents, d_u)
    run.launch("mixed", groups + ([run.psi_layer(0, None)] if len(sizes.psi) > 2 else []))
    d_source = _source_grad(inputs, latents, d_u) if source is not None and needs.source else None
    if not (needs.features or needs.params):
        return d_features, d_source, [None] * len(params)
    if source is not None:
        run.d_mixed = d_u
        run.launch("latent", run.heads(4, d_h, latents, d_z), weights=False)
    if normalize:
        _normalise(ebr_norm_bwd_kernel, inputs, latents, d_z, run.rstd)
    run.launch("hidden", run.heads(2, d_z, run.h1, d_h))  # the decoders' gradient is used up: its buffer serves again
    run.launch("feature", run.heads(0, d_h, inputs.features, d_features))
    return d_features, d_source, run.d_params if needs.params else [None] * len(params)


class _Backward:
    """What the launches of one backward share."""

    def __init__(
        self, inputs: Inputs, upstream: Upstream, reversal: Tensor, recovered, latents: Tensor, saved, needs: Needs
    ) -> None:
        self.inputs, self.upstream, self.latents, self.reversal = inputs, upstream, latents, reversal
        self.weights = needs.params
        self.counts, *rest = saved
        self.rstd = rest.pop(0) if inputs.normalize else None
        self.h1, self.h3, *self.between, self.d_top, self.last_sums = rest
        self.given, self.recovered = upstream.given(inputs), tuple(recovered)
        # stand-ins where none is wanted: nothing writes to them
        self.d_params = [torch.empty_like(p) for p in inputs.params] if needs.params else list(inputs.params)
        self.d_mixed, self.psi_d = latents, self.d_top

    def heads(self, kind: int, d: Any, s: Any, c: Any) -> list[tuple]:
        """Groups of all heads' layer ``inputs.column(kind)``; d None: a stand-in, the kernel forms that gradient."""
        m = self.inputs.sizes.m
        at = [(kind // 4) * 4 * m + 4 * i + kind % 4 for i in range(m)]
        return [
            (s[i] if d is None else d[i], self.inputs.params[n], s[i], c[i], self.d_params[n], self.d_params[n + 1])
            for i, n in enumerate(at)
        ]

    def psi_layer(self, layer: int, c: Tensor | None) -> tuple:
        """Group of a layer of the discriminator below its last."""
        s, n = self.latents if layer == 0 else self.between[layer - 1], 8 * self.inputs.sizes.m + 2 * layer
        out = None if c is None else _stacked(c)
        return _stacked(self.psi_d), self.inputs.params[n], _stacked(s), out, self.d_params[n], self.d_params[n + 1]

    def launch(self, stage: str, groups: list, first: int = 0, last: bool = False, weights: bool = True) -> None:
        """One launch over groups ``(D, W, S, C or None, dW, db)``; C None: weight gradient only."""
        inputs, latents = self.inputs, self.latents
        sizes, batch, m = inputs.sizes, inputs.batch, inputs.sizes.m
        blocks = _tile(latents.dtype, "product").blocks
        weights, last = weights and self.weights, last and self.weights
        weight_programs, data_programs = [], []
        for n, (_, w, _, c, _, _) in enumerate(groups):
            weight_programs.append(_tiles(*w.shape, blocks) if weights else 0)
            rows = batch if first + n < m else batch * m
            data_programs.append(0 if c is None else _tiles(rows, w.shape[1], blocks))
        top = sizes.psi[-2]
        last_programs = triton.cdiv(m * top + m, _LAST_BLOCK) if last else 0
        programs = sum(weight_programs) + sum(data_programs) + last_programs
        if not programs:
            return
        d, w, s, c, d_w, d_b = zip(*groups, strict=True)
        c = tuple(latents if t is None else t for t in c)
        psi = (self.psi_d, None, 1) if len(sizes.psi) == 2 else (self.psi_d, inputs.psi[0], sizes.psi[1])
        sums = (self.last_sums, *self.d_params[-2:], self.last_sums.shape[0], top) if last else None
        common.launch(
            ebr_bwd_kernel, (programs,), latents.device,
            (d, w, s, c, d_w, d_b), _widths(w, backwards=True), _ends(weight_programs), _ends(data_programs),
            inputs.strided_features, self.recovered, self.given, inputs.mask, inputs.routing, latents,
            self.upstream.strided_latents, self.d_mixed, self.upstream.losses(inputs, self.counts), psi, sums,
            self.reversal, batch, sizes.latent, M=m, GROUPS=len(groups), FIRST=first, STAGE=stage,
            RESIDUAL=inputs.residual, **_options(latents.dtype),
        )  # fmt: skip


def _source_grad(inputs: Inputs, latents: Tensor, d_u: Tensor) -> Tensor:
    batch, m = inputs.batch, inputs.sizes.m
    d_source = torch.empty(batch, m, m, dtype=inputs.source.dtype, device=latents.device)
    tiles = triton.cdiv(batch, _SOURCE_TILE.blocks["BM"])
    if tiles:
        common.launch(
            ebr_source_kernel, (m * tiles,), latents.device, latents, d_u, d_source, inputs.mask, inputs.routing,
            batch, inputs.sizes.latent, tiles, M=m, **_SOURCE_TILE.options,
        )  # fmt: skip
    return d_source


def _normalise(kernel: Any, inputs: Inputs, latents: Tensor, *args: Any) -> None:
    width, rows = padded(inputs.sizes.latent), inputs.batch * inputs.sizes.m
    block = max(1, _NORM_ELEMENTS // width)
    if rows:
        common.launch(
            kernel, (triton.cdiv(rows, block),), latents.device, latents, *args, inputs.batch, inputs.sizes.latent,
            M=inputs.sizes.m, KP=width, BR=block, num_warps=4,
        )  # fmt: skip


def _tile(dtype: torch.dtype, name: str) -> Tile:
    return TILES[product_kind(dtype)][name]


def _options(dtype: torch.dtype) -> dict[str, Any]:
    return {"PREC": input_precision(dtype), **_tile(dtype, "product").options}


def _tiles(rows: int, columns: int, blocks: dict[str, int]) -> int:
    return triton.cdiv(rows, blocks["BM"]) * triton.cdiv(columns, blocks["BN"])


def _loss_tiles(dtype: torch.dtype, batch: int) -> int:
    return max(1, triton.cdiv(batch, _tile(dtype, "loss").blocks["BM"]))


def _ends(counts: Sequence[int]) -> tuple[int, ...]:
    return tuple(sum(counts[: n + 1]) for n in range(len(counts)))


def _widths(weights: Sequence[Tensor], backwards: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Columns and rows of the weights: what a layer takes and gives, or backwards."""
    inputs, outputs = tuple(w.shape[1] for w in weights), tuple(w.shape[0] for w in weights)
    return (outputs, inputs) if backwards else (inputs, outputs)


def _stacked(t: Tensor) -> Tensor:
    return t.flatten(0, 1)
