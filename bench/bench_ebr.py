"""Speed and memory of the EBR step against what an expert would write, and against its bare multiplications.

``python bench/bench_ebr.py``                    every row: correctness, then ratios beside what was recorded
``python bench/bench_ebr.py --row NAME``         one row; ``--list`` names them
``python bench/bench_ebr.py --gate``             exit code 1 above a gate; ``--record`` writes what the gates come from
``python bench/bench_ebr.py --grid``             never slower than the best of eager, compiled and stacked; float32, then
                                                 bfloat16 autocast
``pytest bench/bench_ebr.py --benchmark-only``   the same rows through pytest-benchmark

A step is the forward pass and all gradients (features and parameters), λ = 1, reconstruction on. Candidates of a row
run in turn in one process and the best CPU time of each counts: a busy machine disturbs all alike. ``floor`` is the
step's multiplications by ``torch.mm(out=)`` and nothing else. ``--no-compile`` leaves out ``compiled``. The peak of a
candidate is what one step adds to the resident memory of the process at most.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import correctness
import gate
import machine
import torch
from ebr_baselines import BASELINES, Step, floor
from torch import Tensor

from mmc_fast.experiments.training import TrainConfig
from mmc_fast.experiments.training.model import MultimodalModel
from mmc_fast.experiments.training.steps import Stepper
from mmc_fast.nn import EBRConfig, EBRHead, EBROutput
from mmc_fast.ops import dispatch as backends
from mmc_fast.ops import native as library
from mmc_fast.ops.ebr import op as ebr_ops

BURST = 0.01  # seconds of one candidate before the next has its turn
Candidate = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table. ``targets``: (numerator, denominator, limit), the largest ratio of best times allowed."""

    name: str
    m: int
    d: int
    h: int
    k: int
    psi: tuple[int, ...]
    batch: int
    candidates: tuple[str, ...]
    targets: tuple[gate.Target, ...] = ()
    threads: int = 1


ROWS = (
    Row("small3", 3, 32, 64, 16, (32, 16), 32, ("ours", "ours_recompute", "eager", "compiled", "stacked", "floor"),
        (("ours", "eager", 1 / 3), ("ours", "compiled", 1 / 2.2))),
    Row("small2", 2, 64, 128, 32, (64, 32), 64, ("ours", "ours_recompute", "eager", "compiled", "stacked", "floor"),
        (("ours", "eager", 1 / 2.2), ("ours", "compiled", 1 / 1.8))),
    Row("wide2", 2, 128, 1024, 512, (512, 256), 64,
        ("ours", "ours_bf16", "eager", "compiled", "autocast", "floor", "floor_bf16"),
        (("ours", "floor", 1.05), ("ours_bf16", "floor_bf16", 1.15))),
    Row("paper", 4, 128, 1024, 512, (512, 256), 512,
        ("ours", "ours_half", "ours_recompute", "ours_bf16", "ours_autocast", "eager", "compiled", "autocast", "floor",
         "floor_bf16"),
        (("ours", "floor", 1.03), ("ours_autocast", "autocast", 1 / 1.15), ("ours_half", "ours", 0.62),
         ("ours_recompute", "ours", 1.35), ("bytes_ours", "bytes_eager", 0.85),
         ("bytes_ours_recompute", "bytes_eager", 0.16))),
    Row("six", 6, 768, 1024, 512, (512, 256), 256,
        ("ours", "ours_bf16", "ours_autocast", "eager", "compiled", "autocast", "floor", "floor_bf16"),
        (("ours", "floor", 1.03), ("ours_autocast", "autocast", 1 / 1.2))),
    Row("two_threads", 4, 128, 1024, 512, (512, 256), 512, ("ours", "floor"),
        (("floor_scaling", "ours_scaling", 1 / 0.93),), threads=2),
    Row("train", 4, 128, 256, 64, (64, 32), 64, ("train_ours", "train_eager"), (("train_ours", "train_eager", 1.0),)),
)  # fmt: skip

SIDES = {
    "float32": ("ours", "eager", "compiled", "stacked"),
    "bfloat16": ("ours_autocast", "autocast", "compiled_autocast", "stacked_autocast"),
}
GRID = tuple(
    Row(f"grid_{dtype}_{d}_{h}_{k}_m{m}_B{batch}", m, d, h, k, (k, max(1, k // 2)), batch, sides)
    for (dtype, sides), (d, h, k), m, batch in product(
        SIDES.items(), ((32, 64, 16), (128, 256, 64), (128, 1024, 512)), (1, 2, 5, 8), (1, 32, 512, 4096)
    )
)


class Job:
    """The tensors of a row and its candidates: each runs one whole step and leaves gradients at its leaves."""

    def __init__(self, row: Row) -> None:
        torch.manual_seed(0)
        self.row = row
        self.head = EBRHead([row.d] * row.m, row.k, row.h, row.psi)
        self.low = EBRHead([row.d] * row.m, row.k, row.h, row.psi).bfloat16()
        self.low.load_state_dict(self.head.state_dict())
        self.exact = EBRHead([row.d] * row.m, row.k, row.h, row.psi, backend="reference").double()
        self.exact.load_state_dict(self.head.state_dict())
        self.truths: dict[bool, list[Tensor]] = {}
        generator = torch.Generator().manual_seed(1)
        x = correctness.away_from_kinks(
            self.exact,
            lambda samples: BASELINES["eager"](self.exact)(samples.unbind(1)),
            lambda count: torch.randn(count, row.m, row.d, generator=generator),
            row.batch,
        )
        self.x = [part.contiguous().requires_grad_() for part in x.unbind(1)]
        self.cotangents = [torch.randn(row.batch, row.d, generator=generator) / row.batch for _ in range(row.m)]
        self.half = torch.rand(row.batch, row.m, generator=generator) < 0.5
        self.one = torch.ones(())

    def step(self, name: str) -> Step:
        if not name.startswith("ours"):
            base = name.removesuffix("autocast").rstrip("_") or "eager"
            make = BASELINES["eager" if base == "compiled" else base](self.head)
            return torch.compile(make) if base == "compiled" else make
        present = self.half if name == "ours_half" else None

        def ours(features):
            self.head.recompute = name == "ours_recompute"
            out = (self.low if name == "ours_bf16" else self.head)(features, present)
            return out.recovered, out.discrimination_loss, out.reconstruction_loss

        return ours

    def candidate(self, name: str) -> Candidate:
        if name.startswith("floor"):
            return floor(self.head, self.row.batch, torch.bfloat16 if name == "floor_bf16" else torch.float32)
        if name.startswith("train"):
            return training_step(self.row, eager=name == "train_eager")
        step = self.step(name)
        autocast = name.endswith("autocast")
        low = name == "ours_bf16"
        features = [x.detach().bfloat16().requires_grad_() for x in self.x] if low else self.x
        head = self.low if low else self.head
        cotangents = [c.bfloat16() for c in self.cotangents] if autocast or low else self.cotangents

        leaves = [*features, *head.parameters()]
        given = [*cotangents, self.one, self.one]

        def run() -> list[Tensor]:
            for leaf in leaves:
                leaf.grad = None
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                recovered, discrimination, reconstruction = step(features)
            outputs = [*recovered, discrimination, reconstruction]
            torch.autograd.backward(outputs, given)
            return outputs

        run.leaves = leaves  # type: ignore[attr-defined]
        return run

    def results(self, name: str) -> list[Tensor]:
        """Outputs, then gradients of features and parameters, of one step of a candidate."""
        run = self.candidate(name)
        return [*run(), *(leaf.grad for leaf in run.leaves)]  # type: ignore[attr-defined, misc]

    def truth(self, half: bool) -> list[Tensor]:
        """The same by the reference in float64; ``half``: with half of the rows absent."""
        if half not in self.truths:
            x = [f.detach().double().requires_grad_() for f in self.x]
            out = self.exact(x, self.half if half else None)
            outputs = [*out.recovered, out.discrimination_loss, out.reconstruction_loss]
            given = [*(c.double() for c in self.cotangents), self.one.double(), self.one.double()]
            self.truths[half] = [*outputs, *torch.autograd.grad(outputs, [*x, *self.exact.parameters()], given)]
        return self.truths[half]

    def peak_bytes(self, name: str) -> int:
        """What one step adds to the resident memory at its highest."""
        run = self.candidate(name)
        run()
        for leaf in run.leaves:  # type: ignore[attr-defined]
            leaf.grad = None
        return machine.peak_bytes(run)

    def saved_bytes(self, name: str) -> int:
        """Bytes that the forward pass keeps for backward, parameters left out."""
        parameters = {p.data_ptr() for p in self.head.parameters()}
        seen: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            seen[t.data_ptr()] = max(seen.get(t.data_ptr(), 0), t.numel() * t.element_size())
            return t

        autocast = torch.autocast("cpu", torch.bfloat16, enabled=name.endswith("autocast"))
        with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            kept = self.step(name)(self.x)
        del kept
        return sum(size for pointer, size in seen.items() if pointer not in parameters)


def training_step(row: Row, eager: bool) -> Candidate:
    """One step of the standard loop, optimiser included, with the native head or with the eager one in its place."""
    torch.manual_seed(0)
    sizes = EBRConfig(latent_dim=row.k, hidden_dim=row.h, psi_dims=row.psi, reconstruction=0.1)
    config = TrainConfig(encoder_dim=row.d, ebr=sizes)
    model = MultimodalModel({f"x{i}": row.d for i in range(row.m)}, 10, config)
    if eager:
        plain = BASELINES["eager"](model.head)

        def forward(features, present=None, source=None, reversal=1.0, normalizer=None):
            recovered, discrimination, reconstruction = plain(features)
            return EBROutput(recovered, features[0].new_zeros(1), discrimination, reconstruction)

        model.head.forward = forward
    stepper = Stepper(model, torch.optim.Adam(model.parameters(), 1e-3), config)
    stepper.reversal.fill_(1.0)
    features = [torch.randn(row.batch, row.d) for _ in range(row.m)]
    labels = torch.randint(0, 10, (row.batch,))

    def run() -> None:
        stepper.backward("joint", labels, lambda rows: features)
        stepper.update("joint")

    return run


def check(job: Job, names: tuple[str, ...]) -> None:
    """Refuse to time a wrong result: outputs and gradients of every candidate against the float64 reference."""
    eager: dict[torch.dtype, correctness.Errors] = {}
    for name in names:
        if name.startswith(("floor", "train")):
            continue
        low = "bf16" in name or "autocast" in name
        dtype = torch.bfloat16 if low else torch.float32
        if dtype not in eager:
            eager[dtype] = correctness.errors(job.results("autocast" if low else "eager"), job.truth(False))
        found = correctness.errors(job.results(name), job.truth(name == "ours_half"))
        why = correctness.refused(name, found, eager[dtype], dtype)
        if why:
            raise SystemExit(f"{job.row.name}: {why}; no speed is reported")
    job.truths.clear()


def measure(row: Row, rounds: int, seconds: float) -> dict:
    """Best time of every candidate, in turn, for ``rounds`` rounds or ``seconds``, whichever is longer (at most x 40)."""
    job = Job(row)
    check(job, row.candidates)
    runs = {name: job.candidate(name) for name in row.candidates}
    counts = (1, row.threads) if row.threads > 1 else (1,)
    repeats: dict[tuple[str, int], list[float]] = {(name, threads): [] for name in runs for threads in counts}
    backends.reset_ran()
    start_of_all = machine.Moment.now()
    begin, done = time.monotonic(), 0
    while done <= rounds or (time.monotonic() - begin < seconds and done < 40 * rounds):
        for name, run in runs.items():
            for threads in counts:
                torch.set_num_threads(threads)
                left = BURST
                while left > 0:  # a short step runs often, so that it finds its code and data in cache, as in training
                    start = gate.clock(row.threads)
                    run()
                    taken = gate.clock(row.threads) - start
                    left -= taken
                    if done:  # the first round warms up
                        repeats[name, threads].append(taken)
        done += 1
    load = gate.load_since(start_of_all, row.threads, repeats.values())
    torch.set_num_threads(1)
    times = {key: min(taken) for key, taken in repeats.items()}
    ran = {key: count for key, count in backends.ran().items() if key.startswith("ebr")}
    values = {name: 1e3 * times[name, row.threads] for name in runs}
    if row.threads > 1:
        values |= {f"{name}_scaling": times[name, 1] / times[name, row.threads] for name in runs}
    sides = [name for name in runs if not name.startswith(("floor", "train"))]
    saved = {name: job.saved_bytes(name) for name in sides if "compiled" not in name and name != "ours_bf16"}
    peak = {name: job.peak_bytes(name) for name in sides}
    numbers = {**values, **{f"bytes_{name}": size for name, size in saved.items()}}
    ratios = gate.ratios(row.targets, numbers)
    shape = {key: getattr(row, key) for key in ("m", "d", "h", "k", "psi", "batch", "threads")}
    return {"row": row.name, **shape, "rounds": done, "isa": library.current_isa(), "ran": ran, "load": load,
            "milliseconds": values, "saved_bytes": saved, "peak_bytes": peak, "ratios": ratios}  # fmt: skip


def without_compiled(row: Row) -> Row:
    return replace(row, candidates=tuple(name for name in row.candidates if "compiled" not in name))


def grid(options: argparse.Namespace) -> list[dict]:
    """Every point of the grid against the fastest of the others."""
    out = []
    for row in GRID:
        if options.dtype and f"_{options.dtype}_" not in row.name:
            continue
        chosen = without_compiled(row) if options.no_compile else row
        out.append(gate.tried(partial(against_best, chosen, options), "ebr", options.record))
        show(out[-1])
    return out


def against_best(row: Row, options: argparse.Namespace) -> dict:
    result = measure(row, options.rounds, options.seconds)
    times = result["milliseconds"]
    times["best"] = min(times[n] for n in row.candidates[1:])
    return result | {"ratios": gate.ratios([(row.candidates[0], "best", 1.0)], times)}


def megabytes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items())


def show(result: dict) -> None:
    shape = ", ".join(f"{key} {result[key]}" for key in ("m", "d", "h", "k", "psi", "batch"))
    times = ", ".join(f"{k} {v:.3f}" + ("x" if "scaling" in k else " ms") for k, v in result["milliseconds"].items())
    print(f"{result['row']} ({shape}, {result['threads']} thread(s), {result['isa']}): {times}", flush=True)
    if result["saved_bytes"]:
        print("    saved for backward: " + megabytes(result["saved_bytes"]))
    if result["peak_bytes"]:
        print("    peak: " + megabytes(result["peak_bytes"]))
    print(f"    ran: {result['ran']}")


def main(argv: list[str] | None = None) -> int:
    parser = gate.parser(__doc__, [row.name for row in ROWS], rounds=7)
    parser.add_argument("--grid", action="store_true", help="48 shapes against the best of eager, compiled, stacked")
    parser.add_argument("--dtype", choices=tuple(SIDES), help="of the grid; both where left out")
    parser.add_argument("--seconds", type=float, default=4.0, help="measure short steps at least that long")
    options = gate.begin(parser, argv, ebr_ops._native_reason)
    results = grid(options) if options.grid else []
    for row in () if options.grid else gate.chosen(ROWS, options):
        chosen = without_compiled(row) if options.no_compile else row
        measured = partial(measure, chosen, options.rounds, options.seconds)
        results.append(gate.tried(measured, "ebr", options.record))
        show(results[-1])
    return gate.finish("ebr", results, options)


def pytest_generate_tests(metafunc) -> None:
    gate.by_candidate(metafunc, [(row, name) for row in ROWS for name in row.candidates])


def test_speed(benchmark, row: Row, candidate: str) -> None:
    """One candidate of one row; the record says which backend and instruction set ran."""
    job = Job(row)
    check(job, (candidate,))
    run = job.candidate(candidate)
    backends.reset_ran()
    gate.benchmarked(benchmark, run, row.threads, rounds=7)
    benchmark.extra_info.update(ran=backends.ran(), isa=library.current_isa(), **vars(row))


if __name__ == "__main__":
    raise SystemExit(main())
