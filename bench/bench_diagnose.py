"""A diagnosis at scale: processor time by phase and peak memory for a head ``D → h → C`` on N streamed samples.

Run: ``python bench/bench_diagnose.py [--samples 1000000] [--width 512] [--hidden 1024] [--classes 100] [--threads 2]``. Every batch is
drawn from a seed of its own each time it is read, so that all samples differ and none is kept; the time of drawing is reported
apart and is part of no phase. Before it times, it checks the use shares of a small part against PyTorch's own Jacobians in
float64.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from typing import Any

import machine
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from mmc_fast.diagnose import diagnose
from mmc_fast.diagnose.measures import blocks

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
    """N samples in batches, drawn when they are read: two modalities of different scale, labels that both know of."""

    def __init__(self, samples: int, width: int, classes: int) -> None:
        self.samples, self.width, self.classes = samples, width, classes
        self.centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(1))
        self.centres[:, width // 2 :] *= 0.5
        self.drawing = 0.0

    def __len__(self) -> int:
        return -(-self.samples // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(len(self)):
            started = time.process_time()
            rows, generator = min(BATCH, self.samples - index * BATCH), torch.Generator().manual_seed(index)
            labels = torch.randint(self.classes, (rows,), generator=generator)
            x = torch.randn(rows, self.width, generator=generator).add_(self.centres[labels], alpha=0.2)
            self.drawing += time.process_time() - started
            yield x, labels


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
    memory: dict[str, int] = {}
    last: list[Any] = ["start", time.process_time(), 0.0]

    def progress(phase: str, done: int, total: int | None) -> None:
        if phase != last[0]:
            now = time.process_time()
            phases[last[0]] = now - last[1] - (stream.drawing - last[2])
            last[:] = [phase, now, stream.drawing]
        if done in (8, total):
            memory[f"{phase} {done}"] = machine.resident() // 2**20

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
                "of them drawing": round(stream.drawing, 1),
                "by phase": {name: round(seconds, 1) for name, seconds in phases.items()},
                "samples seen": found.n_samples,
                "agop": found.settings["agop"],
                "resident MiB after batch": memory,
                "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "use shares": [str(found[f"use_share.{name}"]) for name in found.modalities],
                "torch": torch.__version__,
                "cpu": torch.backends.cpu.get_cpu_capability(),
            }
        )
    )


if __name__ == "__main__":
    main()
