"""Where features are found and put back, how widths are known, and every refusal: one line, nothing changed."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from apply_models import SMALL, Pair, Returns, Towers, assert_same, draw_towers, sites, snapshot
from torch import Tensor, nn

import mmc_fast
from mmc_fast.errors import InputError
from mmc_fast.integrations import Site

BOTH = {"image": "image", "text": "text"}


class Named(NamedTuple):
    mask: Tensor | None
    hidden: Tensor


@dataclass(frozen=True)
class Frozen:
    hidden: Tensor
    note: str


PLACES: list[tuple[Any, Any]] = [
    (lambda x: (x, x + 1), 1),
    (lambda x: [x, x + 1], 0),
    (lambda x: {"a": x, "b": 2}, "a"),
    (lambda x: OrderedDict(a=x + 1, b=x), 1),
    (lambda x: Named(None, x), "hidden"),
    (lambda x: Frozen(x, "kept"), "hidden"),
    (lambda x: {"layers": (x + 1, Frozen(x, "kept"))}, ("layers", 1, "hidden")),
]


@pytest.mark.parametrize(("make", "output"), PLACES)
def test_a_tensor_at_a_stated_place_is_replaced_and_nothing_else(generator, make, output):
    model = Pair(Returns(make), nn.Identity())
    x, t = torch.randn(3, 4, generator=generator), torch.randn(3, 2, generator=generator)
    site = Site("image", output=output)
    handle = mmc_fast.apply_ebr(model, {"image": site, "text": "text"}, dims={"image": 4, "text": 2}, **SMALL)
    got = model(x, t)[0]
    original = make(x)
    z = site.read(original)
    head = handle.head
    assert type(got) is type(original)
    torch.testing.assert_close(site.read(got), head.decoders[0](head.encoders[0](z)))
    assert torch.equal(site.read(original), z)  # the module's own output was not written to
    back = site.write(got, z)
    assert repr(back) == repr(original)  # everything around the place is as it was


def test_maps_and_sequence_first_layouts(generator):
    model = Pair(nn.Conv2d(3, 5, 1), nn.GRU(2, 4))
    at = {"image": Site("image", feature_dim=1), "text": Site("text", output=0, batch_dim=1)}
    image, text = torch.randn(2, 3, 4, 6, generator=generator), torch.randn(7, 2, 2, generator=generator)
    plain = copy.deepcopy(model)
    handle = mmc_fast.apply_ebr(model, at, example=(image, text), **SMALL)
    assert handle.head.dims == [5, 4]
    maps, (sequence, state) = model(image, text)
    z = plain(image, text)
    enc, dec = handle.head.encoders, handle.head.decoders
    torch.testing.assert_close(maps, dec[0](enc[0](z[0].permute(0, 2, 3, 1))).permute(0, 3, 1, 2))
    torch.testing.assert_close(sequence, dec[1](enc[1](z[1][0])))
    assert torch.equal(state, z[1][1])
    assert handle.output.latents["text"].shape == (2, 7, SMALL["latent_dim"])
    with handle.present(torch.tensor([[True, True], [True, False]])):
        _, (sequence, _) = model(image, text)
    assert bool((sequence[:, 1] == 0).all())
    assert bool((sequence[:, 0] != 0).any())


def test_widths_come_from_layers_dims_or_an_example(generator):
    layers = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Sequential(nn.LayerNorm(8), nn.Dropout()), nn.GELU())
    own = Returns(lambda t: t[:, :1])
    model = Pair(layers, own)
    with pytest.raises(InputError, match=r"text at text: its width is not known; give dims=\{'text': ...\}"):
        mmc_fast.apply_ebr(model, BOTH, **SMALL)
    example = (torch.randn(2, 3, generator=generator), torch.randn(2, 4, generator=generator))
    for options in ({"dims": {"text": 1}}, {"example": example}, {"example": dict(zip(BOTH, example, strict=True))}):
        handle = mmc_fast.apply_ebr(model, BOTH, **SMALL, **options)
        assert handle.head.dims == [8, 1]
        handle.restore()


def test_a_wrong_width_is_refused_in_the_forward(generator):
    model = Pair(nn.Linear(3, 4), nn.Identity())
    mmc_fast.apply_ebr(model, BOTH, dims={"text": 9}, **SMALL)
    with pytest.raises(InputError, match=r"'text' \(text\) gave \[2, 4\].*built for width 9"):
        model(torch.randn(2, 3, generator=generator), torch.randn(2, 4, generator=generator))


def test_a_dry_run_changes_nothing_and_says_why_not(generator):
    model, x = draw_towers(generator, m=3, dropout=0.5)
    model.norm = nn.BatchNorm1d(3, dtype=torch.float64)
    plain_forward = model.forward
    model.forward = lambda **kw: model.norm(plain_forward(**kw))
    before = snapshot(model)
    at = {"a": "encoders.mod0", "b": "encoders.mod1", "c": "unused"}
    handle = mmc_fast.apply_ebr(model, at, example=x, dry_run=True, **SMALL)
    assert_same(before, snapshot(model))
    assert handle.report.problems == [
        "c at unused: does not run in the forward on example (or is called as .forward, which skips hooks)"
    ]
    assert dict(handle.report.elsewhere) == {
        "fusion": "runs after the last site, on what the heads recover",
        "norm": "runs after the last site, on what the heads recover",
        "encoders.mod2": f"not named in at; gives {[len(x['mod2']), model.encoders['mod2'][0].out_features]}",
    }
    assert "dry run, nothing was changed" in str(handle)
    with pytest.raises(RuntimeError, match="dry run"):
        handle.losses()
    handle.restore()
    with pytest.raises(InputError, match="does not run"):
        mmc_fast.apply_ebr(model, at, example=x, **SMALL)
    assert_same(before, snapshot(model))
    good = mmc_fast.apply_ebr(model, sites(model), example=x, dry_run=True, **SMALL)
    assert_same(before, snapshot(model))
    real = mmc_fast.apply_ebr(model, sites(model), example=x, **SMALL)
    assert good.report.parameters == real.report.parameters == sum(p.numel() for p in real.parameters())


def _model() -> Towers:
    return Towers({"image": 3, "text": 2}, {"image": 4, "text": 4})


def _shared() -> nn.Module:
    model = _model()
    model.alias = model.encoders["image"]
    return model


IMAGE = {"image": "encoders.image"}
REFUSED = {
    "no names": (_model, {}, {}, "at is empty"),
    "unknown, with the nearest": (_model, {"image": "encoder.imag"}, {}, "nearest: encoders.image"),
    "unknown, by its last part": (_model, {"image": "net.towers.image"}, {}, "nearest: encoders.image"),
    "unknown, nothing near": (_model, {"image": "qqq"}, {}, "Allowed: encoders, fusion, unused"),
    "one module twice": (_shared, IMAGE | {"other": "alias"}, {}, "one and the same module"),
    "one inside of another": (_model, IMAGE | {"all": "encoders"}, {}, "lies inside"),
    "repeats": (_model, IMAGE, {"repeats": "last"}, "allowed are 'error' and 'all'"),
    "name with a dot": (_model, IMAGE, {"name": "a.b"}, "without dots"),
    "name taken": (_model, IMAGE, {"name": "fusion"}, "has an attribute 'fusion' already"),
    "dims of an unknown modality": (_model, IMAGE, {"dims": {"imag": 4}}, "Did you mean 'image'"),
    "dims without meaning": (_model, IMAGE, {"dims": {"image": 0}}, "width of 1 or more"),
    "dims against the example": (
        _model,
        IMAGE,
        {"dims": {"image": 5}, "example": {"image": torch.zeros(2, 3), "text": torch.zeros(2, 2)}},
        "gives width 4 on example, but dims says 5",
    ),
    "example that does not fit": (
        _model,
        IMAGE,
        {"example": {"image": torch.zeros(2, 9)}},
        "forward on example failed",
    ),
    "latent width": (_model, IMAGE, {"latent_dim": 0}, "latent_dim is 0"),
    "no tensor at the site": (
        lambda: Pair(nn.GRU(3, 4), nn.Linear(2, 4)),
        {"image": "image"},
        {"example": (torch.zeros(5, 2, 3), torch.zeros(2, 2))},
        r"tensors are at: 0 \[5, 2, 4\], 1 \[1, 2, 4\]",
    ),
    "no such place": (
        lambda: Pair(nn.GRU(3, 4), nn.Linear(2, 4)),
        {"image": Site("image", output="hidden")},
        {"example": (torch.zeros(5, 2, 3), torch.zeros(2, 2))},
        "returned tuple without 'hidden'",
    ),
    "integers": (
        lambda: Pair(Returns(lambda x: x.long()), nn.Linear(2, 4)),
        {"image": "image"},
        {"example": (torch.zeros(5, 3), torch.zeros(5, 2))},
        "torch.int64",
    ),
    "one dimension twice": (
        _model,
        {"image": Site("encoders.image", batch_dim=1)},
        {"example": {"image": torch.zeros(2, 3), "text": torch.zeros(2, 2)}},
        "two different dimensions",
    ),
    "runs twice": (
        lambda: Returns2(),
        {"image": "inner"},
        {"example": torch.zeros(2, 3)},
        "runs 2 times in one forward; repeats='all'",
    ),
}


class Returns2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_line_and_change_nothing(case):
    build, at, options, text = REFUSED[case]
    model = build()
    before = snapshot(model)
    with pytest.raises(InputError, match=text) as caught:
        mmc_fast.apply_ebr(model, at, **{**SMALL, **options})
    assert "\n" not in str(caught.value)
    assert_same(before, snapshot(model))


def test_a_second_head_needs_another_name():
    model = _model()
    mmc_fast.apply_ebr(model, IMAGE, **SMALL)
    with pytest.raises(InputError, match="has a head named 'ebr' already; restore"):
        mmc_fast.apply_ebr(model, {"text": "encoders.text"}, **SMALL)


def test_wrapped_models_are_refused():
    for wrapped in (torch.compile(_model()), nn.DataParallel(_model()), torch.jit.script(nn.Linear(2, 2)), "model"):
        with pytest.raises(TypeError, match="apply_ebr: model is"):
            mmc_fast.apply_ebr(wrapped, IMAGE, **SMALL)
    model = _model()
    model.compile()
    with pytest.raises(TypeError, match="compiled or wrapped already"):
        mmc_fast.apply_ebr(model, IMAGE, **SMALL)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (torch.ones(4, 2), "torch.float32"),
        (torch.ones(4, 3, dtype=torch.bool), r"give torch.bool \[B, 2\]"),
        ({"imag": torch.ones(4, dtype=torch.bool)}, "Did you mean 'image'"),
        ({"image": torch.ones(4)}, "torch.bool tensor"),
        ({"image": torch.ones(5, dtype=torch.bool)}, r"has shape \[5\]; its rows are \[4\]"),
        ([True, False], "got list"),
    ],
)
def test_masks_that_do_not_fit(mask, text):
    model = _model()
    handle = mmc_fast.apply_ebr(model, IMAGE | {"text": "encoders.text"}, **SMALL)
    x = {"image": torch.zeros(4, 3), "text": torch.zeros(4, 2)}
    with pytest.raises(InputError, match=text), handle.present(mask):
        model(**x)
    model(**x)
    with pytest.raises(InputError, match="normalizer"):
        handle.losses(normalizer=3)
    model.eval()
    with pytest.raises(InputError, match=r"source is torch.int64 \[4\]"):
        handle.predict(**x, present=torch.ones(4, 2, dtype=torch.bool), source=torch.zeros(4, dtype=torch.int64))
