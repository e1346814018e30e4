"""What people report of hooks, adapters and callbacks: each kind of fault with the right value, by EBRHead on the same features."""

from __future__ import annotations

import copy
import io
import re
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.flop_counter
from apply_models import SMALL, Two, two_inputs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mmc_fast
from mmc_fast.errors import InputError
from mmc_fast.integrations import Site, find_handles
from mmc_fast.nn import EBRHead

AT = {"a": "a", "b": "b"}
ONE, OWN = "one call for all heads", "a call of its own"


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def check(model: Two, handle, x, after=None, way: str | None = ONE, join=None, features=None) -> None:
    """Outputs, losses and gradients equal those of EBRHead on the features; ``after``: what the model does to what it gets."""
    model.zero_grad()
    out, losses = model(*x), handle.losses()
    (out.square().sum() + 1.3 * losses[0] + 0.7 * losses[1]).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    z = features() if features else {"a": linear(model.a, x[0]), "b": linear(model.b, x[1])}
    expected = handle.head({name: f.flatten(0, -2) for name, f in z.items()}, reversal=handle.reversal)
    recovered = [r.reshape(f.shape) for r, f in zip(expected.recovered.values(), z.values(), strict=True)]
    join = join or (lambda a, b: linear(model.c, torch.cat([a, b], -1)))
    right = join(*(after(*recovered) if after else recovered))
    torch.testing.assert_close(out, right)
    torch.testing.assert_close(losses.discrimination, expected.discrimination_loss)
    torch.testing.assert_close(losses.reconstruction, expected.reconstruction_loss)
    (right.square().sum() + 1.3 * expected.discrimination_loss + 0.7 * expected.reconstruction_loss).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, msg=lambda text, name=name: f"{name}: {text}")
    if way:
        assert all(way in line for line in handle.explain().splitlines()[1:]), handle.explain()


class Early(Two):
    def forward(self, x, y):
        return self.join(self.a(x).tanh(), self.b(y))


class Behind(Two):
    """In-place operations on the features, on a view of them, and by a module."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x, y):
        a, b = self.a(x), self.b(y)
        a += b
        b[:, :3] *= 2
        return self.join(self.relu(a), b)


def behind(a, b):
    return (a + b).relu(), torch.cat([2 * b[:, :3], b[:, 3:]], 1)


class Alias(Two):
    """The output of the site is its input, which the model changes afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.a = self.a, nn.Identity()

    def forward(self, x, y):
        z = self.inner(x)
        a = self.a(z)
        z.zero_()
        return self.join(a, self.b(y))


class Recomputed(Two):
    def forward(self, x, y):
        return checkpoint(self.join, self.a(x), self.b(y), use_reentrant=False)


class Nested(Two):
    """Everything around: mappings, keyword arguments, backward hooks at the reader."""

    def __init__(self) -> None:
        super().__init__()
        self.c.register_full_backward_hook(lambda module, gi, go: None)

    def forward(self, x, y):
        kept = {"a": [self.a(x)], "b": (self.b(y),)}
        return self.join(**{name: value[0] for name, value in kept.items()})


class Asks(Two):
    """Shape, dtype and device are known before the values."""

    def forward(self, x, y):
        a = self.a(x)
        assert (a.shape, len(a), a.dtype, a.device.type, a.dim(), a.requires_grad) == (
            (len(x), 8),
            len(x),
            x.dtype,
            "cpu",
            2,
            True,
        )
        nothing = torch.zeros_like(a) + a.new_zeros(1)
        b = self.b(y)
        return self.join(a + nothing, b)


class Looked(Two):
    """The first read is a look in other surroundings than those of the sites."""

    def forward(self, x, y):
        a, b = self.a(x), self.b(y)
        with self.look():
            a.mean()
        return self.join(a, b)

    look = staticmethod(torch.no_grad)


class LookedInference(Looked):
    look = staticmethod(torch.inference_mode)


class LookedLow(Looked):
    look = staticmethod(lambda: torch.autocast("cpu", torch.bfloat16))


CASES = {
    "plain": (Two, None, ONE, {}),
    "fusion named": (Two, None, ONE, {"fusion": "c"}),
    "one_call=False": (Two, None, OWN, {"one_call": False}),
    "read early": (Early, lambda a, b: (a.tanh(), b), OWN, {}),
    "in place": (Behind, behind, ONE, {}),
    "in place, own calls": (Behind, behind, OWN, {"one_call": False}),
    "checkpointed fusion": (Recomputed, None, ONE, {}),
    "nested": (Nested, None, ONE, {}),
    "metadata": (Asks, None, ONE, {}),
    "first read without gradients": (Looked, None, ONE, {}),
    "first read in inference mode": (LookedInference, None, ONE, {}),
    "first read under autocast": (LookedLow, None, ONE, {}),
    "residual, normalised": (Two, None, ONE, {"residual": True, "normalize": True}),
    "residual, own calls": (Early, lambda a, b: (a.tanh(), b), OWN, {"residual": True, "normalize": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(generator, case):
    build, after, way, options = CASES[case]
    model = build()
    handle = mmc_fast.apply_ebr(model, AT, **SMALL, reversal=0.4, **options)
    check(model, handle, two_inputs(generator), after, way)
    check(model, handle, two_inputs(generator, 5), after, way)


@pytest.mark.parametrize("one_call", [True, False])
def test_features_that_others_hold_are_copied(generator, one_call):
    model = Alias()
    handle = mmc_fast.apply_ebr(model, AT, dims={"a": 8}, one_call=one_call, **SMALL)
    x = two_inputs(generator)
    features = lambda: {"a": linear(model.inner, x[0]), "b": linear(model.b, x[1])}  # noqa: E731
    check(model, handle, x, way=ONE if one_call else OWN, features=features)


@pytest.mark.parametrize("first", [lambda z: z.mean(1), lambda z: z[:, 0]])
def test_tokens_in_one_call_and_read_early(generator, first):
    class Tokens(Two):
        def forward(self, x, y):
            a, b = self.a(x), self.b(y)
            return self.join(first(a), first(b))

    class TokensEarly(Two):
        def forward(self, x, y):
            return self.join(first(self.a(x)), first(self.b(y)))

    for build, way in ((Tokens, ONE), (TokensEarly, OWN)):
        model = build()
        handle = mmc_fast.apply_ebr(model, AT, **SMALL)
        check(model, handle, two_inputs(generator, 4, 6), lambda a, b: (first(a), first(b)), way)


def test_a_gradient_that_comes_back_past_the_heads_is_refused(generator, monkeypatch):
    """torch may run the forward of an ``autograd.Function`` from C++, where no frame tells of it."""

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(a, b):
            return a + b

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):
            return g, g

    class Custom(Two):
        def forward(self, x, y):
            return Sum.apply(self.a(x), self.b(y))

    model = Custom()
    mmc_fast.apply_ebr(model, AT, **SMALL)
    monkeypatch.setattr("mmc_fast.integrations.deferred._inside_a_function", lambda: False)
    with pytest.raises(RuntimeError, match=r"modality '[ab]' .* past torch's Python functions"):
        model(*two_inputs(generator)).sum().backward()


def test_what_cannot_be_one_call_is_refused_by_name(generator):
    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            return torch.cat([a, b], -1)

        @staticmethod
        def backward(ctx, g):
            return g[:, :8], g[:, 8:]

    class Custom(Two):
        def __init__(self) -> None:
            super().__init__()
            self.cat = Cat()

        def forward(self, x, y):
            return self.c(self.cat(self.a(x), self.b(y)))

    class Cat(nn.Module):
        def forward(self, a, b):
            return Sum.apply(a, b)

    class Stash(nn.Linear):
        def forward(self, x):
            self.kept = super().forward(x)
            return self.kept

    class Changed(Two):
        def __init__(self) -> None:
            super().__init__()
            self.a = Stash(7, 8)

        def forward(self, x, y):
            a = self.a(x)
            self.a.kept.add_(1)
            return self.join(a, self.b(y))

    class Later(Custom):
        def forward(self, x, y):
            a, b = self.a(x), self.b(y)
            return self.c(torch.cat([a, b], -1)) + self.c(self.cat(a, b))

    for build, options, told in (
        (Later, {}, r"modality 'a' \(a\) is read by code past torch's Python functions"),
        (Early, {"fusion": "c"}, r"modality 'a' \(a\) is read by tanh before b ran"),
        (Custom, {}, r"modality 'a' \(a\) is read by code past torch's Python functions"),
        (Changed, {}, r"modality 'a' \(a\) was changed in place"),
    ):
        model = build()
        handle = mmc_fast.apply_ebr(model, AT, **SMALL, **options)
        with pytest.raises((InputError, RuntimeError), match=told):
            model(*two_inputs(generator))
        handle.restore()
        if build is Custom:  # both repairs that the message names
            for repair in ({"fusion": "cat"}, {"one_call": False}):
                handle = mmc_fast.apply_ebr(model, AT, **SMALL, **repair)
                check(model, handle, two_inputs(generator), way=None)
                handle.restore()
    for fusion, told in (("a", "contain each other"), ("d", "submodule 'd'")):
        with pytest.raises(InputError, match=told):
            mmc_fast.apply_ebr(Two(), AT, fusion=fusion, **SMALL)


def test_shared_encoder_by_its_calls(generator):
    class Shared(Two):
        def forward(self, x, y):
            return self.join(self.a(x), self.a(y))

    at = {"left": Site("a", call=0), "right": Site("a", call=1)}
    x = torch.randn(2, 8, 7, generator=generator).unbind()
    model = Shared()
    handle = mmc_fast.apply_ebr(model, at, example=x, **SMALL)
    check(model, handle, x, features=lambda: {"left": linear(model.a, x[0]), "right": linear(model.a, x[1])})
    with pytest.raises(InputError, match="runs 2 times"):
        mmc_fast.apply_ebr(Shared(), {"left": Site("a", call=2)}, example=x, **SMALL)
    with pytest.raises(InputError, match="tell its calls apart"):
        mmc_fast.apply_ebr(Shared(), {"left": "a", "right": "a"}, **SMALL)
    with pytest.warns(UserWarning, match="L_md is 0"):
        mmc_fast.apply_ebr(Shared(), {"left": "a"}, repeats="all", **SMALL)


class Adapter(nn.Module):
    """As LoRA: the layer and an added part."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.added = base, nn.Linear(7, 8)

    def forward(self, x):
        return self.base(x) + self.added(x)


def test_a_head_belongs_to_a_name(generator):
    model, x = Two(), two_inputs(generator)
    handle = mmc_fast.apply_ebr(model, AT, **SMALL)
    model(*x)
    base = model.a
    model.a = Adapter(base)
    features = lambda: {  # noqa: E731
        "a": linear(base, x[0]) + linear(model.a.added, x[0]), "b": linear(model.b, x[1])
    }  # fmt: skip
    check(model, handle, x, features=features)
    model.a = base
    check(model, handle, x)
    model.a = nn.Linear(7, 8)  # replaced
    check(model, handle, x)
    model.a = Adapter(model.a)
    with pytest.raises(InputError, match=r"a was wrapped or replaced.*handle\.refresh\(\)"):
        model.forward(*x)  # no hook of the model runs
    handle.refresh()
    model.forward(*x)
    del model.a
    with pytest.raises(InputError, match="no submodule 'a' any more"):
        model(*x)


@pytest.mark.parametrize("how", ["submodule", "in place", "model"])
def test_compiled_later(generator, how):
    model, x = Two(), two_inputs(generator)
    handle = mmc_fast.apply_ebr(model, AT, **SMALL)
    base, run = model.a, model
    if how == "submodule":
        model.a = torch.compile(model.a, backend="eager")
    elif how == "in place":
        model.a.compile(backend="eager")
    else:
        run = torch.compile(model, backend="eager")
    out = run(*x)
    expected = handle.head({"a": linear(base, x[0]), "b": linear(model.b, x[1])})
    torch.testing.assert_close(out, linear(model.c, torch.cat(list(expected.recovered.values()), 1)))
    torch.testing.assert_close(handle.losses(), (expected[2], expected[3]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_layers_run_by_themselves(generator):
    model, x = Two().eval(), two_inputs(generator)
    handle = mmc_fast.apply_ebr(model, AT, **SMALL)
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    torch.testing.assert_close(small(*x), model(*x), atol=0.03, rtol=0.03)
    torch.testing.assert_close(find_handles(small)[0].losses(), handle.losses(), atol=0.03, rtol=0.03)
    assert not torch.equal(small(*x), model(*x))


@pytest.mark.parametrize("change", ["adapter", "hook", "spectral norm"])
def test_layers_of_the_head_that_are_no_plain_layers(generator, change):
    """The fused op would pass them by."""
    model, x = Two().eval(), two_inputs(generator)
    handle = mmc_fast.apply_ebr(model, AT, **SMALL)
    encoder = handle.head.encoders["a"]
    before = model(*x)
    if change == "adapter":
        adapter = Adapter(encoder[0])
        adapter.added = nn.Linear(8, 9)
        encoder[0] = adapter
    elif change == "hook":
        encoder[0].register_forward_hook(lambda module, args, out: 2 * out)
    else:
        nn.utils.spectral_norm(encoder[0])
    z = {"a": linear(model.a, x[0]), "b": linear(model.b, x[1])}
    r = [handle.head.decoders[m](handle.head.encoders[m](z[m])) for m in AT]
    torch.testing.assert_close(model(*x), linear(model.c, torch.cat(r, 1)))
    assert not torch.allclose(model(*x), before)


def test_graphs_fake_tensors_and_meta(generator):
    model, x = Two(), two_inputs(generator)
    handle = mmc_fast.apply_ebr(model, AT, **SMALL)
    expected = (model(*x), *handle.losses())
    graph = torch.fx.symbolic_trace(model)  # calls the same modules, hooks included
    torch.testing.assert_close((graph(*x), *handle.losses()), expected)
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(*(mode.from_tensor(t) for t in x)).shape == (8, 3)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        torch.testing.assert_close(model(*x), expected[0])


def test_copies_of_models_and_of_parts(generator):
    model, x = Two(), two_inputs(generator)
    handle = mmc_fast.apply_ebr(model, AT, **SMALL)
    model(*x)
    part = copy.deepcopy(model.a)
    torch.testing.assert_close(part(x[0]), linear(model.a, x[0]))  # a part alone has no head
    assert not find_handles(part)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False), averaged.module):
        (its,) = find_handles(other)
        check(other, its, x)
        torch.testing.assert_close(handle.losses(), its.losses())
    with pytest.raises(InputError, match="shallow copy of the model with heads at a, b"):
        copy.copy(model)(*x)


@pytest.mark.parametrize("build", [Two, Early])
def test_threads_do_not_meet(generator, build):
    model = build().eval()
    handle = mmc_fast.apply_ebr(model, AT, **SMALL)
    handle.unwatch()
    inputs = [two_inputs(generator) for _ in range(4)]
    present = torch.rand(8, 2, generator=generator) < 0.6
    source = torch.where(present, torch.arange(2), 1 - torch.arange(2))
    told = [(handle.predict(*x, present=present, source=source), model(*x), *handle.losses()) for x in inputs]
    wrong: list[int] = []

    def serve(k: int) -> None:
        for _ in range(40):
            got = (handle.predict(*inputs[k], present=present, source=source), model(*inputs[k]), *handle.losses())
            if not all(torch.equal(a, b) for a, b in zip(got, told[k], strict=True)):
                wrong.append(k)

    threads = [threading.Thread(target=serve, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    handle.reset()
    with pytest.raises(RuntimeError, match="no site has run in this thread"):
        handle.losses()


def test_several_forwards_before_one_backward(generator):
    inputs = [two_inputs(generator, rows) for rows in (3, 5, 8)]
    model = Two()
    handle = mmc_fast.apply_ebr(model, AT, **SMALL)
    total = sum(model(*x).square().sum() + sum(handle.losses()) for x in inputs)
    total.backward()
    grads = [p.grad for p in model.parameters()]
    model.zero_grad()
    for x in inputs:
        out = handle.head({"a": linear(model.a, x[0]), "b": linear(model.b, x[1])})
        logits = linear(model.c, torch.cat(list(out.recovered.values()), 1))
        (logits.square().sum() + out.discrimination_loss + out.reconstruction_loss).backward()
    torch.testing.assert_close(grads, [p.grad for p in model.parameters()])
    with handle.step():  # or as one: means over the rows of all
        for x in inputs:
            model(*x)
        with torch.no_grad():
            model(*inputs[0])  # a look that does not count
    z = [torch.cat([linear(layer, x[i]) for x in inputs]) for i, layer in enumerate((model.a, model.b))]
    expected = handle.head(dict(zip(AT, z, strict=True)))
    torch.testing.assert_close(handle.losses(), (expected[2], expected[3]))


@pytest.mark.parametrize(
    "value", [float("nan"), -3.0, float("inf"), "0.5", True, None, nn.Parameter(torch.tensor(1.0)), torch.ones(2), torch.tensor(-1.0)]
)  # fmt: skip
def test_lambda_is_checked_wherever_it_enters(generator, value):
    with pytest.raises(InputError, match="λ is"):
        mmc_fast.apply_ebr(Two(), AT, reversal=value, **SMALL)
    model = Two()
    handle = mmc_fast.apply_ebr(model, AT, reversal=np.float32(0.5), **SMALL)
    with pytest.raises(InputError, match="λ is"):
        handle.reversal = value
    assert handle.reversal == 0.5
    with pytest.raises(InputError, match="λ is"):
        mmc_fast.load_ebr(Two(), model.state_dict(), reversal=value)


WATCHED = {
    "groups made by hand": (lambda m, h: [*m.a.parameters(), *m.c.parameters()], True, "in no optimiser: encoders, deco"),
    "psi forgotten": (lambda m, h: [p for n, p in m.named_parameters() if "discr" not in n], True, "in no optimiser: discr"),
    "losses not added": (lambda m, h: list(m.parameters()), False, "got no gradient in 20 steps .*: discriminator"),
    "frozen": (lambda m, h: [p for p in h.head.requires_grad_(False) and m.parameters() if p.requires_grad], True, "are frozen"),
    "right": (lambda m, h: list(m.parameters()), True, None),
}  # fmt: skip


@pytest.mark.parametrize("case", WATCHED)
def test_heads_that_do_not_learn_are_told_once(generator, case):
    chosen, add, told = WATCHED[case]
    model = Two()
    handle = mmc_fast.apply_ebr(model, AT, **SMALL)
    optimizer = torch.optim.Adam(chosen(model, handle), 1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(30):
            loss = model(*two_inputs(generator)).square().sum() + (sum(handle.losses()) if add else 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    messages = [str(w.message) for w in caught if "apply_ebr" in str(w.message)]
    assert len(messages) == (told is not None)
    if told:
        assert re.search(told, messages[0])
        assert "add_param_group" in messages[0]
        assert "\n" not in messages[0]


def test_initial_weights_in_evaluation_are_told_once(generator):
    model, x = Two().eval(), two_inputs(generator)
    mmc_fast.apply_ebr(model, AT, **SMALL)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="initial random weights"):
            model(*x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(*x)
    loaded = Two().eval()
    mmc_fast.load_ebr(loaded, model.state_dict())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded(*x)


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


def test_maps_without_a_word_on_their_features_are_refused(generator):
    class Maps(Two):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.a = layer

        def forward(self, x, y):
            return self.join(self.a(x).flatten(2).mean(2), self.b(y))

    image, sequence = torch.randn(2, 3, 4, 6, generator=generator), torch.randn(2, 3, 6, generator=generator)
    y = torch.randn(2, 5, generator=generator)
    for layer, options, told in (
        (nn.Conv2d(3, 8, 1), {}, r"feature_dim=1"),
        (nn.Conv2d(3, 8, 1), {"dims": {"a": 6}}, r"feature_dim=1"),
        (nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8), nn.ReLU()), {"dims": {"a": 6}}, r"feature_dim=1"),
        (nn.Conv2d(3, 8, 1), {"example": (image, y)}, r"gave \[2, 8, 4, 6\]; say which"),
        (nn.Conv1d(3, 8, 1), {"example": (sequence, y)}, r"gives \[2, 8, 6\]; say which"),
    ):
        with pytest.raises(InputError, match=told):
            mmc_fast.apply_ebr(Maps(layer), AT, **SMALL, **options)
    for layer, x in ((nn.Conv2d(3, 8, 1), image), (nn.Conv1d(3, 8, 1), sequence)):
        model = Maps(layer)
        handle = mmc_fast.apply_ebr(model, {"a": Site("a", feature_dim=1), "b": "b"}, example=(x, y), **SMALL)
        model(x, y)
        assert handle.output.latents["a"].shape == (2, *x.shape[2:], SMALL["latent_dim"])
    flat = mmc_fast.apply_ebr(Maps(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(1), nn.Linear(192, 8))), AT, **SMALL)
    assert flat.head.dims == [8, 8]


def test_a_mask_inside_of_recomputed_code(generator):
    class Both(Two):
        def forward(self, x, y):
            return self.join(checkpoint(self.a, x, use_reentrant=False), self.b(y))

    model, x = Both(), two_inputs(generator)
    handle = mmc_fast.apply_ebr(model, AT, **SMALL)
    mask = torch.rand(8, 2, generator=generator) < 0.5
    with handle.present(mask):
        out = model(*x)
        (out.square().sum() + sum(handle.losses())).backward()
    grad = model.a.weight.grad.clone()
    model.zero_grad()
    right = handle.head({"a": linear(model.a, x[0]), "b": linear(model.b, x[1])}, mask)
    logits = linear(model.c, torch.cat(list(right.recovered.values()), 1))
    (logits.square().sum() + right[2] + right[3]).backward()
    torch.testing.assert_close(grad, model.a.weight.grad)
    with handle.present(mask):
        out = model(*x)
    with pytest.raises(RuntimeError, match="call backward inside of"):
        out.sum().backward()


def test_an_adapter_reads_what_goes_on_and_replaces_it(generator):
    """Heads and in-place operations behind the sites: fuse(encode(batch)) is the model."""
    for build, heads in ((Two, True), (Early, True), (Behind, False), (Behind, True)):
        model, batch = build().eval(), (*two_inputs(generator), None)
        if heads:
            mmc_fast.apply_ebr(model, AT, residual=True, **SMALL)
        expected = model(*batch[:2])
        adapter = mmc_fast.ModelAdapter(model, AT, "c")
        features = adapter.encode(batch)
        for _ in range(2):  # nothing that was recorded has changed
            torch.testing.assert_close(adapter.fuse(features), expected)
        torch.testing.assert_close(adapter.encode(batch), features)
        names = {name: f"_orig_mod.{site}" for name, site in AT.items()}
        compiled = mmc_fast.ModelAdapter(torch.compile(model, backend="eager"), names, "_orig_mod.c")
        torch.testing.assert_close(compiled.fuse(compiled.encode(batch)), expected)
