"""``mmc_fast.graphed`` with torch's own capture, over a stand-in for CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from graph_standin import Graph, install
from torch import nn

import mmc_fast
from mmc_fast.errors import InputError
from mmc_fast.nn import graphs

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.fixture
def capture(monkeypatch):
    install(monkeypatch)


def head_and_features(seed, backend="eager"):
    torch.manual_seed(seed)
    head = mmc_fast.nn.EBRHead([6, 4], latent_dim=8, hidden_dim=16, psi_dims=(8,), backend=backend)
    return head, [torch.randn(5, d, requires_grad=True) for d in head.dims]


def gradients(out, leaves):
    loss = out.discrimination_loss + 0.3 * out.reconstruction_loss + out.recovered[1].square().sum()
    return [g.clone() for g in torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_replays_give_the_values_and_gradients_of_new_inputs(capture, seed, backend):
    head, features = head_and_features(seed, backend)
    fast = mmc_fast.graphed(head, features, present=torch.ones(5, 2, dtype=torch.bool), reversal=torch.ones(()))
    assert [g.replays for g in Graph.made] == [0, 0]
    for lambda_ in (0.5, 2.0):
        new = [torch.randn_like(f, requires_grad=True) for f in features]
        given = {"reversal": torch.tensor(lambda_), "present": torch.rand(5, 2) < 0.7}
        expected, got = head(new, **given), fast(new, **given)
        torch.testing.assert_close(got.recovered, expected.recovered)
        torch.testing.assert_close(got.discrimination_loss, expected.discrimination_loss)
        leaves = [*new, *head.parameters()]
        torch.testing.assert_close(gradients(got, leaves), gradients(expected, leaves))
        with torch.no_grad():
            head.encoders[0][0].weight += 0.1  # as an optimizer does
    assert [g.replays for g in Graph.made] == [2, 2]


def test_a_function_trains_the_modules_that_it_names(capture, seed):
    head, features = head_and_features(seed)
    fusion = nn.Linear(10, 3)

    def step(named, scale):
        return fusion(torch.cat(head(named["z"]).recovered, 1)).square().mean() * scale

    with pytest.raises(InputError, match="does not tell what it trains"):
        mmc_fast.graphed(step, {"z": features}, 2.0)
    fast = mmc_fast.graphed(step, {"z": features}, 2.0, modules=[head, fusion, nn.Linear(1, 1)])
    leaves = [*fusion.parameters(), *features, head.decoders[0][2].weight]
    new = [(f.detach() * 2).requires_grad_() for f in features]
    expected = torch.autograd.grad(step({"z": new}, 2.0), [*leaves[:2], *new, leaves[-1]])
    got = torch.autograd.grad(fast({"z": new}, 2.0), [*leaves[:2], *new, leaves[-1]])
    torch.testing.assert_close(got, expected)


def test_what_the_capture_fixed_is_held(capture, seed):
    head, features = head_and_features(seed)
    lambda_ = torch.ones(())
    fast = mmc_fast.graphed(head, features, present=None, reversal=lambda_)
    good = {"present": None, "reversal": lambda_}
    for args, kwargs, told in (
        ([[f[:1] for f in features]], good, r"shape of argument 0\[0\] was .*\[5, 6\].* and is .*\[1, 6\]"),
        ([[f.double() for f in features]], good, "dtype of argument 0"),
        ([features], good | {"present": torch.ones(5, 2) > 0}, "present was None in the capture and is a tensor"),
        ([features], good | {"reversal": 1.0}, "reversal was a tensor in the capture and is 1.0"),
        ([features], {"reversal": lambda_}, "not those of the capture"),
    ):
        with pytest.raises(InputError, match=told) as error:
            fast(*args, **kwargs)
        assert "\n" not in str(error.value)
    fixed = mmc_fast.graphed(head, [f.detach() for f in features], reversal=0.5)
    with pytest.raises(InputError, match=r"reversal was 0.5 in the capture and is 0.6"):
        fixed([f.detach() for f in features], reversal=0.6)
    with pytest.raises(InputError, match="asks for a gradient and did not"):
        fixed(features, reversal=0.5)
    with torch.no_grad():
        fixed(features, reversal=0.5)
    head.eval()
    with pytest.raises(InputError, match="training or evaluation mode"):
        fast(features, **good)
    head.train()
    head.decoders[0][0].bias.requires_grad_(False)
    with pytest.raises(InputError, match="frozen since the capture"):
        fast(features, **good)
    head.decoders[0][0].bias.requires_grad_(True)
    head.decoders[0][0].bias.data = head.decoders[0][0].bias.data.clone()
    with pytest.raises(InputError, match="parameters were moved"):
        fast(features, **good)


def test_memory_that_a_later_call_overwrites_is_not_trusted(capture, seed):
    head, features = head_and_features(seed)
    fast = mmc_fast.graphed(head, features)
    first, second = fast(features), fast(features)
    with pytest.raises(InputError, match="a later call has overwritten"):
        first.discrimination_loss.backward()
    second.discrimination_loss.backward()
    with pytest.raises(InputError, match="zero_grad"):
        fast(features)
    head.zero_grad(set_to_none=True)
    kept = features[0].clone()
    fast([torch.zeros_like(f) for f in features]).discrimination_loss.backward()
    assert torch.equal(features[0], kept), "the example's memory is not the graph's"


def test_autocast_is_part_of_the_capture(capture, seed):
    head, features = head_and_features(seed)
    with torch.autocast("cpu", torch.bfloat16):
        fast = mmc_fast.graphed(head, features)
        expected = head(features)
    assert expected.recovered[0].dtype == torch.bfloat16
    torch.testing.assert_close(fast(features).recovered, expected.recovered)
    assert not any(graph.casts_kept for graph in Graph.made)


@without_gpu
def test_without_cuda_one_line(seed):
    head, features = head_and_features(seed)
    with pytest.raises(InputError, match="torch sees no CUDA device"):
        mmc_fast.graphed(head, features)


def test_tensors_elsewhere_are_named(monkeypatch, seed):
    head, features = head_and_features(seed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match=r"argument 0\[0\] is on cpu; all must be on one CUDA device"):
        mmc_fast.graphed(head, features)
    monkeypatch.setattr(graphs, "_DEVICE", "meta")
    on_meta = [f.to("meta") for f in features]
    with pytest.raises(InputError, match="reversal is on cpu"):
        mmc_fast.graphed(head.to("meta"), on_meta, reversal=torch.ones(()))
    with pytest.raises(InputError, match="a parameter is on cpu"):
        mmc_fast.graphed(head_and_features(seed)[0], on_meta)
    with pytest.raises(InputError, match="a modality is None"):
        mmc_fast.graphed(head, [on_meta[0], None])
    with pytest.raises(InputError, match="no tensor in the example call"):
        mmc_fast.graphed(lambda scale: scale, 1.0, modules=[])
