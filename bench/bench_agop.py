"""Speed of the AGOP against what an expert would write, and against the forward product.

``python bench/bench_agop.py``                  every row: correctness, then ratios beside what was recorded
``python bench/bench_agop.py --row NAME``       one row; ``--list`` names them
``python bench/bench_agop.py --gate``           exit code 1 above a gate; ``--record`` writes what the gates come from
``pytest bench/bench_agop.py --benchmark-only``  the same rows through pytest-benchmark

Candidates of a row run in turn in one process and the best CPU time of each counts: a busy machine disturbs all alike.
``NAME_compiled`` is the baseline NAME under torch.compile, compiled before the clock starts; ``--no-compile`` leaves
those out. ``--memory`` adds what one run of each candidate adds to the resident memory at most.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import correctness
import gate
import machine
import torch
from agop_baselines import BASELINES, sum_trick
from torch import Tensor, nn

from mmc_fast.agop.accumulator import agop
from mmc_fast.ops import dispatch as backends
from mmc_fast.ops import native as library
from mmc_fast.ops.agop import op as primitives

INEXACT = ("forward", "onednn_forward", "ours_probe", "torch_probe")  # not a G, or one with noise
Candidate = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One line of the table. ``targets``: (numerator, denominator, limit), the largest ratio of best times allowed."""

    name: str
    n: int
    d: int
    h: int
    outputs: int
    candidates: tuple[str, ...]
    targets: tuple[gate.Target, ...]
    activation: type[nn.Module] = nn.ReLU
    depth: int = 1
    threads: int = 1
    isa: str | None = None
    slow: tuple[str, ...] = ()  # candidates that run once, compiled or not
    compiled: tuple[str, ...] = ()  # baselines that also run under torch.compile

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.candidates, *(f"{name}_compiled" for name in self.compiled))

    def runs_once(self, name: str) -> bool:
        return name.removesuffix("_compiled") in self.slow


ROWS = (
    Row("relu", 8192, 256, 512, 10,
        ("ours", "forward", "onednn_forward", "closed_form", "int8", "sum_trick", "jacrev"),
        (("ours", "forward", 1.20), ("ours", "int8", 1 / 1.4), ("ours", "sum_trick", 1 / 19)),
        slow=("sum_trick", "jacrev"), compiled=("closed_form", "int8", "sum_trick", "jacrev")),
    Row("relu_long", 65536, 256, 512, 10, ("ours", "forward", "onednn_forward", "closed_form"),
        (("ours", "forward", 1.10),), compiled=("closed_form",)),
    Row("relu_wide", 8192, 512, 1024, 100, ("ours", "forward", "onednn_forward", "closed_form", "int8", "sum_trick"),
        (("ours", "forward", 1.32), ("ours", "sum_trick", 1 / 150)), slow=("sum_trick",),
        compiled=("closed_form", "int8")),
    Row("gelu", 8192, 256, 512, 10, ("ours", "closed_form", "forward", "sum_trick"),
        (("ours", "closed_form", 1 / 1.3),), nn.GELU, slow=("sum_trick",),
        compiled=("closed_form", "sum_trick")),
    Row("deep", 8192, 256, 512, 10, ("ours", "ours_bf16", "ours_probe", "row_chain", "sum_trick", "torch_probe"),
        (("ours", "sum_trick", 1 / 1.2), ("ours_bf16", "sum_trick", 1 / 2.2), ("ours_probe", "sum_trick", 1 / 6.5),
         ("ours_probe", "torch_probe", 1 / 1.2)), depth=2, slow=("row_chain", "sum_trick"),
        compiled=("row_chain", "sum_trick", "torch_probe")),
    *(Row(f"popcount_{h}", 16384, 0, h, 0, ("counts_rate",), (("counts_rate", "register_rate", 1 / share),))
      for h, share in ((512, 0.45), (1024, 0.55), (2048, 0.65), (4096, 0.68))),
    Row("popcount_avx2", 65536, 0, 1024, 0, ("counts_rate", "syrk_rate"), (("counts_rate", "syrk_rate", 1 / 5),),
        isa="avx2"),
    Row("two_threads", 65536, 256, 512, 10, ("ours", "forward"), (("gemm_scaling", "ours_scaling", 1 / 0.93),),
        threads=2),
)  # fmt: skip


def make_head(row: Row) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    widths = [row.d, *[row.h] * row.depth, row.outputs]
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        linear = nn.Linear(a, b)
        with torch.no_grad():
            for p in linear.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / a**0.5)
        layers += [linear] if i == len(widths) - 2 else [linear, row.activation()]
    return nn.Sequential(*layers)


def samples(row: Row, head: nn.Sequential) -> Tensor:
    """The inputs ``[n, d]`` of a row, none of whose pre-activations lies at a kink."""
    generator = torch.Generator().manual_seed(1)
    exact = copy.deepcopy(head).double()
    return correctness.away_from_kinks(exact, exact, lambda n: torch.randn(n, row.d, generator=generator), row.n)


def candidates(row: Row) -> dict[str, Candidate]:
    """The functions to time; each does one whole job."""
    generator = torch.Generator().manual_seed(1)
    if not row.d:  # counting with as little of a product before it as there can be: one input
        one, unit = torch.randn(row.n, 1, generator=generator), torch.randn(row.h, 1, generator=generator)
        counts, flag = torch.zeros(row.h, row.h, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        rows = torch.randn(row.n // 16, row.h, generator=generator)
        both: dict[str, Candidate] = {
            "counts_rate": lambda: primitives.relu_coactivation_update(one, unit, None, counts, flag, backend="cpp"),
            "syrk_rate": lambda: rows.t() @ rows,
        }
        return {name: both[name] for name in row.candidates}
    head = make_head(row)
    x = samples(row, head)
    weight, bias, out = head[0].weight.detach(), head[0].bias.detach(), torch.empty(row.n, row.h)
    everything: dict[str, Candidate] = {
        "ours": lambda: agop(head, x),
        "ours_bf16": lambda: agop(head, x, precision="bf16"),
        "ours_probe": lambda: agop(head, x, probes=1),
        "forward": lambda: torch.mm(x, weight.t(), out=out),
        "onednn_forward": lambda: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""),
    }
    for name in (*row.candidates, *row.compiled):
        if name in BASELINES:
            everything[name] = partial(BASELINES[name](head), x)
    for name in row.compiled:
        everything[f"{name}_compiled"] = partial(BASELINES[name](head, compiled=True), x)
    return {name: everything[name] for name in row.names}


def check(row: Row) -> None:
    """Refuse to time a wrong result: every exact candidate against float64 on a part of the samples."""
    if not row.d:
        z, counts = (
            torch.randn(450, 50, generator=torch.Generator().manual_seed(2)),
            torch.zeros(50, 50, dtype=torch.int64),
        )
        primitives.relu_coactivation_update(
            z, torch.eye(50), None, counts, torch.zeros(1, dtype=torch.int64), backend="cpp"
        )
        active = (z > 0).long()
        if not torch.equal(counts, torch.triu(active.t() @ active)):
            raise SystemExit(f"{row.name}: the counts are wrong, so no speed is reported")
        return
    small = replace(row, n=200, candidates=tuple({**dict.fromkeys(row.candidates), "ours": None}), compiled=())
    head = make_head(small)
    x = samples(small, head)
    truth = sum_trick(copy.deepcopy(head).double())(x.double())
    for name, run in candidates(small).items():
        if name not in INEXACT:
            _refuse_wrong(row, name, run(), truth, eager_errors(head, x, truth, "bf16" in name))


def eager_errors(head: nn.Sequential, x: Tensor, truth: Tensor, low: bool = False) -> correctness.Errors:
    """The errors of the sum trick, eagerly in float32 or, where ``low``, under bfloat16 autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        return correctness.errors([sum_trick(head)(x)], [truth])


def check_compiled(row: Row, runs: dict[str, Candidate]) -> None:
    """The same for compiled candidates, against our own result in the shape that is timed; this compiles them."""
    if not row.compiled:
        return
    head = make_head(row)
    x = samples(row, head)
    ours = agop(head, x)
    eager = eager_errors(head, x, ours)
    for name, run in runs.items():
        if name.endswith("_compiled"):
            result = run()
            if name.removesuffix("_compiled") not in INEXACT:
                _refuse_wrong(row, name, result, ours, eager)


def _refuse_wrong(row: Row, name: str, result: object, truth: Tensor | None, eager: correctness.Errors) -> None:
    got = result if isinstance(result, Tensor) else None
    dtype = torch.bfloat16 if "bf16" in name else torch.float32
    why = correctness.refused(name, correctness.errors([got], [truth]), eager, dtype)
    if why:
        raise SystemExit(f"{row.name}: {why}; no speed is reported")


def register_rate() -> float:
    """Bit multiply-adds per second of counting on registers alone, on the instruction set that runs; needs g++."""
    flags = {"avx2": ["-mavx2"], "avx512_vpopcntdq": ["-mavx512f", "-mavx512vpopcntdq"]}.get(
        library.current_isa() or ""
    )
    if flags is None or shutil.which("g++") is None:
        return float("nan")
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/register_rate"
        source = str(Path(__file__).parent / "register_rate.cpp")
        subprocess.run(["g++", "-O3", "-std=c++17", *flags, source, "-o", program], check=True)
        return float(subprocess.run([program], capture_output=True, text=True, check=True).stdout)


def measure(row: Row, rounds: int, memory: bool = False) -> dict:
    """Best time of every candidate, in turn; returns times in milliseconds, ratios, and what ran."""
    check(row)
    torch.set_num_threads(row.threads)
    runs = candidates(row)
    check_compiled(row, runs)
    repeats: dict[str, list[float]] = {name: [] for name in runs}
    alone: dict[str, list[float]] = {name: [] for name in runs}
    backends.reset_ran()
    begin = machine.Moment.now()
    for round_index in range(rounds + 1):  # the first round warms up
        for name, run in runs.items():
            if row.runs_once(name) and round_index != 1:
                continue
            for threads, taken in ((row.threads, repeats), *(((1, alone),) if row.threads > 1 else ())):
                torch.set_num_threads(threads)
                start = gate.clock(row.threads)
                run()
                seconds = gate.clock(row.threads) - start
                if round_index:
                    taken[name].append(seconds)
    load = gate.load_since(begin, row.threads, repeats.values())
    ran = backends.ran()
    torch.set_num_threads(1)
    values = {name: 1e3 * min(taken) for name, taken in repeats.items()}
    if not row.d:  # milliseconds per multiply-add of the upper triangle
        work = row.h * (row.h + 1) / 2 * row.n
        values = {name: value / (work / (16 if name == "syrk_rate" else 1)) for name, value in values.items()}
        values["register_rate"] = 1e3 / register_rate()
    if row.threads > 1:
        values["ours_scaling"], values["gemm_scaling"] = (min(alone[k]) / min(repeats[k]) for k in ("ours", "forward"))
    ratios = gate.ratios(row.targets, values)
    peaks = {name: machine.peak_bytes(run) / 2**20 for name, run in runs.items()} if memory and row.d else {}
    return {"row": row.name, "N": row.n, "d": row.d, "h": row.h, "C": row.outputs, "threads": row.threads,
            "isa": library.current_isa(), "ran": ran, "load": load, "milliseconds": values,
            "ratios": ratios, "peak_mib": peaks}  # fmt: skip


def measured(row: Row, rounds: int, memory: bool) -> dict:
    with nullcontext() if row.isa is None else library.forced_isa(row.isa):
        return measure(row, rounds, memory)


def show(result: dict) -> None:
    shape = " ".join(f"{key} {result[key]}" for key in ("N", "d", "h", "C"))
    if result["d"]:
        times = ", ".join(
            f"{k} {v:.2f}" + ("x" if "scaling" in k else " ms") for k, v in result["milliseconds"].items()
        )
    else:
        times = ", ".join(
            f"{k.removesuffix('_rate')} {1e-9 / v:.2f}e12 MAC/s" for k, v in result["milliseconds"].items() if v > 0
        )
    print(f"{result['row']} ({shape}, {result['threads']} thread(s), {result['isa']}): {times}")
    if result["peak_mib"]:
        print("    peak memory, MiB: " + ", ".join(f"{k} {v:.0f}" for k, v in result["peak_mib"].items()))
    print(f"    ran: {result['ran']}")


def main(argv: list[str] | None = None) -> int:
    parser = gate.parser(__doc__, [row.name for row in ROWS], rounds=15)
    parser.add_argument("--memory", action="store_true", help="also the peak memory of each candidate of the table")
    options = gate.begin(parser, argv, library.unavailable_reason())
    results = []
    for row in gate.chosen(ROWS, options):
        if row.isa and row.isa not in library.supported_isas():
            print(f"{row.name}: skipped, this processor has no {row.isa}")
            continue
        chosen = replace(row, compiled=()) if options.no_compile else row
        results.append(gate.tried(partial(measured, chosen, options.rounds, options.memory), "agop", options.record))
        show(results[-1])
    return gate.finish("agop", results, options)


def pytest_generate_tests(metafunc) -> None:
    gate.by_candidate(metafunc, [(row, name) for row in ROWS for name in row.names])


def test_speed(benchmark, row: Row, candidate: str) -> None:
    """One candidate of one row; the record says which backend and instruction set ran."""
    if row.isa and row.isa not in library.supported_isas():
        import pytest

        pytest.skip(f"this processor has no {row.isa}")
    check(row)
    with library.forced_isa(row.isa or library.current_isa() or ""):
        kept = row.compiled if candidate.endswith("_compiled") else ()
        runs = {candidate: candidates(replace(row, compiled=kept))[candidate]}
        check_compiled(row, runs)
        run, once = runs[candidate], row.runs_once(candidate)
        backends.reset_ran()
        gate.benchmarked(benchmark, run, row.threads, rounds=2 if once else 7, warm=not once)
        benchmark.extra_info.update(
            ran=backends.ran(), isa=library.current_isa(), N=row.n, d=row.d, h=row.h, C=row.outputs
        )


if __name__ == "__main__":
    raise SystemExit(main())
