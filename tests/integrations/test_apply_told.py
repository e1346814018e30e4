"""What heads at hooks refuse or warn of, in one line each."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pytest
import torch
from apply_models import AT, SMALL, Early, Two, check, two_inputs
from torch import nn

import mmc_fast
from mmc_fast.errors import InputError
from mmc_fast.integrations import Site


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


@pytest.mark.parametrize("unwatched", ["", "initial", "all"])
@pytest.mark.parametrize("case", WATCHED)
def test_heads_that_do_not_learn_are_told_once(generator, case, unwatched):
    chosen, add, told = WATCHED[case]
    model = Two()
    handle = mmc_fast.apply_ebr(model, AT, **SMALL)
    if unwatched:
        handle.unwatch(initial_only=unwatched == "initial")
        told = told if unwatched == "initial" else None
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            model.eval()(*two_inputs(generator))
        model.train()
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


def test_a_handle_says_what_was_done(generator):
    model = Two()
    dry = mmc_fast.apply_ebr(model, AT, dry_run=True, **SMALL)
    assert dry.head is None
    handle = mmc_fast.apply_ebr(model, AT, **SMALL)
    assert [h.report.status for h in (dry, handle)] == ["dry run", "applied"]
    assert [str(h).splitlines()[0] for h in (dry, handle)] == [
        "EBR on Two: dry run, nothing was changed", "EBR on Two: applied"
    ]  # fmt: skip
    assert repr(handle) == "<EBRHandle on Two: a, b; applied>"
    assert handle.report.parameters == dry.report.parameters == sum(p.numel() for p in handle.parameters())
    for h in (dry, handle):
        assert f"{handle.report.parameters:,} parameters in submodule 'ebr'" in str(h)


def test_what_a_head_is_without_another_word():
    model = Two()
    handle = mmc_fast.apply_ebr(model, AT)
    assert [handle.report.hidden_dim, handle.report.latent_dim, *handle.report.psi_dims] == [1024, 512, 512, 256]
    assert [tuple(layer.weight.shape) for layer in handle.head.discriminator if hasattr(layer, "weight")] == [
        (512, 512), (256, 512), (2, 256)
    ]  # fmt: skip
    again = mmc_fast.load_ebr(Two(), model.state_dict())
    for h in (handle, again):
        assert (h.reversal, h.report.name, h.head.residual, h.head.normalize) == (1.0, "ebr", False, False)


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
