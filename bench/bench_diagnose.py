"""A diagnosis at scale: processor time by phase and peak memory for a head ``D → h → C`` on N streamed samples.

Run: ``python bench/bench_diagnose.py [--samples 1000000] [--width 512] [--hidden 1024] [--classes 100] [--threads 2]``. Batches are cut
from one drawn block, shifted by an offset of their own, so that neither a disk nor a random generator is measured. Before
it times, it checks the use shares of a small part against PyTorch's own Jacobians in float64.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from mmc_fast.analysis import blocks
from mmc_fast.analysis.diagnosis import diagnose

BATCH = 8192


class Model:
    """Two modalities of equal width side by side; batches are (features, labels)."""

    def __init__(self, width: int, hidden: int, classes: int) -> None:
        torch.manual_seed(0)
        self.half = width // 2
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes)).eval()

    def encode(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"image": batch[0][:, : self.half], "audio": batch[0][:, self.half :]}

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        return self.head(torch.cat(list(features.values()), 1))


class Stream:
    """N samples in batches, made from one block in memory."""

    def __init__(self, samples: int, width: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.samples = samples
        self.block = torch.randn(BATCH, width, generator=generator)
        self.labels = torch.randint(classes, (BATCH,), generator=generator)

    def __len__(self) -> int:
        return -(-self.samples // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(len(self)):
            rows = min(BATCH, self.samples - index * BATCH)
            yield self.block[:rows] + 0.01 * (index % 7), self.labels[:rows]


def check(model: Model) -> None:
    """Use shares of 300 samples against float64 Jacobians."""
    x = torch.randn(300, 2 * model.half, generator=torch.Generator().manual_seed(2))
    found = diagnose(model, [(x, torch.zeros(300, dtype=torch.int64))], resamples=0, reliance=False)
    double = model.head.double()
    jacobian = vmap(jacrev(double), chunk_size=20)(x.double()).detach().flatten(0, 1)
    expected = blocks.use_shares(
        jacobian.t() @ jacobian, torch.cov(x.double().t(), correction=0), [model.half, model.half]
    )
    model.head.float()
    gap = abs(float(expected[0]) - float(found.value("use_share.image") or 0))
    if gap > 1e-5:
        raise SystemExit(f"the use share is wrong by {gap:.2g}; nothing is timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (
        ("samples", 10**6),
        ("width", 512),
        ("hidden", 1024),
        ("classes", 100),
        ("threads", 2),
        ("resamples", 100),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--groups", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = Model(arguments.width, arguments.hidden, arguments.classes)
    check(model)
    stream = Stream(arguments.samples, arguments.width, arguments.classes)
    phases: dict[str, float] = {}
    memory: list[int] = []
    last: list[Any] = ["start", time.process_time()]

    def progress(phase: str, done: int, total: int | None) -> None:
        if phase != last[0]:
            now = time.process_time()
            phases[last[0]] = now - last[1]
            last[:] = [phase, now]
        if done % 16 == 0:
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)

    started, worked = time.perf_counter(), time.process_time()
    options: dict[str, Any] = {"groups": arguments.groups, "resamples": arguments.resamples}
    found = diagnose(model, stream, progress=progress, **options)
    phases[last[0]] = time.process_time() - last[1]
    phases.pop("start", None)
    print(
        json.dumps(
            vars(arguments)
            | {
                "seconds": round(time.perf_counter() - started, 1),
                "processor seconds": round(time.process_time() - worked, 1),
                "by phase": {name: round(seconds, 1) for name, seconds in phases.items()},
                "samples seen": found.samples,
                "agop": found.settings["agop"],
                "peak MiB early, late": [memory[min(2, len(memory) - 1)], memory[-1]],
                "torch": torch.__version__,
                "cpu": torch.backends.cpu.get_cpu_capability(),
            }
        )
    )


if __name__ == "__main__":
    main()
