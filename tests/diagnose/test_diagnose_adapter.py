"""``ModelAdapter``: features, fusion and logits of a model by the names of its modules, without a change of the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mmc_fast
from mmc_fast import ModelAdapter
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
            Named,
            {"features": {"image": "tower"}},
            "ModelAdapter: tower is dict, not a tensor; tensors are at: 'tokens'",
        ),
        (Concat, {"features": NAMES, "call": lambda m, b: m(b[0])}, r"the forward failed \(TypeError"),
        (Concat, {"features": NAMES, "call": lambda m, b: m.encoders["image"](b[0])}, "ran 0 times"),
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
