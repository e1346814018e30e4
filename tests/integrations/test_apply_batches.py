"""Heads at hooks and what a batch may be: several before one backward, empty, of mixed dtypes, one sample at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from apply_models import AT, SMALL, Early, Two, by_hand, linear, total, two_inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmc_fast
from mmc_fast.errors import InputError
from mmc_fast.nn import EBRHead


def test_several_forwards_before_one_backward(generator):
    inputs = [two_inputs(generator, rows) for rows in (3, 5, 8)]
    model = Two()
    handle = mmc_fast.apply_ebr(model, AT, **SMALL)
    sum(total(model(*x), *handle.losses()) for x in inputs).backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    for x in inputs:
        total(*by_hand(model, handle, x)).backward()
    torch.testing.assert_close(grads, [p.grad for p in model.parameters()])
    with handle.step():  # or as one: means over the rows of all
        for x in inputs:
            model(*x)
        with torch.no_grad():
            model(*inputs[0])  # a look that does not count
    z = [torch.cat([linear(layer, x[i]) for x in inputs]) for i, layer in enumerate((model.a, model.b))]
    expected = handle.head(dict(zip(AT, z, strict=True)))
    torch.testing.assert_close(handle.losses(), (expected[2], expected[3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixed_dtypes_and_default_dtype(generator, dtype):
    torch.set_default_dtype(dtype)
    try:
        model = Two().float()
        model.b = nn.Embedding(10, 8, dtype=torch.float32)
        handle = mmc_fast.apply_ebr(model, AT, dims={"b": 8}, **SMALL)
        a, y = torch.randn(8, 7, generator=generator, dtype=torch.float32), torch.arange(8)
        exact = (model(a, y), *handle.losses())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = (model(a, y), *handle.losses())
            head = handle.head({"a": model.a.forward(a), "b": model.b.forward(y)})
    finally:
        torch.set_default_dtype(torch.float32)
    assert exact[0].dtype == exact[1].dtype == torch.float32
    assert low[0].dtype == head.recovered["a"].dtype == torch.bfloat16
    assert low[1].dtype == low[2].dtype == torch.float32
    torch.testing.assert_close(low[1:], (head[2], head[3]))
    for got, expected in zip(low, exact, strict=True):
        torch.testing.assert_close(got.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("build", [Two, Early])
def test_empty_batches_and_no_tokens(generator, build):
    model = build()
    handle = mmc_fast.apply_ebr(model, AT, **SMALL)
    for rows in ((0,), (0, 3), (2, 0)):
        out = model(*two_inputs(generator, *rows))
        assert out.shape == (*rows, 3)
        losses = handle.losses()
        assert [float(v.detach()) for v in losses] == [0, 0]
        assert handle.adversarial()["loss_md"] == 0
        (out.sum() + sum(losses)).backward()
        assert all(not p.grad.any() for n, p in model.named_parameters() if n != "c.bias" and p.grad is not None)
        model.zero_grad()
    with handle.present(torch.zeros(4, 2, dtype=torch.bool)):
        model(*two_inputs(generator, 4))
    assert [float(v.detach()) for v in handle.losses()] == [0, 0]


@pytest.mark.parametrize("build", [Two, Early])
def test_per_sample_gradients(generator, build):
    model, (x, y) = build(), two_inputs(generator, 4)
    handle = mmc_fast.apply_ebr(model, AT, **SMALL)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params, x, y):
        return torch.func.functional_call(model, params, (x[None], y[None])).square().sum() + sum(handle.losses())

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, y)
    for b in range(4):
        model.zero_grad()
        (model(x[b : b + 1], y[b : b + 1]).square().sum() + sum(handle.losses())).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(each[name][b], p.grad)
    head = EBRHead({"a": 8, "b": 8}, **SMALL)
    with pytest.raises(InputError, match=r"features of 'a' are ndarray; give a tensor, for example torch\.as_tensor"):
        head({"a": np.zeros((2, 8), np.float32), "b": torch.zeros(2, 8)})


def test_a_mask_inside_of_recomputed_code(generator):
    class Both(Two):
        def forward(self, x, y):
            return self.join(checkpoint(self.a, x, use_reentrant=False), self.b(y))

    model, x = Both(), two_inputs(generator)
    handle = mmc_fast.apply_ebr(model, AT, **SMALL)
    mask = torch.rand(8, 2, generator=generator) < 0.5
    with handle.present(mask):
        total(model(*x), *handle.losses()).backward()
    grad = model.a.weight.grad.clone()
    model.zero_grad()
    total(*by_hand(model, handle, x, mask)).backward()
    torch.testing.assert_close(grad, model.a.weight.grad)
    with handle.present(mask):
        out = model(*x)
    with pytest.raises(RuntimeError, match="call backward inside of"):
        out.sum().backward()
