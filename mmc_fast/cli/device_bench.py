"""``mmc-fast bench --device cuda``: eager, compiled, a CUDA graph of eager, and ours, on the shapes of ``docs/gpu.md``.

Numbers are checked before anything is timed; a row that is wrong has no times.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmc_fast
from mmc_fast.nn import EBRHead

__all__ = ["SHAPES", "Shape", "device_bench"]

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


def device_bench(
    device: torch.device, shapes: Sequence[Shape] = SHAPES, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
) -> dict[str, Any]:  # fmt: skip
    """Environment and one row per shape and dtype: medians in milliseconds, GB/s, TFLOP/s, share of roofline, memory.

    Bytes and flops are those that any implementation needs: every input, output and gradient once, every product once.
    """
    rows = [(_ebr if shape.psi else _agop)(device, shape, dtype) for shape in shapes for dtype in dtypes]
    on_gpu = device.type == "cuda"
    return {
        "version": 1,
        "mmc_fast": mmc_fast.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "capability": list(torch.cuda.get_device_capability(device)) if on_gpu else None,
        "rows": rows,
    }


def _ebr(device: torch.device, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
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

    def ours() -> list[Tensor]:
        out = mmc_fast.functional.ebr_step(
            features, encoders, decoders, list(heads.discriminator.parameters()), reversal=1.0, backend=backend
        )
        loss = out.discrimination_loss + out.reconstruction_loss
        loss = loss + torch.stack([r.float().square().mean() for r in out.recovered]).mean()
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    widths = [shape.latent, *shape.psi, shape.modalities]
    psi = sum(a * b for a, b in itertools.pairwise(widths))
    layer = shape.hidden * (2 * shape.features + 2 * shape.latent) + psi
    flops = 3 * 2 * shape.batch * shape.modalities * layer
    each = shape.batch * shape.modalities
    numbers = each * (4 * shape.features + shape.latent) + 2 * sum(p.numel() for p in heads.parameters())
    return _row(device, shape, dtype, eager, ours, flops, numbers * dtype.itemsize)


def _agop(device: torch.device, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
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
    return _row(device, shape, dtype, eager, ours, flops, numbers * dtype.itemsize)


def _row(
    device: torch.device, shape: Shape, dtype: torch.dtype, eager: Callable[[], list[Tensor]],
    ours: Callable[[], list[Tensor]], flops: int, size: int,
) -> dict[str, Any]:  # fmt: skip
    row: dict[str, Any] = {"name": shape.name, "dtype": str(dtype).removeprefix("torch."), "shape": vars(shape).copy()}
    row |= {"flops": flops, "bytes": size, "problem": None, "sides": {}}
    try:
        expected, got = eager(), ours()
        worst = max(
            float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
            for a, b in zip(got, expected, strict=True)
        )
        row["difference"] = worst
        if not worst <= tolerance(dtype):
            row["problem"] = f"ours differs from eager by {worst:.1e}; nothing was timed"
    except RuntimeError as error:
        row["problem"] = f"ours does not run: {' '.join(str(error).split())[:200]}"
    if row["problem"]:
        return row
    sides: dict[str, Callable[[], Callable[[], Any]]] = {
        "eager": lambda: eager,
        "compiled": lambda: torch.compile(eager),
        "eager, CUDA graph": lambda: _graph(eager),
        "ours": lambda: ours,
        "ours, CUDA graph": lambda: _graph(ours),
    }
    for name, make in sides.items():
        if "CUDA graph" in name and device.type != "cuda":
            continue
        try:
            row["sides"][name] = _measure(make(), device, flops, size, dtype)
        except Exception as error:  # a side that cannot run says so and leaves the others alone
            row["sides"][name] = {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return row


def tolerance(dtype: torch.dtype) -> float:
    """Relative error in the norm up to which a result counts as right; a result of zeros has 1."""
    return min(400 * torch.finfo(dtype).eps, 0.25)


def _graph(run: Callable[[], Any]) -> Callable[[], None]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


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
        for start, stop in events:
            start.record()
            run()
            stop.record()
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
        seconds, memory, name = statistics.median(taken), None, ""
    bound = None
    for key, (bandwidth, single, half) in _PEAKS.items():
        if key in name:
            bound = max(size / bandwidth, flops / (single if dtype == torch.float32 else half))
    return {
        "ms": 1e3 * seconds,
        "GB/s": size / seconds / 1e9,
        "TFLOP/s": flops / seconds / 1e12,
        "share_of_roofline": None if bound is None else bound / seconds,
        "peak_MiB": memory,
    }
