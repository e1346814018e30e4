"""``ModelAdapter``: features, fusion and logits of a model by the names of its modules, without a change of the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mmc_fast
from mmc_fast import ModelAdapter
from mmc_fast.diagnose.adapter import beyond_features, prove
from mmc_fast.diagnose.features import check_rows, fingerprint_of
from mmc_fast.errors import InputError
from mmc_fast.integrations import Site


class Concat(nn.Module):
    """Encoders, features side by side, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({"image": nn.Linear(5, 6), "audio": nn.Sequential(nn.Linear(3, 4), nn.Tanh())})
        self.norm = nn.BatchNorm1d(10)
        self.classifier = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 3))

    def features(self, image: Tensor, audio: Tensor) -> Tensor:
        return torch.cat([self.encoders["image"](image), self.encoders["audio"](audio)], 1)

    def forward(self, image: Tensor, audio: Tensor) -> Tensor:
        return self.classifier(self.features(image, audio))


class Normed(Concat):
    def forward(self, image: Tensor, audio: Tensor) -> Tensor:
        return self.classifier(self.norm(self.features(image, audio)))


class Twice(Concat):
    def forward(self, image: Tensor, audio: Tensor) -> Tensor:
        self.encoders["image"](image)
        return super().forward(image, audio)


class Named(Concat):
    """A dictionary of tensors out of one module, tokens first."""

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 6)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.layer(x)
            return {"tokens": torch.stack([y, 2 * y]), "pooled": y}  # [T, B, d]

    def __init__(self) -> None:
        super().__init__()
        self.tower = Named.Tower()

    def forward(self, image: Tensor, audio: Tensor) -> Tensor:
        tokens = self.tower(image)["tokens"]
        return self.classifier(torch.cat([tokens.sum(0), self.encoders["audio"](audio)], 1))


NAMES = {"image": "encoders.image", "audio": "encoders.audio"}


def model(kind: type[nn.Module], generator: torch.Generator) -> nn.Module:
    made = kind()
    for p in made.parameters():
        p.data.normal_(generator=generator)
    return made.eval()


def batches(generator: torch.Generator, count: int = 4) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [
        (
            torch.randn(80, 5, generator=generator),
            torch.randn(80, 3, generator=generator),
            torch.randint(3, (80,), generator=generator),
        )
        for _ in range(count)
    ]


def test_by_names_is_the_same_as_by_hand(generator: torch.Generator) -> None:
    m, loader = model(Concat, generator), batches(generator)
    state = {k: v.clone() for k, v in m.state_dict().items()}

    class ByHand:
        head = m.classifier

        def encode(self, batch):
            return {"image": m.encoders["image"](batch[0]).detach(), "audio": m.encoders["audio"](batch[1]).detach()}

        def fuse(self, features):
            return m.classifier(torch.cat(list(features.values()), 1))

        def forward(self, batch):
            return m(*batch[:2])

        def inputs(self, batch):
            return {"image": batch[0], "audio": batch[1]}

    named = mmc_fast.diagnose(ModelAdapter(m, NAMES, head="classifier"), loader)
    by_hand = mmc_fast.diagnose(ByHand(), loader)
    assert named == by_hand
    assert named.settings["agop"].startswith("co-activation")
    assert all(torch.equal(state[k], v) for k, v in m.state_dict().items())
    assert not any(x._forward_hooks or x._forward_pre_hooks or "forward" in x.__dict__ for x in m.modules())


def test_features_are_replaced_inside_of_the_model(generator: torch.Generator) -> None:
    m, loader = model(Normed, generator), batches(generator)
    adapter = ModelAdapter(m, NAMES)
    features = adapter.encode(loader[0])
    torch.testing.assert_close(adapter.fuse(features), m(*loader[0][:2]))
    other = {"image": torch.randn(80, 6), "audio": features["audio"]}
    expected = m.classifier(m.norm(torch.cat(list(other.values()), 1)))
    torch.testing.assert_close(adapter.fuse(other), expected)
    ran: list[int] = []
    hook = m.encoders["image"].register_forward_pre_hook(lambda *a: ran.append(1))
    m.encoders["audio"][0].register_forward_pre_hook(lambda *a: ran.append(2))
    adapter.fuse(other)
    assert 2 not in ran, "the inside of a replaced module does not run"
    hook.remove()
    d = mmc_fast.diagnose(adapter, loader, resamples=0, probes=False)
    assert d.settings["agop"] == "vector-Jacobian products"  # the norm stands between features and head


def test_sites_and_tokens(generator: torch.Generator) -> None:
    m, loader = model(Named, generator), batches(generator)
    site = Site("tower", output="tokens", batch_dim=1)
    adapter = ModelAdapter(m, {"image": site, "audio": "encoders.audio"}, head="classifier")
    features = adapter.encode(loader[0])
    assert features["image"].shape == (80, 2, 6)
    torch.testing.assert_close(adapter.fuse(features), m(*loader[0][:2]))
    torch.testing.assert_close(adapter.represent(features), torch.cat([features["image"].sum(1), features["audio"]], 1))
    d = mmc_fast.diagnose(adapter, loader, resamples=0, probes=False)
    assert d.modalities == {"image": 12, "audio": 4}
    fused = mmc_fast.diagnose(
        ModelAdapter(m, {"image": site, "audio": "encoders.audio"}, fused="classifier.0"),
        loader,
        resamples=0,
        probes=False,
    )
    assert len(fused.arrays["neuron_shares"]) == 12
    assert np.allclose(np.sum(fused.arrays["neuron_shares"], 1), 1)


def test_how_batches_are_read(generator: torch.Generator) -> None:
    m = model(Concat, generator)
    image, audio, labels = batches(generator, 1)[0]
    tuples = mmc_fast.diagnose(ModelAdapter(m, NAMES), [(image, audio, labels)], resamples=0, probes=False)
    mapping = [{"image": image, "audio": audio, "labels": labels}]
    assert mmc_fast.diagnose(ModelAdapter(m, NAMES), mapping, resamples=0, probes=False) == tuples
    custom = ModelAdapter(m, NAMES, call=lambda model, b: model(b["x"], b["y"]), labels=lambda b: b["truth"])
    given = [{"x": image, "y": audio, "truth": labels}]
    assert mmc_fast.diagnose(custom, given, resamples=0, probes=False) == tuples


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            Concat,
            {"features": {"image": "encoder.image"}},
            r"no module 'encoder\.image'; the nearest are encoders\.image",
        ),
        (Concat, {"features": NAMES, "head": "clasifier"}, "nearest are classifier"),
        (Concat, {"features": {}}, "features is empty"),
        (Concat, {"features": {"a": "encoders.image", "b": "encoders.image"}}, "two modalities name one module"),
        (Twice, {"features": NAMES}, "ran 2 times"),
        (Concat, {"features": {"image": "norm"}}, "ran 0 times"),
        (
            Twice,
            {"features": {"audio": "encoders.audio"}, "head": "encoders.image"},
            "head ran 2 times in one forward; name",
        ),
        (
            Named,
            {"features": {"image": "tower"}},
            "ModelAdapter: tower is dict, not a tensor; tensors are at: 'tokens'",
        ),
        (Concat, {"features": NAMES, "call": lambda m, b: m(b[0])}, r"the forward failed \(TypeError"),
        (Concat, {"features": NAMES, "call": lambda m, b: m.encoders["image"](b[0])}, "ran 0 times"),
        (
            Concat,
            {"features": NAMES, "call": lambda m, b: m(*b[:2])[None]},
            r"the logits are \[1, 80, 3\]; name the module",
        ),
        (Concat, {"features": NAMES, "call": lambda m, b: [m(*b[:2])]}, "the logits are list; name the module"),
    ],
)
def test_what_is_wrong_is_explained(kind, options, message: str, generator: torch.Generator) -> None:
    m, loader = model(kind, generator), batches(generator)
    with pytest.raises(InputError, match=message) as caught:
        mmc_fast.diagnose(ModelAdapter(m, **options), loader)
    assert "\n" not in str(caught.value)
    assert not any(x._forward_hooks or "forward" in x.__dict__ for x in m.modules())


def test_training_mode_and_misuse(generator: torch.Generator) -> None:
    m, loader = model(Normed, generator), batches(generator)
    before = m.norm.running_mean.clone()
    with pytest.raises(InputError, match=r"norm.*model\.eval\(\)"):
        mmc_fast.diagnose(ModelAdapter(m.train(), NAMES), loader)
    assert torch.equal(before, m.norm.running_mean)
    adapter = ModelAdapter(m.eval(), NAMES)
    with pytest.raises(RuntimeError, match="encode"):
        adapter.fuse({"image": torch.ones(2, 6), "audio": torch.ones(2, 4)})
    adapter.encode(loader[0])
    with pytest.raises(InputError, match="those of encode"):
        adapter.fuse({"image": torch.ones(2, 6)})
    with pytest.raises(TypeError, match=r"nn\.Module"):
        ModelAdapter(3, NAMES)


# ---- the adapter proves itself


class InPlace(Concat):
    """Works in place on what the encoders gave, and on the logits."""

    def forward(self, image: Tensor, audio: Tensor) -> Tensor:
        a, b = self.encoders["image"](image), self.encoders["audio"](audio)
        a.add_(1.0)
        torch.relu_(b)
        return self.classifier(torch.cat([a, b], 1)).mul_(2.0)


class Shared(nn.Module):
    """One encoder for two modalities."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.classifier = nn.Linear(5, 6), nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.classifier(torch.cat([self.tower(left), self.tower(right)], 1))


class Optional(Concat):
    """Without a modality its features are zeros; rows that are NaN count as absent."""

    def forward(self, image: Tensor | None, audio: Tensor | None) -> Tensor:
        rows = len(image if image is not None else audio)
        a = torch.zeros(rows, 6) if image is None else self.encoders["image"](image).nan_to_num(0.0)
        b = torch.zeros(rows, 4) if audio is None else self.encoders["audio"](audio).nan_to_num(0.0)
        return self.classifier(torch.cat([a, b], 1))


def test_hooks_that_change_outputs_are_part_of_the_model(generator: torch.Generator) -> None:
    """Heads of apply_ebr: encode sees what they recovered, and fuse does not send it through them again."""
    m, loader = model(Concat, generator), batches(generator)
    mmc_fast.apply_ebr(m, NAMES, latent_dim=4, hidden_dim=8, psi_dims=(4,), seed=0)
    adapter = ModelAdapter(m, NAMES, head="classifier")
    torch.testing.assert_close(adapter.forward(loader[0]), m(*loader[0][:2]), rtol=0, atol=0)
    features = adapter.encode(loader[0])
    torch.testing.assert_close(adapter.fuse(features), m(*loader[0][:2]), rtol=0, atol=0)
    plain = m.encoders["image"].forward(loader[0][0])
    assert not torch.allclose(features["image"], plain), "the heads were applied"
    d = mmc_fast.diagnose(adapter, loader, resamples=0, probes=False)
    labels = torch.cat([b[2] for b in loader])
    outputs = torch.cat([m(*b[:2]) for b in loader])
    assert d.value("score.all") == pytest.approx(float((outputs.argmax(1) == labels).double().mean()))
    assert d.settings["adapter"].startswith("fuse(encode(batch)) is the model's output on 80 samples")


def test_in_place_operations_do_not_reach_recorded_features(generator: torch.Generator) -> None:
    m, loader = model(InPlace, generator), batches(generator)
    adapter = ModelAdapter(m, NAMES)
    truth, features = m(*loader[0][:2]), adapter.encode(loader[0])
    torch.testing.assert_close(features["image"], m.encoders["image"](loader[0][0]))
    before = {name: x.clone() for name, x in features.items()}
    for _ in range(2):
        torch.testing.assert_close(adapter.fuse(features), truth, rtol=0, atol=0)
    assert all(torch.equal(before[name], x) for name, x in features.items())
    leaf = {name: x.clone().requires_grad_() for name, x in features.items()}
    adapter.fuse(leaf).sum().backward()
    assert all(float(x.grad.abs().sum()) > 0 for x in leaf.values())
    mmc_fast.diagnose(ModelAdapter(m, NAMES, head="classifier"), loader, resamples=0, probes=False)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda m: nn.DataParallel(torch.compile(m))])
def test_compiled_and_wrapped_models(wrap, generator: torch.Generator) -> None:
    m, loader = model(Concat, generator), batches(generator)
    plain = ModelAdapter(m, NAMES, head="classifier").encode(loader[0])
    wrapped = wrap(m)
    prefix = next(n for n, x in wrapped.named_modules() if x is m.classifier).removesuffix("classifier")
    for name in ("classifier", prefix + "classifier"):
        adapter = ModelAdapter(wrapped, NAMES, head=name)
        torch.testing.assert_close(adapter.fuse(adapter.encode(loader[0])), m(*loader[0][:2]))
        torch.testing.assert_close(adapter.encode(loader[0]), plain)


def test_a_model_compiled_in_place(generator: torch.Generator) -> None:
    m, loader = model(Concat, generator), batches(generator)
    truth = m(*loader[0][:2])
    m.encoders["image"].compile()
    m.compile()
    adapter = ModelAdapter(m, NAMES, head="classifier")
    torch.testing.assert_close(adapter.fuse(adapter.encode(loader[0])), truth)


def test_one_encoder_for_two_modalities(generator: torch.Generator) -> None:
    m = model(Shared, generator)
    left, right = torch.randn(40, 5, generator=generator), torch.randn(40, 5, generator=generator)
    adapter = ModelAdapter(m, {"left": ("tower", 0), "right": ("tower", 1)}, head="classifier")
    features = adapter.encode((left, right, None))
    torch.testing.assert_close(features, {"left": m.tower(left), "right": m.tower(right)})
    swapped = {"left": features["left"], "right": features["right"].roll(1, 0)}
    torch.testing.assert_close(adapter.fuse(swapped), m(left, right.roll(1, 0)))
    one = ModelAdapter(m, {"right": ("tower", 1)})
    torch.testing.assert_close(one.encode((left, right, None))["right"], m.tower(right))
    torch.testing.assert_close(one.fuse({"right": features["right"].roll(1, 0)}), m(left, right.roll(1, 0)))
    with pytest.raises(InputError, match="ran 2 times in one forward; there is no run 2"):
        ModelAdapter(m, {"left": ("tower", 2)}).encode((left, right, None))
    with pytest.raises(InputError, match=r"two modalities name one module.*\('encoder', 0\)"):
        ModelAdapter(m, {"left": "tower", "right": ("tower", 1)})

    again = ModelAdapter(m, {"left": Site("tower", call=0), "right": Site("tower", call=1)})
    torch.testing.assert_close(again.encode((left, right, None)), features)


@pytest.mark.parametrize("behind", ["encoders.audio.1", "encoders.audio", "classifier.0"])
def test_features_that_hide_others_are_refused(behind: str, generator: torch.Generator) -> None:
    m, loader = model(Concat, generator), batches(generator)
    message = rf"'{behind}' lies inside or behind 'encoders.audio.0', so other changes with audio"
    with pytest.raises(InputError, match="lies inside or behind"):
        mmc_fast.diagnose(ModelAdapter(m, {"other": behind, "audio": "encoders.audio.0"}), loader)
    ModelAdapter(m, {"image": "encoders.image", "audio": "encoders.audio.0"}).check_order(loader[0])
    with pytest.raises(InputError, match=message) as caught:
        mmc_fast.diagnose(ModelAdapter(m, {"audio": "encoders.audio.0", "other": behind}), loader)
    assert "\n" not in str(caught.value)


def test_scripted_modules_are_refused(generator: torch.Generator) -> None:
    with pytest.raises(InputError, match=r"'encoders\.image' is scripted or traced"):
        ModelAdapter(torch.jit.trace(model(Concat, generator), batches(generator)[0][:2]), NAMES)


def test_what_the_encoders_receive(generator: torch.Generator) -> None:
    """Sequences too, as long as the first; not what has other rows than the samples."""

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean, self.flat, self.head = Mean(), Flat(), nn.Linear(7, 3)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(torch.cat([self.mean(a), self.flat(b.flatten(0, 1))], 1))}

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1)

    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, 2)).mean(1)

    a, b = torch.randn(40, 6, 4, generator=generator), torch.randn(40, 2, 3, generator=generator)
    model = Frames().eval()
    adapter = ModelAdapter(model, {"a": "mean", "b": "flat"})
    for given, kept in ((a, a), (a[:, :5], nn.functional.pad(a[:, :5], (0, 0, 0, 1))), (torch.cat([a, a], 1), a)):
        received = adapter.inputs((given, b, None))
        assert list(received) == ["a"]
        assert torch.equal(received["a"], kept)
    torch.testing.assert_close(adapter.forward((a, b, None)), model(a, b)["logits"])

    class Pictures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.picture, self.film, self.code, self.head = Mean(), Mean(), nn.Embedding(9, 4), nn.Linear(12, 3)

        def forward(self, p: Tensor, f: Tensor, c: Tensor) -> Tensor:
            return self.head(
                torch.cat([self.picture(p).mean(1), self.film(f).flatten(2).mean(1)[:, :4], self.code(c).mean(1)], 1)
            )

    p, f = torch.randn(8, 2, 5, 4, generator=generator), torch.randn(8, 2, 3, 2, 2, generator=generator)
    batch = (p, f, torch.arange(8)[:, None], None)
    received = ModelAdapter(Pictures().eval(), {"p": "picture", "f": "film", "c": "code"}).inputs(batch)
    assert list(received) == ["p"], "neither films nor codes"
    assert torch.equal(received["p"], p)


def test_modalities_that_are_absent(generator: torch.Generator) -> None:
    """For a whole batch (None) and for some rows (NaN): fuse gives there what the model gives, whatever stands in."""
    m = model(Optional, generator)
    image, audio, labels = batches(generator, 1)[0]
    holes = audio.clone()
    holes[::3] = torch.nan
    adapter = ModelAdapter(m, NAMES)
    for batch in ((image, holes, labels), (image, None, labels)):
        features, truth = adapter.encode(batch), m(*batch[:2])
        received = adapter.inputs(batch)
        assert torch.equal(received["image"], image)
        expected = torch.zeros(80, 3) if batch[1] is None else batch[1].nan_to_num()
        assert torch.equal(received["audio"], expected)
        assert features["audio"].shape == (80, 4)
        torch.testing.assert_close(adapter.fuse(features), truth)
        absent = torch.arange(80) % 3 == 0 if batch[1] is holes else torch.ones(80, dtype=torch.bool)
        moved = adapter.fuse({"image": features["image"], "audio": features["audio"] + 5})
        torch.testing.assert_close(moved[absent], truth[absent])
    torch.testing.assert_close(adapter.encode((image, holes, labels))["audio"][0], m.encoders["audio"](audio)[
        torch.arange(80) % 3 != 0].mean(0))  # fmt: skip
    mmc_fast.diagnose(adapter, [(image, holes, labels), (image, None, labels)], resamples=0, probes=False)
    with pytest.raises(InputError, match="a batch that has it must come first"):
        ModelAdapter(m, NAMES).encode((image, None, labels))


def test_own_handling_of_absent_modalities(generator: torch.Generator) -> None:
    m = model(Optional, generator)
    image, audio, labels = batches(generator, 1)[0]

    def absent(batch, present):
        parts = [x.masked_fill(~present[:, i, None], torch.nan) for i, x in enumerate(batch[:2])]
        return (*parts, batch[2])

    adapter = ModelAdapter(m, NAMES, absent=absent)
    features = adapter.encode((image, audio, labels))
    torch.testing.assert_close(adapter.fuse(features), m(image, audio))
    only_image = torch.tensor([True, False]).expand(80, 2)
    torch.testing.assert_close(adapter.fuse(features, only_image), m(image, None))
    torch.testing.assert_close(adapter.fuse(features), m(image, audio), rtol=0, atol=0)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_under_no_grad(context, generator: torch.Generator) -> None:
    m, loader = model(Normed, generator), batches(generator)
    expected = mmc_fast.diagnose(ModelAdapter(m, NAMES), loader, resamples=0, probes=False)
    with context():
        assert mmc_fast.diagnose(ModelAdapter(m, NAMES), loader, resamples=0, probes=False) == expected


class Noisy(Concat):
    def forward(self, image: Tensor, audio: Tensor) -> Tensor:
        return self.classifier(nn.functional.dropout(self.features(image, audio), 0.5, training=True))


class Aside(Concat):
    """The encoder also sets a scale, which the model resets first: nothing that an output of a module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def forward(self, image: Tensor, audio: Tensor) -> Tensor:
        self.scale = 1.0
        hook = self.encoders["audio"][0].register_forward_hook(lambda *a: setattr(self, "scale", 3.0))
        y = self.classifier(self.features(image, audio) * self.scale)
        hook.remove()
        return y


def test_an_adapter_that_is_not_the_model_is_refused(generator: torch.Generator) -> None:
    loader = batches(generator)

    class Wrong:
        m = model(Concat, generator)

        def encode(self, batch):
            return {"image": self.m.encoders["image"](batch[0]).detach(), "audio": batch[1]}

        def fuse(self, features):
            return features["image"][:, :3]

        def forward(self, batch):
            return self.m(*batch[:2])

    with pytest.raises(InputError, match=r"is not what the model gives: .* check that fuse\(\)") as caught:
        mmc_fast.diagnose(Wrong(), loader)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"'classifier.*' gives another output for the same batch: it is random"):
        mmc_fast.diagnose(ModelAdapter(model(Noisy, generator), NAMES), loader)
    aside = ModelAdapter(model(Aside, generator), NAMES)
    with pytest.raises(InputError, match=r"'classifier.*' is the first module whose output differs"):
        mmc_fast.diagnose(aside, loader)


class Plain:
    """Features are the batch; what the model gives on top of them is added at will."""

    def __init__(self, forward=None, fuse=None) -> None:
        self.fuse = fuse or (lambda features: features["x"])
        if forward is not None:
            self.forward = forward

    def encode(self, batch: Tensor) -> dict[str, Tensor]:
        return {"x": batch}


@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)],
)
def test_how_far_an_adapter_may_be_from_the_model(dtype: torch.dtype, allowed: float) -> None:
    x = torch.tensor([[-4.0, 0.0], [1.0, 2.0]], dtype=dtype)

    def apart(by: float) -> Plain:
        return Plain(lambda batch: batch + torch.tensor([[0.0, 4 * by], [0.0, 0.0]], dtype=dtype))

    assert "on 2 samples" in prove(apart(0.9 * allowed), x)
    with pytest.raises(InputError, match="apart where logits reach 4"):
        prove(apart(1.1 * allowed), x)
    for wrong in (lambda batch: batch[:1], lambda batch: None):
        with pytest.raises(InputError, match="both must be the logits"):
            prove(Plain(wrong), x)
    assert prove(Plain(), x).startswith("not compared")


def test_rows_that_depend_on_each_other_a_little(generator: torch.Generator) -> None:
    """Allowed is a ten-thousandth of the largest logit."""
    x = torch.randn(8, 3, generator=generator).clamp(-0.9, 0.9)
    x[0], x[3, 0] = 0.0, 1.0
    for leak, refused in ((1.1e-4, True), (0.9e-4, False)):
        model = Plain(fuse=lambda f, leak=leak: f["x"] + leak * f["x"].sum(0) * torch.tensor([0.0, 1.0, 0.0]))
        if refused:
            for rows in (x, x[[0, 3]]):
                with pytest.raises(InputError, match="logits of other rows moved"):
                    check_rows(model, {"x": rows}, model.fuse({"x": rows}))
        else:
            check_rows(model, {"x": x}, model.fuse({"x": x}))
    check_rows(Plain(fuse=lambda f: f["x"] / 0), {"x": x[:1]}, x[:1])
    check_rows(Plain(fuse=lambda f: f["x"] * 0), {"x": x}, x)


def test_features_are_known_again_by_numbers_names_and_shapes(generator: torch.Generator) -> None:
    x, y = torch.randn(2, 4, 6, generator=generator)
    assert fingerprint_of({"a": x, "b": y}) == fingerprint_of({"a": x.clone(), "b": y.double()})
    other = [
        {"b": x, "a": y},
        {"a": y, "b": x},
        {"a": x.view(4, 2, 3), "b": y},
        {"a": x, "b": y.nextafter(x)},
        {"a": x},
    ]
    assert len({fingerprint_of(f) for f in [{"a": x, "b": y}, *other]}) == 6


def test_share_of_the_outputs_beyond_the_features(generator: torch.Generator) -> None:
    """y = x + z with z of the batch alone: twice the variance of z over that of y, for rows without order."""
    x, z = torch.randn(2, 5000, 2, generator=generator)
    for size in (0.0, 0.5):
        found = beyond_features({"x": x}, x + size * z, Plain(fuse=lambda f, size=size: f["x"] + size * z))
        assert found == pytest.approx(2 * size**2 / (1 + size**2), rel=0.1, abs=1e-9)
    assert beyond_features({"x": x * 0}, x * 0, Plain()) == 0


def test_what_goes_past_the_features_is_told(generator: torch.Generator) -> None:
    m, loader = model(Concat, generator), batches(generator)
    d = mmc_fast.diagnose(ModelAdapter(m, {"image": "encoders.image"}), loader, resamples=0, probes=False)
    assert any("follows the batch and not the named features" in note for note in d.notes)
    whole = mmc_fast.diagnose(ModelAdapter(m, NAMES), loader, resamples=0, probes=False)
    assert not any("follows the batch" in note for note in whole.notes)
