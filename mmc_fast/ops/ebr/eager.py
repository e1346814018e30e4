"""The EBR step in hand-arranged torch with its own backward: what runs where no kernel is.

Same results as ``reference.py``; no autograd graph, losses accumulated in float32, absent rows never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import record
from .reference import LAYER_NORM_EPS, Call, Params, check_source_range, denominators, split_params

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(features: Sequence[Tensor], params: Sequence[Tensor] | None = None) -> str | None:
    """Say why this form cannot run on these tensors, None where it can."""
    wrong = [t.dtype for t in features if t.is_floating_point() and t.dtype not in _DTYPES]
    return f"it sums in float32 and a tensor is {wrong[0]}" if wrong else None


class Saved(NamedTuple):
    """What backward needs besides inputs and outputs; the native kernel keeps the same tensors, rows compact.

    The last layer of the discriminator is linear in the loss's gradient, a scalar: its own gradient is formed in
    forward, for the summed loss, so that the widest-lived input of that layer need not be kept.
    """

    encoder_hidden: list[Tensor]  # m x [B, h], after ReLU
    decoder_hidden: list[Tensor]  # m x [B, h], after ReLU
    psi_hidden: list[Tensor]  # one [m * B, p] per hidden layer of the discriminator but the last, after ReLU
    psi_gate: Tensor | None  # uint8 [m * B, p]: where the last hidden layer is positive; None without hidden layers
    d_logits: Tensor  # float32 [m * B, m]: softmax minus one-hot
    d_last_weight: Tensor  # float32 [m, p]
    d_last_bias: Tensor  # float32 [m]
    rstd: Tensor | None  # float32 [m, B], only with normalize

    def flat(self) -> list[Tensor]:
        tail = [self.psi_gate, self.d_logits, self.d_last_weight, self.d_last_bias, self.rstd]
        kept = [*self.encoder_hidden, *self.decoder_hidden, *self.psi_hidden]
        return kept + [t for t in tail if t is not None]

    @staticmethod
    def unflatten(flat: Sequence[Tensor], m: int, psi_layers: int, normalize: bool) -> Saved:
        rest = list(flat)
        rstd = rest.pop() if normalize else None
        d_logits, d_last_weight, d_last_bias = rest[-3:]
        gate = rest[-4] if psi_layers > 1 else None
        psi_hidden = rest[2 * m : 2 * m + max(0, psi_layers - 2)]
        return Saved(rest[:m], rest[m : 2 * m], psi_hidden, gate, d_logits, d_last_weight, d_last_bias, rstd)


def _mask(x: Tensor, keep: Tensor | None) -> Tensor:
    """Rows of ``x`` where ``keep`` ``[B]`` is true, zero elsewhere; never multiplies, so NaN cannot leak."""
    return x if keep is None else torch.where(keep.unsqueeze(-1), x, x.new_zeros(()))


def _column(present: Tensor | None, i: int) -> Tensor | None:
    return None if present is None else present[:, i]


class _Mixer:
    """``u_i = sum_j w_ij g_j`` for each target modality i, its row mask, and the adjoint."""

    def __init__(self, latents: Tensor, present: Tensor | None, source: Tensor | None) -> None:
        self.latents, self.present, self.source = latents, present, source
        m, batch, _ = latents.shape
        self.weights: Tensor | None = None
        if source is None:
            self.valid = present
        elif source.is_floating_point():
            w = source.to(latents.dtype)
            if present is not None:
                w = torch.where(present.unsqueeze(1), w, w.new_zeros(()))
            self.weights = w  # [B, m, m]
            self.valid = (w != 0).any(-1)
            bad = ~latents.isfinite().all(-1).t()  # [B, m]
            self.poisoned = ((w != 0) & bad.unsqueeze(1)).any(-1)  # [B, m]
            self.clean = torch.where(bad.t().unsqueeze(-1), latents.new_zeros(()), latents)
        else:
            check_source_range(source, m)
            index = source.clamp(min=0)
            self.valid = source >= 0
            if present is not None:
                self.valid = self.valid & present.gather(1, index)
            rows = torch.arange(batch, device=source.device).unsqueeze(-1)
            self.flat_index = index * batch + rows  # [B, m], into latents.view(m * B, k)

    def rows(self) -> Tensor | None:
        """``[B, m]``: rows that are present and have a present source (None: all)."""
        if self.valid is None or self.present is None:
            return self.valid if self.present is None else self.present
        return self.present & self.valid

    def mixed(self) -> list[Tensor]:
        m, _, k = self.latents.shape
        if self.source is None:
            return [self.latents[i] for i in range(m)]
        if self.weights is not None:
            u = torch.einsum("bij,jbk->ibk", self.weights, self.clean)
            u = torch.where(self.poisoned.t().unsqueeze(-1), u.new_full((), float("nan")), u)
            return [u[i] for i in range(m)]
        flat = self.latents.reshape(-1, k)
        return [_mask(flat.index_select(0, self.flat_index[:, i]), _column(self.valid, i)) for i in range(m)]

    def adjoint(self, d_mixed: list[Tensor], d_latents: Tensor, need_source: bool) -> Tensor | None:
        """Add the gradient of the latents to ``d_latents`` in place; return the gradient of ``source``."""
        if self.source is None:
            d_latents += torch.stack(d_mixed)
        elif self.weights is not None:
            d = torch.stack(d_mixed)  # [m, B, k]
            d_latents += torch.einsum("bij,ibk->jbk", self.weights, d)
            if need_source:
                d_source = torch.einsum("ibk,jbk->bij", d, self.clean)
                if self.present is not None:
                    d_source = torch.where(self.present.unsqueeze(1), d_source, d_source.new_zeros(()))
                return d_source.to(self.source.dtype)
        else:
            flat = d_latents.view(-1, d_latents.shape[-1])
            for i, d in enumerate(d_mixed):  # one target at a time: within it every row has its own target
                flat.index_add_(0, self.flat_index[:, i], d)
        return None


def step(call: Call) -> tuple[list[Tensor], Tensor, Tensor, Tensor, list[Tensor]]:
    """(recovered, latents, both losses, what backward needs); the last is empty with ``recompute``."""
    record("ebr_step", "eager")
    recovered, latents, discrimination, reconstruction, saved = _forward(call)
    return recovered, latents, discrimination, reconstruction, [] if call.recompute else saved.flat()


def saved_like(call: Call) -> list[Tensor]:
    """Empty tensors of the shapes and dtypes of :class:`Saved`, flat."""
    like, m, params = call.features[0], len(call.features), split_params(call)
    batch = like.shape[0]
    saved = [like.new_empty(batch, head[0].shape[0]) for head in (*params.encoders, *params.decoders)]
    widths = [w.shape[1] for w in params.discriminator[0::2]]  # of the inputs of its layers
    saved += [like.new_empty(m * batch, p) for p in widths[1:-1]]
    if len(widths) > 1:
        saved.append(like.new_empty(m * batch, widths[-1], dtype=torch.uint8))
    shapes = [(m * batch, m), (m, widths[-1]), (m,)] + [(m, batch)] * call.normalize
    return saved + [like.new_empty(shape, dtype=torch.float32) for shape in shapes]


def step_backward(
    upstream: tuple[Sequence[Tensor | None], Tensor | None, Tensor | None, Tensor | None],
    call: Call,
    recovered: Sequence[Tensor],
    latents: Tensor | None,
    saved: Sequence[Tensor],
    needs: Sequence[int],
) -> tuple[Sequence[Tensor], Tensor | None, Sequence[Tensor]]:
    """Gradients of features, source and parameters for those of (recovered, latents, two losses).

    Computes all of them but that of the source, asked for or not: the plain form, not the fast one.
    """
    record("ebr_step_backward", "eager")
    m = len(call.features)
    if saved and latents is not None:
        kept = Saved.unflatten(saved, m, len(call.params) // 2 - 4 * m, call.normalize)
    else:
        recovered, latents, _, _, kept = _forward(call)
    d_features, d_source, d = _backward(upstream, call, recovered, latents, kept, bool(needs[m]))
    d_params = [t for head in (*d.encoders, *d.decoders) for t in head] + list(d.discriminator)
    return [t.contiguous() for t in d_features], d_source, d_params


def _forward(call: Call) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Saved]:
    features, present, params = call.features, call.present, split_params(call)
    m, batch = len(features), features[0].shape[0]
    x = [_mask(f, _column(present, i)) for i, f in enumerate(features)]

    encoder_hidden, encoded = [], []
    for i in range(m):
        w1, b1, w2, b2 = params.encoders[i]
        hidden = torch.addmm(b1, x[i], w1.t()).relu_()
        encoder_hidden.append(hidden)
        encoded.append(torch.addmm(b2, hidden, w2.t()))
    latents = torch.stack(encoded)  # [m, B, k]
    rstd = None
    if call.normalize:
        k = latents.shape[-1]
        latents, _, rstd = torch.native_layer_norm(latents, [k], None, None, LAYER_NORM_EPS)
        rstd = rstd.reshape(m, batch)
    if present is not None:
        latents.masked_fill_(~present.t().unsqueeze(-1), 0)

    mixer = _Mixer(latents, present, call.source)
    rows = mixer.rows()
    loss_rows, decoder_hidden, recovered = [], [], []
    for i, u in enumerate(mixer.mixed()):
        w1, b1, w2, b2 = params.decoders[i]
        hidden = torch.addmm(b1, u, w1.t()).relu_()
        decoder_hidden.append(hidden)
        decoded = _mask(torch.addmm(b2, hidden, w2.t()), _column(mixer.valid, i))
        error = (decoded.float() - x[i].float()).square().mean(-1)  # [B]
        loss_rows.append(_mask(error.unsqueeze(-1), _column(rows, i)).sum())
        recovered.append(decoded.add_(x[i]) if call.residual else decoded)

    a, psi_hidden = latents.view(m * batch, latents.shape[-1]), []
    for n in range(0, len(params.discriminator) - 2, 2):
        a = torch.addmm(params.discriminator[n + 1], a, params.discriminator[n].t()).relu_()
        psi_hidden.append(a)
    logits = torch.addmm(params.discriminator[-1], a, params.discriminator[-2].t())  # [m * B, m]
    log_p = F.log_softmax(logits.float(), dim=-1).reshape(m, batch, m)
    cross_entropy = -log_p.diagonal(dim1=0, dim2=2)  # [B, m]
    d_logits = log_p.exp() - torch.eye(m, dtype=torch.float32, device=logits.device).unsqueeze(1)
    if present is not None:
        cross_entropy = torch.where(present, cross_entropy, 0)
        d_logits = torch.where(present.t().unsqueeze(-1), d_logits, 0)
    d_logits = d_logits.reshape(m * batch, m)

    counts = _counts(call, rows)
    saved = Saved(
        encoder_hidden,
        decoder_hidden,
        psi_hidden[:-1],
        (a > 0).to(torch.uint8) if psi_hidden else None,
        d_logits,
        d_logits.t() @ a.float(),
        d_logits.sum(0),
        rstd,
    )
    return (
        recovered,
        latents,
        cross_entropy.sum() / counts[0],
        torch.stack(loss_rows).sum() / counts[1],
        saved,
    )


def _counts(call: Call, rows: Tensor | None) -> Tensor:
    like, m = call.features[0], len(call.features)
    everything = torch.ones((like.shape[0], m), dtype=torch.bool, device=like.device)
    present = everything if call.present is None else call.present
    return denominators(present, everything if rows is None else rows, call.normalizer, torch.float32)


def _backward(
    upstream: tuple[Sequence[Tensor | None], Tensor | None, Tensor | None, Tensor | None],
    call: Call, recovered: Sequence[Tensor], latents: Tensor, saved: Saved, need_source: bool,
) -> tuple[list[Tensor], Tensor | None, Params]:  # fmt: skip
    d_recovered, d_latents_in, d_discrimination, d_reconstruction = upstream
    present, params = call.present, split_params(call)
    m, batch, k = latents.shape
    x = [_mask(f, _column(present, i)) for i, f in enumerate(call.features)]
    mixer = _Mixer(latents, present, call.source)
    rows = mixer.rows()
    counts = _counts(call, rows)

    # Discriminator: its own gradient keeps its sign, the latents receive it times -lambda.
    d_psi = [torch.zeros_like(p) for p in params.discriminator]
    d_latents = torch.zeros_like(latents)
    if d_discrimination is not None:
        scale = d_discrimination / counts[0]
        d_psi[-2] = (saved.d_last_weight * scale).to(latents.dtype)
        d_psi[-1] = (saved.d_last_bias * scale).to(latents.dtype)
        d = (saved.d_logits * scale).to(latents.dtype) @ params.discriminator[-2]
        acts = [latents.reshape(m * batch, k), *saved.psi_hidden]
        gates = [*saved.psi_hidden, *([] if saved.psi_gate is None else [saved.psi_gate])]
        for n in reversed(range(len(gates))):
            d = torch.where(gates[n] > 0, d, 0)
            d_psi[2 * n] = d.t() @ acts[n]
            d_psi[2 * n + 1] = d.sum(0)
            d = d @ params.discriminator[2 * n]
        lambda_ = call.reversal.to(d.dtype)
        # Zero cuts the branch instead of multiplying it, so that 0 * inf never becomes NaN.
        d_latents = torch.where(lambda_ == 0, 0, -lambda_ * d).reshape(m, batch, k)

    # Decoders: from the recovered features and the reconstruction loss only.
    d_decoders, d_mixed = [], []
    mixed = mixer.mixed()
    for i in range(m):
        w1, _, w2, _ = params.decoders[i]
        grad = d_recovered[i]
        d = torch.zeros_like(recovered[i]) if grad is None else grad
        if d_reconstruction is not None:
            decoded = (recovered[i] - x[i] if call.residual else recovered[i]).float()
            scale = 2.0 / x[i].shape[1] * (d_reconstruction / counts[1])
            d = d + _mask((decoded - x[i].float()) * scale, _column(rows, i)).to(d.dtype)
        d = _mask(d, _column(mixer.valid, i))
        d_hidden = torch.where(saved.decoder_hidden[i] > 0, d @ w2, 0)
        d_decoders.append([d_hidden.t() @ mixed[i], d_hidden.sum(0), d.t() @ saved.decoder_hidden[i], d.sum(0)])
        d_mixed.append(_mask(d_hidden @ w1, _column(mixer.valid, i)))
    d_source = mixer.adjoint(d_mixed, d_latents, need_source)

    # Encoders: everything that reaches the latents.
    if d_latents_in is not None:
        d_latents = d_latents + d_latents_in
    if present is not None:
        d_latents = torch.where(present.t().unsqueeze(-1), d_latents, 0)
    if saved.rstd is not None:
        y, dy = latents.float(), d_latents.float()
        projected = dy - dy.mean(-1, keepdim=True) - y * (dy * y).mean(-1, keepdim=True)
        d_latents = (projected * saved.rstd.unsqueeze(-1)).to(latents.dtype)
        if present is not None:
            d_latents = torch.where(present.t().unsqueeze(-1), d_latents, 0)
    d_encoders, d_features = [], []
    for i in range(m):
        w1, _, w2, _ = params.encoders[i]
        d = d_latents[i]
        d_hidden = torch.where(saved.encoder_hidden[i] > 0, d @ w2, 0)
        d_encoders.append([d_hidden.t() @ x[i], d_hidden.sum(0), d.t() @ saved.encoder_hidden[i], d.sum(0)])
        d_x = d_hidden @ w1
        grad = d_recovered[i]
        if call.residual and grad is not None:
            d_x = d_x + grad
        d_features.append(_mask(d_x, _column(present, i)))
    return d_features, d_source, Params(d_encoders, d_decoders, d_psi)
