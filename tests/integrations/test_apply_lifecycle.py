"""What surrounds a head: restore, seeds, copies, checkpointing, compile, export, autocast, several processes."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from apply_models import SMALL, Pair, assert_same, draw_towers, randomise, sites, snapshot, total
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import mmc_fast
from mmc_fast.integrations import find_handles


def test_restore_is_exact(generator):
    model, x = draw_towers(generator, m=3, dropout=0.5)
    model.encoders["mod1"].eval()
    before, expected = snapshot(model), copy.deepcopy(model).eval()(**x)
    handle = mmc_fast.apply_ebr(model, sites(model), **SMALL, seed=3)
    assert list(model.state_dict())[: len(before["keys"])] == before["keys"]
    assert len(model.state_dict()) > len(before["keys"])
    model(**x)
    torch.set_rng_state(before["random"])  # dropout has drawn
    head = handle.head
    model.ebr = nn.Identity()
    with pytest.raises(RuntimeError, match="no longer the head"):
        handle.restore()
    model.ebr = head
    handle.restore()
    handle.restore()
    assert_same(before, snapshot(model))
    assert torch.equal(copy.deepcopy(model).eval()(**x), expected)
    assert find_handles(model) == []
    assert "as before" in str(handle)
    with pytest.raises(RuntimeError, match="restored"):
        handle.losses()
    mmc_fast.apply_ebr(model, sites(model), **SMALL)  # the name is free again


def test_seed_makes_heads_repeatable_and_leaves_the_generator_alone(generator):
    model, _ = draw_towers(generator, m=2)
    other = copy.deepcopy(model)
    state = torch.get_rng_state()
    mmc_fast.apply_ebr(model, sites(model), **SMALL, seed=11)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    mmc_fast.apply_ebr(other, sites(other), **SMALL, seed=11)
    for a, b in zip(model.ebr.parameters(), other.ebr.parameters(), strict=True):
        assert torch.equal(a, b)


def test_copies_pickles_and_state_dicts(generator):
    model, x = draw_towers(generator, m=2)
    handle = mmc_fast.apply_ebr(model, sites(model), **SMALL)
    expected = model(**x)
    loss = handle.losses().discrimination  # graph tensors are held: a copy must not trip over them
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        (its,) = find_handles(other)
        assert its.head is other.ebr
        assert its.head is not handle.head
        torch.testing.assert_close(other(**x), expected)
        torch.testing.assert_close(its.losses().discrimination, loss)
        its.restore()
        assert "ebr" not in dict(other.named_children())
    assert torch.equal(model(**x), expected)  # restoring the copies left the original alone
    fresh, _ = draw_towers(torch.Generator().manual_seed(0), m=2)
    fresh = copy.deepcopy(twin)
    randomise(fresh, generator)
    mmc_fast.apply_ebr(fresh, sites(fresh), **SMALL)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(**x), expected)


@pytest.mark.parametrize("early_stop", [False, True])
def test_activation_checkpointing(generator, early_stop):
    class Checkpointed(Pair):
        reentrant = False

        def forward(self, image, text):
            return checkpoint(self.image, image, use_reentrant=self.reentrant), self.text(text)

    model = Checkpointed(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(2, 3)).double()
    plain = Pair(copy.deepcopy(model.image), copy.deepcopy(model.text))
    a, t = (torch.randn(4, d, generator=generator, dtype=torch.float64) for d in (3, 2))
    at = {"image": "image", "text": "text"}
    grads = []
    for each in (model, plain):
        handle = mmc_fast.apply_ebr(each, at, **SMALL, seed=1)
        with set_checkpoint_early_stop(early_stop):
            out = each(a, t)
        (out[0].sum() + out[1].sum() + sum(handle.losses())).backward()
        grads.append([p.grad for p in each.parameters()])
        # The call inside of backward was not counted, nor did it begin a pass of its own.
        assert [len(r) for r in handle.output.recovered.values()] == [4, 4]
    torch.testing.assert_close(grads[0], grads[1])
    model.reentrant = True
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(a.requires_grad_(), t)
    with torch.no_grad():
        model(a, t)  # without gradients nothing is lost


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="compiled by torch 2.10 the step finds no losses of the sites, why is not known; 2.11 and 2.12 were not tried",
)
def test_compile_without_graph_breaks(generator):
    model, x = draw_towers(generator, m=2)
    strength = torch.full((), 0.5)
    handle = mmc_fast.apply_ebr(model, sites(model), **SMALL, residual=True, normalize=True, reversal=strength)
    parameters = [p for n, p in model.named_parameters() if not n.startswith("unused")]

    def step(x):
        return total(model(**x), *handle.losses())

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for value, rows in ((0.5, 9), (0.25, 5)):  # another strength and another batch size
        strength.fill_(value)
        x = {n: torch.randn(rows, v.shape[1], generator=generator, dtype=v.dtype) for n, v in x.items()}
        expected = step(x)
        grads = torch.autograd.grad(expected, parameters)
        loss = compiled(x)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, parameters), grads)
    compiled_model = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(total(compiled_model(**x), *handle.losses()), expected)


def test_export_in_evaluation(generator):
    model, x = draw_towers(generator, m=2)
    mmc_fast.apply_ebr(model.eval(), sites(model), **SMALL)
    program = torch.export.export(model, (), x)
    torch.testing.assert_close(program.module()(**x), model(**x))


def test_autocast_and_low_precision(generator):
    model, x = draw_towers(generator, m=2)
    model, x = model.float(), {n: v.float() for n, v in x.items()}
    handle = mmc_fast.apply_ebr(model, sites(model), **SMALL)
    exact = model(**x), *handle.losses()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**x)
    losses = handle.losses()  # asked for outside of autocast
    assert logits.dtype == torch.bfloat16
    assert losses.discrimination.dtype == torch.float32
    for got, expected in zip((logits, *losses), exact, strict=True):
        torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)
    sum(losses).backward()
    assert model.ebr.encoders[0][0].weight.grad.dtype == torch.float32
    handle.restore()
    handle = mmc_fast.apply_ebr(model.bfloat16(), sites(model), **SMALL)
    out = model(**{n: v.bfloat16() for n, v in x.items()})
    assert out.dtype == handle.head.encoders[0][0].weight.dtype == torch.bfloat16
    assert handle.losses().discrimination.dtype == torch.float32


@pytest.mark.parametrize("unused", [False, True])
def test_distributed_data_parallel(generator, tmp_path, unused):
    """Two steps in one process: the reducer sees every gradient once, the losses being inside or outside."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    class Step(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x):
            return total(self.model(**x), *find_handles(self.model)[0].losses())

    model, x = draw_towers(generator, m=3)
    model.unused.requires_grad_(False)
    mmc_fast.apply_ebr(model, sites(model), **SMALL)
    plain = copy.deepcopy(model)
    expected = total(plain(**x), *find_handles(plain)[0].losses())
    expected.backward()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        if unused:
            wrapped = DistributedDataParallel(Step(model), find_unused_parameters=True)
        else:
            wrapped = DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            loss = wrapped(x) if unused else total(wrapped(**x), *find_handles(model)[0].losses())
            loss.backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(loss, expected)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
