"""Foreign models for the tests of apply_ebr, and small tools to compare them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AT = {"a": "a", "b": "b"}
ONE, OWN = "one call for all heads", "a call of its own"
SMALL = {"latent_dim": 6, "hidden_dim": 9, "psi_dims": (7,)}


class Towers(nn.Module):
    """Encoders called in the reverse of the order in which they are registered, then concatenation."""

    def __init__(self, inputs: dict[str, int], widths: dict[str, int], dropout: float = 0.0) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(
            {n: nn.Sequential(nn.Linear(inputs[n], widths[n]), nn.Tanh(), nn.Dropout(dropout)) for n in inputs}
        )
        self.fusion = nn.Linear(sum(widths.values()), 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, **x: Tensor) -> Tensor:
        z = {name: self.encoders[name](x[name]) for name in reversed(list(x))}
        return self.fusion(torch.cat([z[name] for name in x], dim=-1))


class Pair(nn.Module):
    """Two encoders of any kind, ``image`` and ``text``; returns what they give."""

    def __init__(self, image: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.image, self.text = image, text

    def forward(self, image: Tensor, text: Tensor) -> tuple:
        return self.image(image), self.text(text)


class Returns(nn.Module):
    """A module that returns whatever ``make`` builds from its input."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor):
        return self.make(x)


def draw_towers(generator: torch.Generator, m: int | None = None, **kw) -> tuple[Towers, dict[str, Tensor]]:
    """A float64 model of 1 to 5 modalities with drawn widths and weights, and a batch for it."""

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    m = pick(1, 5) if m is None else m
    names = [f"mod{i}" for i in range(m)]
    inputs, widths = {n: pick(1, 6) for n in names}, {n: pick(1, 8) for n in names}
    model = Towers(inputs, widths, **kw).double()
    randomise(model, generator)
    batch = pick(2, 9)
    x = {n: torch.randn(batch, d, generator=generator, dtype=torch.float64) for n, d in inputs.items()}
    return model, x


@torch.no_grad()
def randomise(module: nn.Module, generator: torch.Generator) -> None:
    for p in module.parameters():
        p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=torch.float64))


def sites(model: Towers) -> dict[str, str]:
    return {name: f"encoders.{name}" for name in model.encoders}


def snapshot(model: nn.Module) -> dict:
    """Everything about a model that apply_ebr could leave changed."""
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "keys": list(model.state_dict()),
        "modules": [n for n, _ in model.named_modules()],
        "modes": [m.training for m in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_always_called))
            for m in model.modules()
        ],
        "random": torch.get_rng_state(),
        "attributes": [sorted(m.__dict__) for m in model.modules()],
    }


def assert_same(before: dict, after: dict) -> None:
    for key in ("keys", "modules", "modes", "hooks", "attributes"):
        assert before[key] == after[key], key
    assert torch.equal(before["random"], after["random"]), "random generator"
    for name, value in before["state"].items():
        assert torch.equal(value, after["state"][name]), name


def total(logits: Tensor, md: Tensor, rec: Tensor) -> Tensor:
    """A loss in which every output of a forward has a part of its own."""
    return logits.square().sum() + 1.3 * md + 0.7 * rec


class Two(nn.Module):
    """Two linear encoders ``a`` and ``b``, concatenation, a classifier ``c``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(7, 8), nn.Linear(5, 8), nn.Linear(16, 3)

    def join(self, a: Tensor, b: Tensor) -> Tensor:
        return self.c(torch.cat([a, b], -1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.join(self.a(x), self.b(y))


def two_inputs(generator: torch.Generator, *rows: int) -> tuple[Tensor, Tensor]:
    rows = rows or (8,)
    return torch.randn(*rows, 7, generator=generator), torch.randn(*rows, 5, generator=generator)


class Early(Two):
    def forward(self, x, y):
        return self.join(self.a(x).tanh(), self.b(y))


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def by_hand(
    model: Two, handle, x, present: Tensor | None = None, features=None, join=None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output and both losses by EBRHead on the features, and what the model does to what it gets."""
    z = features or {"a": linear(model.a, x[0]), "b": linear(model.b, x[1])}
    out = handle.head({name: f.flatten(0, -2) for name, f in z.items()}, present, reversal=handle.reversal)
    recovered = [r.reshape(f.shape) for r, f in zip(out.recovered.values(), z.values(), strict=True)]
    joined = linear(model.c, torch.cat(join(*recovered) if join else recovered, -1))
    return joined, out.discrimination_loss, out.reconstruction_loss


def check(model: Two, handle, x, after=None, way: str | None = ONE, features=None) -> None:
    """Outputs, losses and gradients are those :func:`by_hand`; ``after``: what the model does to what it gets."""
    model.zero_grad()
    got = (model(*x), *handle.losses())
    total(*got).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    right = by_hand(model, handle, x, features=features() if features else None, join=after)
    torch.testing.assert_close(got, right)
    total(*right).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, msg=lambda text, name=name: f"{name}: {text}")
    if way:
        assert all(way in line for line in handle.explain().splitlines()[1:]), handle.explain()
