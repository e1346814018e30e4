"""Is this installation right and fast? Every usable backend against float64, and the AGOP core against a product."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import native as library
from .agop import op as agop


@dataclass(frozen=True)
class Check:
    """One line of :func:`selftest`."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Speed:
    """One line of :func:`quick_bench`: best CPU time of one thread, in milliseconds."""

    name: str
    shape: str
    isa: str
    milliseconds: float
    forward_milliseconds: float

    @property
    def ratio(self) -> float:
        """Time in units of the forward product ``x Wᵀ``."""
        return self.milliseconds / self.forward_milliseconds


def selftest() -> list[Check]:
    """Run the AGOP primitives on every instruction set of this machine and in eager torch, against float64 on drawn inputs.

    One row per primitive and backend; ``passed`` is False where a count differs or a float is off by more than 1e-5.
    """
    seed = torch.seed() % 2**31
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (517, 19), generator=generator).float()  # integers: pre-activations are exact
    weight = torch.randint(-3, 4, (77, 19), generator=generator).float()
    z = x.double() @ weight.double().t()
    active = (z > 0).double()
    smooth = 1 - torch.tanh(z / 16) ** 2
    rows: list[Check] = []
    reason = library.unavailable_reason()
    if reason is not None:
        rows.append(Check("native library", "was not built" in reason, reason))  # pure Python is a choice, not a fault

    def run(backend: str, label: str) -> None:
        counts, flag = torch.zeros(77, 77, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        agop.relu_coactivation_update(x, weight, None, counts, flag, backend=backend)
        rows.append(_exact(f"co-activation counts, {label}", counts, (active.t() @ active).triu().long(), seed))
        gram, total = torch.zeros(77, 77, dtype=torch.float64), torch.zeros(77, dtype=torch.float64)
        agop.derivative_gram_update(x, weight / 16, None, "tanh", gram, total, flag, backend=backend)
        rows.append(_near(f"derivative Gram, {label}", gram, (smooth.t() @ smooth).triu(), seed))
        product = agop.agop_finalise(weight, weight.t().contiguous(), counts, backend=backend)
        s = (active.t() @ active) * (weight.double() @ weight.double().t())
        rows.append(_near(f"final product, {label}", product, weight.double().t() @ s @ weight.double(), seed))

    for isa in library.supported_isas():
        with library.forced_isa(isa):
            run("cpp", f"cpp on {isa}")
    run("eager", "eager")
    return rows


def quick_bench(rounds: int = 7) -> list[Speed]:
    """Time the fused co-activation update on each instruction set against ``x Wᵀ``, on one thread, in turn."""
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    n, d, h = 8192, 256, 512
    x, weight = torch.randn(n, d, generator=generator), torch.randn(h, d, generator=generator)
    counts, flag = torch.zeros(h, h, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    out = torch.empty(n, h)

    def update(backend: str) -> Callable[[], object]:
        return lambda: agop.relu_coactivation_update(x, weight, None, counts, flag, backend=backend)

    torch.set_num_threads(1)
    try:
        speeds = []
        names = [*(isa for isa in library.supported_isas() if isa not in library.FOR_TESTS), "eager"]
        for name in names:
            backend = "eager" if name == "eager" else "cpp"
            best = [float("inf"), float("inf")]
            for _ in range(rounds):
                if backend == "cpp":
                    with library.forced_isa(name):
                        best[0] = min(best[0], _seconds(update(backend)))
                else:
                    best[0] = min(best[0], _seconds(update(backend)))
                best[1] = min(best[1], _seconds(lambda: torch.mm(x, weight.t(), out=out)))
            speeds.append(Speed("co-activation update", f"N {n} d {d} h {h}", name, 1e3 * best[0], 1e3 * best[1]))
        return speeds
    finally:
        torch.set_num_threads(threads)


def _seconds(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def _exact(name: str, got: Tensor, expected: Tensor, seed: int) -> Check:
    wrong = int((got != expected).sum())
    return Check(name, wrong == 0, "equal" if not wrong else f"{wrong} entries differ (seed {seed})")


def _near(name: str, got: Tensor, expected: Tensor, seed: int) -> Check:
    error = float((got.double() - expected).norm() / expected.norm())
    return Check(name, error < 1e-5, f"relative error {error:.1e}" + ("" if error < 1e-5 else f" (seed {seed})"))
