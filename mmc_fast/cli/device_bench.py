"""``mmc-fast bench --device cuda``: eager, compiled, a CUDA graph of eager, and ours, on the shapes of ``docs/gpu.md``.

Numbers are checked before anything is timed; a row that is wrong has no times.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mmc_fast
from mmc_fast.nn import EBRHead

Side = Callable[[], list[Tensor]]

PRECISIONS = {  # name: dtype, torch.set_float32_matmul_precision, spacing of the products' operands
    "float32": (torch.float32, "highest", 2.0**-23),
    "tf32": (torch.float32, "high", 2.0**-10),
    "bfloat16": (torch.bfloat16, "highest", 2.0**-7),
}
SIDES = ("eager", "eager, CUDA graph", "ours", "ours, CUDA graph", "ours, graphed", "compiled")

# name in the device's name: bytes/s and flop/s of float32 and of 16-bit products, from data sheets
_PEAKS = {
    "A100": (2.039e12, 19.5e12, 312e12),
    "H100": (3.35e12, 66.9e12, 989e12),
    "H200": (4.8e12, 66.9e12, 989e12),
    "B200": (8.0e12, 75e12, 2250e12),
}


@dataclass(frozen=True)
class Shape:
    """An EBR step (``psi`` given) or an AGOP of a head with one hidden layer."""

    name: str
    batch: int
    features: int
    hidden: int
    modalities: int = 1
    latent: int = 0
    psi: tuple[int, ...] = ()
    outputs: int = 10


SHAPES = (
    Shape("EBR step, narrow", 4096, 128, 256, 5, 64, (64,)),
    Shape("EBR step, paper's widths", 512, 128, 1024, 4, 512, (512, 256)),
    Shape("AGOP, one hidden ReLU layer", 65536, 256, 512),
)


class Case(NamedTuple):
    """One workload: eager, ours, the head through ``mmc_fast.graphed`` where it has one; what any implementation needs."""

    eager: Side
    ours: Side
    graphed: Callable[[], Side] | None
    flops: int
    numbers: int  # read or written


def device_bench(
    device: torch.device, shapes: Sequence[Shape] = SHAPES, precisions: Sequence[str] = tuple(PRECISIONS)
) -> dict[str, Any]:
    """Environment and one row per shape and precision: medians in milliseconds, GB/s, TFLOP/s, share of roofline, memory.

    Bytes and flops are those that any implementation needs: every input, output and gradient once, every product once.
    """
    return environment(device) | {"rows": [measure(device, shape, p) for shape in shapes for p in precisions]}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, and what names the class of a device."""
    on_gpu = device.type == "cuda"
    return {
        "version": 1,
        "mmc_fast": mmc_fast.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "capability": list(torch.cuda.get_device_capability(device)) if on_gpu else None,
    }


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """Set torch's switch for float32 products; yields the dtype of :data:`PRECISIONS`."""
    dtype, allowed, _ = PRECISIONS[name]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        yield dtype
    finally:
        torch.set_float32_matmul_precision(before)


def make_case(device: torch.device, shape: Shape, dtype: torch.dtype) -> Case:
    """The workload of a shape; equal numbers in every call."""
    return (_ebr if shape.psi else _agop)(device, shape, dtype)


def _ebr(device: torch.device, shape: Shape, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    heads = EBRHead([shape.features] * shape.modalities, shape.latent, shape.hidden, shape.psi)
    heads = heads.to(device, dtype)
    features = [torch.randn(shape.batch, shape.features).to(device, dtype).requires_grad_() for _ in heads.encoders]
    labels = torch.arange(shape.modalities, device=device).repeat_interleave(shape.batch)
    leaves = [*features, *heads.parameters()]

    def eager() -> list[Tensor]:
        latents = [encode(x) for encode, x in zip(heads.encoders, features, strict=True)]
        recovered = [decode(g) for decode, g in zip(heads.decoders, latents, strict=True)]
        logits = heads.discriminator(mmc_fast.functional.grad_reverse(torch.cat(latents), 1.0))
        losses = [F.mse_loss(r.float(), x.detach().float()) for r, x in zip(recovered, features, strict=True)]
        loss = F.cross_entropy(logits.float(), labels) + torch.stack(losses).mean()
        loss = loss + torch.stack([r.float().square().mean() for r in recovered]).mean()
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    backend = "triton" if device.type == "cuda" else "auto"
    encoders = [tuple(e.parameters()) for e in heads.encoders]
    decoders = [tuple(d.parameters()) for d in heads.decoders]

    def finish(out: mmc_fast.functional.EBROutput) -> list[Tensor]:
        loss = out.discrimination_loss + out.reconstruction_loss
        loss = loss + torch.stack([r.float().square().mean() for r in out.recovered]).mean()
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    def ours() -> list[Tensor]:
        psi = list(heads.discriminator.parameters())
        return finish(mmc_fast.functional.ebr_step(features, encoders, decoders, psi, reversal=1.0, backend=backend))

    def graphed() -> Side:
        heads.backend = backend
        fast = mmc_fast.graphed(heads, features, reversal=1.0)
        return lambda: finish(fast(features, reversal=1.0))

    widths = [shape.latent, *shape.psi, shape.modalities]
    psi = sum(a * b for a, b in itertools.pairwise(widths))
    layer = shape.hidden * (2 * shape.features + 2 * shape.latent) + psi
    flops = 3 * 2 * shape.batch * shape.modalities * layer
    each = shape.batch * shape.modalities
    numbers = each * (4 * shape.features + shape.latent) + 2 * sum(p.numel() for p in heads.parameters())
    return Case(eager, ours, graphed, flops, numbers)


def _agop(device: torch.device, shape: Shape, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    linear = torch.nn.Linear
    head = torch.nn.Sequential(
        linear(shape.features, shape.hidden), torch.nn.ReLU(), linear(shape.hidden, shape.outputs)
    )
    head = head.to(device, dtype)
    x = torch.randn(shape.batch, shape.features).to(device, dtype)

    def eager() -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        logits = head(leaf)
        total = x.new_zeros(shape.features, shape.features)
        for c in range(shape.outputs):
            (rows,) = torch.autograd.grad(logits[:, c].sum(), leaf, retain_graph=True)
            total.addmm_(rows.t(), rows)
        return [total]

    def ours() -> list[Tensor]:
        return [mmc_fast.agop(head, x, backend="triton" if device.type == "cuda" else "auto")]

    flops = 2 * shape.batch * shape.features * shape.hidden + shape.batch * shape.hidden**2
    numbers = shape.batch * shape.features + shape.hidden * shape.features + shape.features**2
    return Case(eager, ours, None, flops, numbers)


def measure(
    device: torch.device, shape: Shape, precision_name: str, sides: Sequence[str] = SIDES, compiler: str = "inductor"
) -> dict[str, Any]:
    """One row; every side is compared with eager before it is timed, and all are left out where ours is wrong."""
    row: dict[str, Any] = {"name": shape.name, "op": "ebr_step" if shape.psi else "agop", "precision": precision_name}
    row |= {"shape": vars(shape).copy(), "problem": None, "sides": {}}
    with precision(precision_name) as dtype:
        case = make_case(device, shape, dtype)
        size = case.numbers * dtype.itemsize
        row |= {"flops": case.flops, "bytes": size}
        expected = [t.clone() for t in case.eager()]
        try:
            row["problem"] = wrong(case.ours(), expected, precision_name)
        except RuntimeError as error:
            row["problem"] = f"does not run: {_line(error)}"
        if row["problem"]:
            row["problem"] = f"ours {row['problem']}; nothing was timed"
            return row
        makers: dict[str, Callable[[], Side] | None] = {
            "eager": lambda: case.eager,
            "eager, CUDA graph": lambda: _graph(case.eager),
            "ours": lambda: case.ours,
            "ours, CUDA graph": lambda: _graph(case.ours),
            "ours, graphed": case.graphed,
            "compiled": lambda: torch.compile(case.eager, backend=compiler),
        }
        for name in sides:
            make = makers[name]
            if make is None or (device.type != "cuda" and "graph" in name):
                continue
            try:
                run = make()
                problem = wrong(run(), expected, precision_name)
                timed: Any = _measure(run, device, case.flops, size, dtype)
                row["sides"][name] = {"problem": problem} if problem else timed
            except Exception as error:  # a side that cannot run says so and leaves the others alone
                row["sides"][name] = {"problem": _line(error)}
    return row


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def wrong(got: Sequence[Tensor], expected: Sequence[Tensor], precision_name: str) -> str | None:
    """What is wrong with a result in one line, None where it is right: relative errors in the norm, per tensor.

    The first tensor (loss or AGOP) may differ by 400 spacings, gradients by ten square roots of one, as rounding moves a
    share of the units across their kink; neither by more than 1/4, where a result of zeros has 1.
    """
    spacing = PRECISIONS[precision_name][2]
    for n, (a, b) in enumerate(zip(got, expected, strict=True)):
        size = float(b.double().norm())
        if not 0 < size < float("inf"):
            return f"cannot be checked: eager's tensor {n} has norm {size}"
        error = float((a.double() - b.double()).norm()) / size
        if not error <= min(0.25, 10 * spacing**0.5 if n else 400 * spacing):
            return f"differs from eager by {error:.1e} in tensor {n}"
    return None


def _graph(run: Side) -> Side:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for t in out:
        t.fill_(float("nan"))  # what the graph does not write is seen

    def replay() -> list[Tensor]:
        graph.replay()
        return out

    return replay


def _measure(
    run: Callable[[], Any], device: torch.device, flops: int, size: int, dtype: torch.dtype
) -> dict[str, float | None]:
    for _ in range(5):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(50)]
        begun = time.perf_counter()
        for start, stop in events:
            start.record()
            run()
            stop.record()
        host: float | None = (time.perf_counter() - begun) / len(events)
        torch.cuda.synchronize(device)
        seconds = statistics.median(start.elapsed_time(stop) for start, stop in events) / 1e3
        memory: float | None = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        name = torch.cuda.get_device_name(device)
    else:
        taken = []
        for _ in range(5):
            start_time = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start_time)
        seconds, memory, name, host = statistics.median(taken), None, "", None
    bound = None
    for key, (bandwidth, single, half) in _PEAKS.items():
        if key in name:
            bound = max(size / bandwidth, flops / (single if dtype == torch.float32 else half))
    return {
        "ms": 1e3 * seconds,
        "host_ms": None if host is None else 1e3 * host,
        "GB/s": size / seconds / 1e9,
        "TFLOP/s": flops / seconds / 1e12,
        "share_of_roofline": None if bound is None else bound / seconds,
        "peak_MiB": memory,
    }
