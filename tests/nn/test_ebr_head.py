"""``EBRHead`` as a layer: names, weights of plain layers, sizes; and the published readings of ``EBRConfig``."""

from __future__ import annotations

import copy
import inspect
from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmc_fast.agop import AGOPAccumulator, agop
from mmc_fast.functional import ebr_step, grad_reverse
from mmc_fast.integrations import apply_ebr
from mmc_fast.nn import EBRConfig, EBRHead


def test_mapping_in_mapping_out_and_none_for_an_absent_modality():
    head = EBRHead({"image": 3, "text": 2}, 4, 5, (6,))
    x = torch.randn(5, 3)
    source = torch.zeros(5, 2, dtype=torch.long)
    out = head({"text": None, "image": x}, source=source)
    assert list(out.recovered) == ["image", "text"]
    present = torch.tensor([[True, False]]).expand(5, 2)
    same = head([x, torch.full((5, 2), float("nan"))], present, source)
    for a, b in zip(out.recovered.values(), same.recovered, strict=True):
        assert torch.equal(a, b)
    assert out.recovered["text"].abs().sum() > 0  # decoded from the image's latent
    with pytest.raises(ValueError, match="expected \\['image', 'text'\\]"):
        head({"image": x})


def test_plain_layers_load_into_the_head_and_back(tmp_path):
    plain = nn.ModuleDict(
        {
            "encoders": nn.ModuleList(nn.Sequential(nn.Linear(d, 5), nn.ReLU(), nn.Linear(5, 4)) for d in (3, 2)),
            "decoders": nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, d)) for d in (3, 2)),
            "discriminator": nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)),
        }
    )
    head = EBRHead([3, 2], 4, 5, (6,))
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    head.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=True)
    x = [torch.randn(7, 3), torch.randn(7, 2)]
    out = head(x)
    for i in range(2):
        g = plain["encoders"][i](x[i])
        torch.testing.assert_close(out.latents[i], g)
        torch.testing.assert_close(out.recovered[i], plain["decoders"][i](g))
    plain.load_state_dict(head.state_dict(), strict=True)


def test_published_readings():
    paper, slides = EBRConfig.paper(), EBRConfig.slides()
    assert (paper.hidden_dim, paper.latent_dim, paper.psi_dims) == (1024, 512, (512, 256))
    assert (paper.schedule, paper.reconstruction, paper.reversal) == ("interleave", 0.0, 1.0)
    assert slides.reconstruction > 0
    assert EBRConfig.paper(hidden_dim=128).hidden_dim == 128
    for bad in ({"reversal": -1.0}, {"reversal": float("nan")}, {"schedule": "both"}, {"patience": 0}):
        with pytest.raises(ValueError, match="ebr"):
            EBRConfig(**bad)


def test_sizes_that_cannot_be_are_named():
    for bad, told in (
        ({"dims": []}, "dims is empty"), ({"dims": [3, 0]}, r"dims\[1\] is 0"), ({"dims": [3], "latent_dim": 0}, "latent_dim is 0"),
        ({"dims": [3], "hidden_dim": 0}, "hidden_dim is 0"), ({"dims": [3], "psi_dims": (4, 0)}, r"psi_dims\[1\] is 0"),
        ({"dims": {"a.b": 3}}, "named 'a.b'; give a word without dots"), ({"dims": {"": 3}}, "named ''"), ({"dims": {3: 3}}, "named 3"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"EBRHead: .*{told}"):
            EBRHead(**bad)
    EBRHead([1], 1, 1, (1,))
    for features, told in (
        ({"a": torch.ones(2, 3)}, "features is a mapping but dims was a sequence"),
        ([[1.0, 2.0, 3.0]], "features of 0 are list; give a tensor"),
    ):
        with pytest.raises(ValueError, match=f"EBRHead: {told}"):
            EBRHead([3], 4, 5, (6,))(features)


def test_meta_device():
    """Sizes without values: no kernel runs, and shapes come out as anywhere else."""
    with torch.device("meta"):
        head = EBRHead({"a": 8, "b": 6}, latent_dim=5, hidden_dim=16, psi_dims=(7,))
        out = head({"a": torch.empty(4, 8), "b": torch.empty(4, 6)})
    out.discrimination_loss.backward()
    assert [tuple(r.shape) for r in out.recovered.values()] == [(4, 8), (4, 6)]
    assert out.latents.shape == (2, 4, 5)
    assert out.latents.is_meta
    assert head.encoders[0][0].weight.grad.shape == (16, 8)


@pytest.mark.parametrize("backend", ["eager", "reference", "by modules"])
@pytest.mark.parametrize("source", [torch.zeros(4, 2, dtype=torch.long), torch.ones(4, 2, 2), None])
def test_nothing_is_made_on_another_device(backend, source):
    """On a device without values a tensor that were made on the CPU would not fit."""
    with torch.device("meta"):
        head = EBRHead([8, 6], 5, 16, (7,), residual=True, normalize=True)
    head.backend = backend if backend != "by modules" else "auto"
    if backend == "by modules":
        head.encoders[0].register_forward_hook(lambda module, inputs, output: None)
    present, source = torch.ones(4, 2, dtype=torch.bool), None if source is None else source.to("meta")
    for given in ({}, {"present": present.to("meta"), "normalizer": torch.ones(2, device="meta")}):
        x = [torch.empty(4, 8, device="meta"), None if given else torch.empty(4, 6, device="meta")]
        out = head(x, source=source, **given)
        sum(t.sum() for t in (*out.recovered, *out[1:])).backward()
        assert all(t.is_meta for t in (*out.recovered, *out[1:]))


def called(head: EBRHead, x: list[torch.Tensor], **arguments) -> list[torch.Tensor]:
    """Outputs of a step and the gradients of parameters and features."""
    inputs = [None if f is None else f.clone().requires_grad_() for f in x]
    out = head(inputs, **arguments)
    wanted = [p for p in (*inputs, *head.parameters()) if p is not None]
    total = out.discrimination_loss + 0.7 * out.reconstruction_loss + sum(r.square().sum() for r in out.recovered)
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(wanted, grads, strict=True)]
    return [*out.recovered, out.latents, out.discrimination_loss, out.reconstruction_loss, *zeros]


@pytest.mark.parametrize(("residual", "normalize"), [(False, False), (True, True)])
@pytest.mark.parametrize("source", ["own", "index", "weights"])
def test_layers_one_after_another_give_what_the_step_gives(source, residual, normalize, generator):
    """A hook on a layer keeps it out of the op. With absent rows that hold NaN, an absent modality, every normaliser."""
    head = EBRHead([3, 2, 4], 4, 5, (6,), residual=residual, normalize=normalize, backend="reference").double()
    hooked = copy.deepcopy(head)
    hooked.decoders[1][0].register_forward_hook(lambda module, inputs, output: output)
    x = [torch.randn(9, d, generator=generator, dtype=torch.float64) for d in (3, 2, 4)]
    present = torch.rand(9, 3, generator=generator) < 0.6
    present[0] = False
    x = [torch.where(present[:, i, None], f, torch.nan) for i, f in enumerate(x)]
    sources = {
        "own": None,
        "index": torch.randint(-1, 3, (9, 3), generator=generator),
        "weights": torch.rand(9, 3, 3, generator=generator, dtype=torch.float64).round(decimals=1),
    }
    for normalizer in (None, torch.tensor([7.0]).double(), torch.tensor([7.0, 5.0]).double()):
        for rows in (x, [x[0], None, x[2]]):
            given = {"present": present, "source": sources[source], "reversal": 0.3, "normalizer": normalizer}
            for a, b in zip(called(hooked, rows, **given), called(head, rows, **given), strict=True):
                torch.testing.assert_close(a, b)


def test_a_weight_that_is_no_parameter_is_used(generator):
    """As adapters leave it that compute a layer's weight before each call."""
    head = EBRHead([3, 2], 4, 5, (6,))
    changed, layer = copy.deepcopy(head), head.encoders[0][0]
    changed.encoders[0][0].weight.data += 1
    weight = layer.weight.detach() + 1
    del layer.weight
    layer.weight = weight
    x = [torch.randn(7, d, generator=generator) for d in (3, 2)]
    torch.testing.assert_close(head(x).latents, changed(x).latents)


def test_layers_without_bias(generator):
    head = EBRHead([3, 2], 4, 5, (6,))
    same = copy.deepcopy(head)
    same.encoders[0][0].bias.data.zero_()
    head.encoders[0][0] = nn.Linear(3, 5, bias=False)
    head.encoders[0][0].weight.data.copy_(same.encoders[0][0].weight.data)
    x = [torch.randn(7, d, generator=generator) for d in (3, 2)]
    torch.testing.assert_close(head(x).latents, same(x).latents)


@pytest.mark.parametrize("lambda_", [0.0, 0.3, 2.0])
def test_a_number_and_a_tensor_are_the_same_reversal(lambda_, generator):
    head = EBRHead([3, 2], 4, 5, (6,))
    x = [torch.randn(7, d, generator=generator) for d in (3, 2)]
    for a, b in zip(*(called(head, x, reversal=r) for r in (lambda_, torch.tensor(lambda_))), strict=True):
        assert torch.equal(a, b)


def test_documented_defaults_of_the_published_readings():
    """``EBRConfig`` by its docstrings and docs/guides/ebr.md: sizes of the paper, 10 epochs a phase, the slides' additions."""
    assert EBRConfig() == EBRConfig(
        latent_dim=512, hidden_dim=1024, psi_dims=(512, 256), residual=False, normalize=False, reversal=1.0,
        reconstruction=0.0, schedule="joint", interleave_epochs=10, patience=None,
        cross_recovery=0.0, ranking="reference", substitute="ranked", modalities=None, backend="auto",
    )  # fmt: skip
    assert EBRConfig.paper() == EBRConfig(schedule="interleave")
    assert EBRConfig.slides() == EBRConfig(schedule="interleave", reconstruction=1.0, patience=10)
    robust = {"residual": True, "normalize": True, "reversal": 0.1, "cross_recovery": 0.1, "substitute": "mean"}
    assert EBRConfig.robust() == EBRConfig(**robust)
    for made in (EBRConfig.paper, EBRConfig.slides, EBRConfig.robust):
        assert made(reversal=0.7, schedule="joint") == replace(made(), reversal=0.7, schedule="joint")
    head = EBRHead([3])
    assert (head.latent_dim, head.hidden_dim, tuple(head.psi_dims)) == (512, 1024, (512, 256))
    assert [type(layer) for layer in head.encoders[0]] == [nn.Linear, nn.ReLU, nn.Linear]


def test_what_is_not_given_is_the_documented_default(generator):
    """λ = 1, all present, each from its own latent, neither residual nor normalised: of the head and of the function."""
    head = EBRHead([3, 2], 4, 5, (6,)).double()
    x = [torch.randn(7, d, generator=generator, dtype=torch.float64, requires_grad=True) for d in (3, 2)]
    parts = [[p for layer in part for p in layer.parameters()] for part in (*head.encoders, *head.decoders)]
    g = [encode(f) for encode, f in zip(head.encoders, x, strict=True)]
    logits = head.discriminator(torch.cat(g))
    truth = nn.functional.cross_entropy(logits, torch.arange(2).repeat_interleave(7))
    wanted = torch.autograd.grad(truth, [*x, *head.discriminator.parameters()])
    for out in (head(x), ebr_step(x, parts[:2], parts[2:], list(head.discriminator.parameters()))):
        for i in range(2):
            torch.testing.assert_close(out.recovered[i], head.decoders[i](g[i]))
        torch.testing.assert_close(out.discrimination_loss, truth)
        found = torch.autograd.grad(out.discrimination_loss, [*x, *head.discriminator.parameters()])
        for a, b in zip(found, [-wanted[0], -wanted[1], *wanted[2:]], strict=True):
            torch.testing.assert_close(a, b)
    (reversed_,) = torch.autograd.grad(grad_reverse(x[0]).sum(), x[0])
    assert torch.equal(reversed_, -torch.ones_like(x[0]))


def test_one_default_for_one_name():
    """Whatever takes an option of the step or of AGOP has the documented default: the paper's sizes, λ = 1, exact sums."""
    wanted = {f.name: f.default for f in fields(EBRConfig) if f.name in ("latent_dim", "hidden_dim", "psi_dims")}
    wanted |= {"residual": False, "normalize": False, "backend": "auto", "recompute": False, "reversal": 1.0}
    wanted |= {"present": None, "source": None, "normalizer": None, "layer": 0, "output": "logits", "center": False}
    wanted |= {
        "reduction": "sum",
        "probes": None,
        "precision": None,
        "chunk_size": None,
        "memory_budget": 2**28,
        "seed": 0,
    }
    wanted |= {"blocks": None, "input_cov": False, "dims": None, "example": None, "repeats": "error", "name": "ebr"}
    wanted |= {"dry_run": False, "fusion": None, "one_call": True}
    for function in (ebr_step, grad_reverse, EBRHead, EBRHead.forward, agop, AGOPAccumulator, apply_ebr):
        given = {n: p.default for n, p in inspect.signature(function).parameters.items() if p.default is not p.empty}
        own = {"seed": None} if function is apply_ebr else {}
        assert given == {name: (wanted | own)[name] for name in given}, function.__name__


def test_weights_go_between_heads_with_and_without_names(generator):
    """By order; another head's are refused in one line, whichever option differs."""
    named, listed = EBRHead({"b": 3, "a": 2}, 4, 5, (6,)), EBRHead([3, 2], 4, 5, (6,))
    state = named.state_dict()
    listed.load_state_dict(state)
    x = [torch.randn(7, d, generator=generator) for d in (3, 2)]
    assert torch.equal(listed(x).latents, named(x).latents)
    again = EBRHead({"b": 3, "a": 2}, 4, 5, (6,))
    again.load_state_dict({key: value for key, value in state.items() if "_extra" not in key})  # from elsewhere
    assert torch.equal(again(x).latents, named(x).latents)
    for dims, options, told in (
        ({"a": 2, "b": 3}, {}, "modalities of the weights is .'b', 'a'., of the model .'a', 'b'."),
        ({"b": 3, "a": 2}, {"normalize": True}, "normalize of the weights is False, of the model True"),
        ([3, 2], {"residual": True}, "residual of the weights is False, of the model True"),
    ):
        with pytest.raises(ValueError, match=f"load_state_dict: EBRHead: {told}.*; build the same heads"):
            EBRHead(dims, 4, 5, (6,), **options).load_state_dict(named.state_dict())


def test_features_of_several_dtypes_are_taken_under_autocast_alone(generator):
    head = EBRHead([3, 2, 2], 4, 5, (6,))
    x = [torch.randn(7, d, generator=generator) for d in (3, 2, 2)]
    mixed = [x[0].half(), None, x[2]]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(mixed).latents, head([x[0].half().float(), None, x[2]]).latents)
    with pytest.raises(TypeError, match="cast them to one dtype"):
        head(mixed)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_a_step_tells_what_does_not_fit(backend):
    head, x = EBRHead([3, 2], 4, 5, (6,)), [torch.randn(7, 3), torch.randn(7, 2)]
    parts = [[p for layer in part for p in layer.parameters()] for part in (*head.encoders, *head.decoders)]
    psi = list(head.discriminator.parameters())
    ebr_step(x, parts[:2], parts[2:], psi, backend=backend)
    with pytest.raises(ValueError, match="got 1 decoders for 2 modalities"):
        ebr_step(x, parts[:2], parts[2:3], psi, backend=backend)
    for short in (psi[:2], psi[:1], []):
        with pytest.raises(ValueError, match="the discriminator must end in a layer of 2 outputs"):
            ebr_step(x, parts[:2], parts[2:], short, backend=backend)
    with pytest.raises(TypeError, match=r"features\[1\] is torch.float16 .*cast them to one dtype"):
        ebr_step([x[0], x[1].half()], parts[:2], parts[2:], psi, backend=backend)
    with pytest.raises(TypeError, match=r"parameter 0 is torch\.float32"):
        ebr_step([f.half() for f in x], parts[:2], parts[2:], psi, backend=backend)
