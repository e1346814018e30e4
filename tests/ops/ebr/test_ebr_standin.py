"""What the Triton backend does on the host, by a stand-in for the driver: compilations, launches, calls."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton")
from mmc_fast.kernels import common
from mmc_fast.kernels.ebr import plan
from torch.utils._python_dispatch import TorchDispatchMode
from triton_standin import standin

from mmc_fast.nn import EBRHead
from mmc_fast.ops.ebr import triton
from mmc_fast.ops.ebr.reference import Call

BATCHES = (512, 511, 384, 256, 320, 400, 448, 128, 64, 100, 96, 37, 1, 640, 704, 1000, 208, 16, 2048, 4100)


def trained(head: EBRHead, batch: int, **call: Tensor) -> Callable[[], None]:
    features = [torch.zeros(batch, d, requires_grad=True) for d in head.dims]
    upstream = [torch.zeros(batch, d) for d in head.dims]
    one, lambda_ = torch.ones(()), torch.tensor(0.5)
    wanted = [*features, *head.parameters()]

    def step() -> None:
        out = head(features, reversal=lambda_, **call)
        outputs = [*out.recovered, out.discrimination_loss, out.reconstruction_loss]
        torch.autograd.grad(outputs, wanted, [*upstream, one, one])

    return step


@pytest.mark.parametrize(
    ("dims", "hidden", "latent", "psi"),
    [([128] * 4, 1024, 512, (512, 256)), ([74, 35, 300, 33], 66, 131, (9, 7)), ([16] * 5, 16, 16, (16,))],
)
def test_another_batch_size_compiles_nothing(dims, hidden, latent, psi):
    head = EBRHead(dims, latent, hidden, psi, backend="triton", normalize=True)
    with standin() as recorder:
        trained(head, 50)()
        first = len(recorder.compiled)
        for batch in BATCHES:
            trained(head, batch)()
        assert len(recorder.compiled) == first, Counter(name for name, _ in recorder.compiled)


def test_work_on_the_host():
    """Launches, and calls of functions (Python's and C's), of a step with four modalities: as few as were counted once."""
    head = EBRHead([128] * 4, 512, 1024, (512, 256), backend="triton")
    with standin() as recorder:
        step = trained(head, 8)
        step()
        first = list(recorder.launches)
        found = count(step)
    assert recorder.launches == 2 * first
    assert len(first) == 14
    eager = trained(EBRHead([128] * 4, 512, 1024, (512, 256), backend="eager"), 8)
    eager()
    theirs = count(eager)
    assert found["call"] <= 670
    assert found["c_call"] <= 790
    assert sum(found.values()) <= 1.8 * sum(
        theirs.values()
    )  # an operator of eager takes several times as long as a call


def test_few_files_lie_between_the_layer_and_a_kernel(monkeypatch):
    """Files of the package on the stack of a launch: layer, function, backend, order of launches, launch."""
    crossed: dict[str, set[str]] = {}
    launch = common.launch

    def seen(kernel: Any, *args: Any, **options: Any) -> Any:
        frame, files = sys._getframe(), set()
        while frame := frame.f_back:
            files |= {frame.f_globals["__name__"]} & {n for n in sys.modules if n.startswith("mmc_fast.")}
        crossed.setdefault(kernel.__name__, files)
        return launch(kernel, *args, **options)

    monkeypatch.setattr(common, "launch", seen)
    with standin():
        trained(EBRHead([48] * 2, 32, 48, (16,), backend="triton"), 24)()
    assert len(crossed) > 4
    assert crossed["ebr_fwd_kernel"] == {f"mmc_fast.{n}" for n in (
        "nn.ebr", "functional", "ops.ebr.triton", "kernels.ebr.launch", "kernels.common")}  # fmt: skip
    del crossed["ebr_table_kernel"]  # kernels/ebr/plan.py launches it, on the way to all others
    assert max(map(len, crossed.values())) == 5, crossed


KINDS = {
    "plain": ([16] * 3, (16,), {}, lambda b: {}),
    "odd widths": ([5, 16, 9], (7,), {}, lambda b: {"present": torch.ones(b, 3, dtype=torch.bool)}),
    "weights": ([16] * 3, (16, 16), {"normalize": True}, lambda b: {"source": torch.ones(b, 3, 3, requires_grad=True)}),
    "index": ([16] * 3, (16,), {"residual": True}, lambda b: {"source": torch.zeros(b, 3, dtype=torch.int64)}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_launch_without_look_up_has_the_arguments_of_one_with_it(kind, monkeypatch):
    dims, psi, options, more = KINDS[kind]
    head = EBRHead(dims, 16, 16, psi, backend="triton", **options)
    found = []
    for relaunches in (True, False):
        monkeypatch.setattr(plan, "_RELAUNCHES", relaunches)
        with standin() as recorder:
            for batch in (8, 5, 8):  # the third is of the plan of the first
                trained(head, batch, **more(batch))()
            found.append([(name, grid, described(arguments)) for name, grid, arguments in recorder.calls])
    assert found[0] == found[1]


def described(value):
    if isinstance(value, tuple):
        return tuple(map(described, value))
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    return value


@pytest.mark.parametrize(
    "what", ["features", "upstream", "present", "λ", "strides", "columns", "parameters", "precision"]
)
def test_another_alignment_stride_or_precision_is_looked_up(what, monkeypatch):
    """A kernel that was compiled for addresses that 16 divides must not be launched with others."""
    head = EBRHead([16, 16], 16, 16, (16,), backend="triton")
    weight = head.encoders[0][0].weight

    def step(shifted: bool) -> None:
        def made(name: str, *shape: int, dtype=torch.float32) -> Tensor:
            moved = shifted and name == what
            if moved and not shape:
                return torch.zeros(2, dtype=dtype)[1]
            flat = torch.zeros(1000, dtype=dtype)[int(moved) :]
            return flat[: shape[0] * shape[1]].view(shape) if shape else flat[0]

        width = 32 if what == "strides" and shifted else 16
        weight.data = torch.zeros(16, 16).t() if what == "parameters" and shifted else torch.zeros(16, 16)
        monkeypatch.setattr(
            plan, "input_precision", lambda dtype: "tf32" if what == "precision" and shifted else "tf32x3"
        )
        other = torch.zeros(8, 64)[:, ::4] if what == "columns" and shifted else torch.zeros(8, width)[:, :16]
        features = [made("features", 8, 16).requires_grad_(), other]
        present = made("present", 8, 2, dtype=torch.uint8).view(torch.bool)
        out = head(features, present, reversal=made("λ"))
        torch.autograd.grad(
            out.recovered, [features[0], *head.parameters()], [made("upstream", 8, 16)] * 2, allow_unused=True
        )

    with standin() as recorder:
        step(False)
        step(False)
        first, launches, few = len(recorder.compiled), len(recorder.launches), len(plan._plans)
        step(True)
        assert len(recorder.compiled) > first or what == "strides"
        assert len(recorder.launches) >= launches + launches // 2
        plans = len(plan._plans)
        assert plans - few == (2 if what in ("strides", "columns", "precision") else 0)  # of forward and backward
        step(False)
        assert len(plan._plans) == plans


def test_plans_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(plan, "_MOST_PLANS", 4)
    head = EBRHead([16, 16], 16, 16, (16,), backend="triton")
    with standin():
        for batch in range(1, 9):
            trained(head, batch)()
            assert len(plan._plans) <= 4


class Wrapped(Tensor):
    """Torch functions take it for a plain tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


LOOKERS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "a dispatch mode": lambda run, x: under(Seen(), run, x),
    "a function mode": lambda run, x: under(SeenFunctions(), run, x),
    "torch.func": lambda run, x: torch.func.vjp(run, x),
    "a trace": lambda run, x: torch.jit.trace(run, x, check_trace=False),
    "a subclass": lambda run, x: run(x.as_subclass(Wrapped)),
    "a subclass with functions": lambda run, x: run(x.as_subclass(type("Named", (Tensor,), {}))),
}


def under(mode: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with mode:
        run(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("looker", [None, *LOOKERS])
def test_what_runs_is_the_op_where_something_looks_at_it(looker):
    seen = []

    def run(x: Tensor) -> Tensor:
        seen.append(triton.applies(Call([x], None, None, x, None, [x], False, False, False, "triton")))
        return x * 1

    LOOKERS.get(looker, lambda run, x: run(x))(run, torch.zeros(3))
    assert seen == [looker is None]


def test_a_compiler_sees_the_op(monkeypatch):
    x = torch.zeros(3)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not triton.applies(Call([x], None, None, x, None, [x], False, False, False, "triton"))


def test_recompute_and_no_grad_keep_nothing():
    head = EBRHead([16, 16], 16, 16, (16,), backend="triton")
    features = [torch.zeros(8, 16), torch.zeros(8, 16)]
    kept = []
    with standin() as recorder:
        for head.recompute in (False, True):
            kept.append(len(head(features).latents.grad_fn.saved_tensors))
        head.recompute = False
        with torch.no_grad():
            head(features)
        trains = [arguments[2] for name, _, arguments in recorder.calls if name == "ebr_loss_kernel"]
    assert kept[1] == 4 + 2 + len(list(head.parameters())) < kept[0]
    assert [train is None for train in trains] == [False, True, True]


def test_modalities_cost_the_host_little():
    found = []
    for m in (2, 12):
        with standin():
            step = trained(EBRHead([16] * m, 16, 16, (16,), backend="triton"), 8)
            step()
            found.append(sum(count(step).values()))
    assert found[1] < 3.5 * found[0]


def count(step: Callable[[], None]) -> Counter[str]:
    found: Counter[str] = Counter()

    def seen(frame, event, argument) -> None:
        if event in ("call", "c_call"):
            found[event] += 1

    threading.setprofile(seen)
    sys.setprofile(seen)
    try:
        step()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return found


@pytest.mark.parametrize(
    ("name", "given"),
    [("present", torch.empty(4, 2, dtype=torch.bool, device="meta")), ("source", torch.empty(4, 2, 2, device="meta")),
     ("normalizer", torch.empty(2, device="meta"))],
)  # fmt: skip
def test_a_tensor_on_another_device_is_refused(name, given):
    head = EBRHead([3, 5], 4, 6, (), backend="eager")
    with pytest.raises(TypeError, match=rf"{name} is on meta but features\[0\] is on cpu; move it there"):
        head([torch.ones(4, 3), torch.ones(4, 5)], **{name: given})
