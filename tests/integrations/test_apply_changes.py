"""Models that are wrapped, compiled, quantised, traced, copied or served by threads after they got heads."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
import torch.utils.flop_counter
from apply_models import AT, SMALL, Early, Two, by_hand, check, linear, two_inputs
from torch import nn

import mmc_fast
from mmc_fast.errors import InputError
from mmc_fast.integrations import find_handles


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
    got = (run(*x), *handle.losses())
    right = by_hand(model, handle, x, features={"a": linear(base, x[0]), "b": linear(model.b, x[1])})
    torch.testing.assert_close(got, right)


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
