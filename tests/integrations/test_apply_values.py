"""Values and gradients of heads at hooks, however a model reads its features: those of EBRHead on the same features."""

from __future__ import annotations

import pytest
import torch
from apply_models import AT, ONE, OWN, SMALL, Early, Two, by_hand, check, linear, two_inputs
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmc_fast
from mmc_fast.errors import InputError
from mmc_fast.integrations import Site, find_handles
from mmc_fast.integrations.losses import psi_logits


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
        assert (a.shape, len(a), a.dtype, a.device.type) == ((len(x), 8), len(x), x.dtype, "cpu")
        assert (a.dim(), a.requires_grad) == (2, True)
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


@pytest.mark.parametrize("one_call", [False, True])
def test_modules_of_the_sites_may_run_one_by_one(generator, one_call):
    model, x = Two(), two_inputs(generator)
    handle = mmc_fast.apply_ebr(model, AT, **SMALL, reversal=0.4, one_call=one_call)
    assert [line.endswith("has not run yet") for line in handle.explain().splitlines()] == [False, True, True]
    a, b = model.a(x[0]), model.b(x[1])
    losses = handle.losses()
    expected = by_hand(model, handle, x)
    torch.testing.assert_close((model.join(a, b), *losses), expected)
    assert "has not run yet" not in handle.explain()


def test_losses_asked_for_within_the_forward(generator):
    """Before anything has read the features."""

    class Asks(Two):
        def forward(self, x, y):
            a, b = self.a(x), self.b(y)
            return self.join(a, b), find_handles(self)[0].losses()

    class AsksFirst(Two):
        def forward(self, x, y):
            a, b = self.a(x), self.b(y)
            losses = find_handles(self)[0].losses()
            return self.join(a, b), losses

    for build in (Asks, AsksFirst):
        model, x = build(), two_inputs(generator)
        handle = mmc_fast.apply_ebr(model, AT, **SMALL, reversal=0.4)
        output, losses = model(*x)
        torch.testing.assert_close((output, *losses), by_hand(model, handle, x))


def test_the_discriminator_takes_latents_in_its_own_dtype(generator):
    """That of the first site; it may have no parameters, as quantised layers have none."""
    latents = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    psi = nn.Linear(6, 2)
    torch.testing.assert_close(psi_logits(latents, psi), psi(latents.float()))
    assert psi_logits(latents, psi.double()).dtype == torch.float64
    assert torch.equal(psi_logits(latents, nn.Tanh()), latents.tanh())


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
