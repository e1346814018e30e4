"""The share of the processor's multiply-adds that products reach: own tiles, the BLAS in the step, ``torch.mm`` alone.

``python bench/bench_products.py``                       with AVX-512
``MMC_CPU_ISA=avx2 python bench/bench_products.py``      with AVX2; limit torch with ``ATEN_CPU_CAPABILITY=avx2`` and
                                                         ``MKL_ENABLE_INSTRUCTIONS=AVX2``

The peak is a loop of multiply-adds on registers alone (``fma_rate.cpp``, needs g++), which runs in the same process in turn
with the products; best CPU time of one thread of each. Tiles and BLAS are timed with the epilogue that the product has in an
EBR step (bias and ReLU, gate, or sums of rows), ``torch.mm`` without.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import machine
import torch

from mmc_fast.ops import native
from mmc_fast.ops.ebr.products import ORDERS

FLAGS = {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f"], "avx512_vpopcntdq": ["-mavx512f"]}
Shape = tuple[int, int, int, int]  # how the operands lie (ORDERS), m, n, k
SHAPES: tuple[Shape, ...] = (
    (0, 512, 1024, 128), (0, 512, 512, 1024), (0, 512, 1024, 512), (0, 2048, 512, 512), (0, 8192, 512, 256),
    (0, 64, 1024, 512), (0, 64, 128, 64), (1, 512, 1024, 512), (1, 2048, 512, 512), (1, 64, 128, 64), (2, 512, 1024, 512),
    (2, 512, 512, 2048), (2, 1024, 512, 64),
)  # fmt: skip


def register_rate() -> Callable[[], float]:
    """Flop/s of multiply-adds on registers alone, as a function that measures for about a millisecond."""
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/fma_rate.so"
        source = str(Path(__file__).with_name("fma_rate.cpp"))
        flags = FLAGS[native.current_isa() or ""]
        subprocess.run(["g++", "-O3", "-std=c++17", "-shared", "-fPIC", *flags, source, "-o", library], check=True)
        rate = ctypes.CDLL(library).fma_rate
    rate.restype, rate.argtypes = ctypes.c_double, [ctypes.c_int64]
    return lambda: float(rate(200_000))


def mm_seconds(order: int, m: int, n: int, k: int) -> float:
    a = torch.ones(k, m).t() if order == 2 else torch.ones(m, k)
    b = torch.ones(n, k).t() if order == 0 else torch.ones(k, n)
    out = torch.empty(m, n)
    torch.mm(a, b, out=out)
    repeats = max(1, int(3e7 / (m * n * k)))
    start = time.thread_time()
    for _ in range(repeats):
        torch.mm(a, b, out=out)
    return (time.thread_time() - start) / repeats


def shares(shapes: Sequence[Shape], rounds: int) -> tuple[float, list[list[float]]]:
    """(peak in flop/s, [tiles, BLAS, ``torch.mm``] of each shape as shares of it)."""
    peak_of, timer = register_rate(), native.native().time_product
    peak, best = 0.0, [[float("inf")] * 3 for _ in shapes]
    for _ in range(rounds):
        peak = max(peak, peak_of())
        for shape, times in zip(shapes, best, strict=True):
            taken = timer(0, *shape, False), timer(0, *shape, True), mm_seconds(*shape)
            times[:] = map(min, times, taken)
    return peak, [[2.0 * s[1] * s[2] * s[3] / (t * peak) for t in times] for s, times in zip(shapes, best, strict=True)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args(argv)
    if native.load_ebr() or native.current_isa() not in FLAGS or shutil.which("g++") is None:
        print("needs the native library with AVX2 or AVX-512, and g++")
        return 2
    torch.set_num_threads(1)
    begin = machine.Moment.now()
    peak, found = shares(SHAPES, options.rounds)
    busy = machine.between(begin, machine.Moment.now(), torch.get_num_threads(), 1, 0.0).reasons()
    print(f"{machine.name()}, {native.current_isa()}: {1e-9 * peak:.0f} Gflop/s on registers alone")
    print("| product | tiles | BLAS | `torch.mm` |\n|---|---|---|---|")
    for (order, m, n, k), row in zip(SHAPES, found, strict=True):
        print(f"| {ORDERS[order]} {m}x{n}x{k} | " + " | ".join(f"{share:.0%}" for share in row) + " |")
    if busy:
        print(f"the machine is busy: {'; '.join(busy)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
