"""Launches and global bytes of our kernels, counted in the guarded interpreter, against eager PyTorch, counted too.

``TRITON_INTERPRET=1 python bench/gpu_audit.py --json docs/gpu/audit.json --plot docs/img/gpu-audit.png [--only TEXT]``
runs each case once on its full size (minutes). Our bytes count every element once each way per launch, as eager's count
every operand once per operator; torch operators that a launcher calls (memsets, sums) count as launches of ours.
Which elements a launch touches does not depend on its tiles, so matrix products are counted with large ones.
Exit code 1 where a figure misses its limit.

``--check docs/gpu/audit.json`` counts two small batches instead, with the same limits on launches; drawn on to the full
batch, which every term is linear in, their bytes must be those of the record.

The projection takes the longest of arithmetic, memory and a launch of 3 µs for every launch and adds them up: a bound
from below for A100 and H100, from data sheets. No number of it was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests" / "kernels")]

import triton_guard  # noqa: E402
from gpu_counts import OperatorCount  # noqa: E402
from gpu_scenes import NARROW, Ebr, ebr_head, ebr_step, paper, precision  # noqa: E402

# data sheets: bytes/s, flop/s of float32, TF32, 16 bit and int8 without sparsity
GPUS = {
    "A100 80GB SXM": (2.039e12, {"none": 19.5e12, "tf32": 156e12, "half": 312e12, "int8": 624e12}),
    "H100 SXM": (3.35e12, {"none": 66.9e12, "tf32": 494e12, "half": 989e12, "int8": 1979e12}),
}
LAUNCH_SECONDS = 3e-6
_KINDS = {"int8": "int8", "fp32:tf32": "tf32", "fp32:ieee": "none", "bf16": "half", "fp16": "half"}


@dataclass
class Work:
    """One launch: bytes, and flops by kind of matrix unit."""

    name: str
    bytes: int
    flops: dict[str, int]

    def seconds(self, gpu: str) -> float:
        bandwidth, peaks = GPUS[gpu]
        arithmetic = sum(flops / peaks[kind] for kind, flops in self.flops.items())
        return max(arithmetic, self.bytes / bandwidth, LAUNCH_SECONDS)


@dataclass(frozen=True)
class Case:
    """A comparison: what it runs, the limits it has to keep, and the precision of ours."""

    name: str
    precision: str
    ours: Callable[[torch.dtype, int], list[tuple[str, list[Work]]]]  # of a batch
    eager: Callable[[], list[tuple[str, list[Work]]]]
    batch: int
    small: tuple[int, int]  # batches from which the full one follows
    limits: dict[str, float]  # "forward", "backward": launches; "bytes": share of eager's


def counted_eager(run: Callable[[], Any], kind: str) -> tuple[list[Work], Any]:
    with OperatorCount() as count:
        result = run()
    works = [Work(o.name, o.bytes, {"int8" if o.dtype == "torch.int8" else kind: o.flops}) for o in count.operators]
    return works, result


def counted_ours(run: Callable[[], Any]) -> tuple[list[Work], Any]:
    from mmc_fast.kernels.ebr import launch as ebr

    with triton_guard.watch(1) as watch, OperatorCount() as count, count.inside(ebr, "forward", "backward"):
        result = run()
    works = [Work(o.name, o.bytes, {}) for o in count.operators]
    for launch in watch.launches:
        flops: dict[str, int] = {}
        for kind, number in launch.dot_flops.items():
            flops[_KINDS[kind]] = flops.get(_KINDS[kind], 0) + number
        works.append(Work(launch.name, launch.global_bytes, flops))
    return works, result


def counting_tiles() -> None:
    """Fewer and larger programs in this process: the same elements, counted sooner."""
    from mmc_fast.kernels import common as configs

    for key, tile in configs.EBR_NARROW.items():
        configs.EBR_NARROW[key] = tile._replace(rows=128, hidden=256, features=128)
    for key, tile in configs.EBR_WIDE.items():
        configs.EBR_WIDE[key] = tile._replace(rows=64, columns=512, depth=512)


def ebr_eager(sizes: Ebr) -> list[tuple[str, list[Work]]]:
    from ebr_baselines import eager

    with torch.device("meta"):
        head = ebr_head(sizes, torch.float32, "meta")
        features = [torch.empty(sizes.batch, sizes.features, requires_grad=True) for _ in range(sizes.modalities)]
        upstream = [torch.empty(sizes.batch, sizes.features) for _ in range(sizes.modalities)]
        one = torch.empty(())
        forward, (recovered, first, second) = counted_eager(lambda: eager(head)(features), "none")
        backward, _ = counted_eager(
            lambda: torch.autograd.backward([*recovered, first, second], [*upstream, one, one]), "none"
        )
    return [("forward", forward), ("backward", backward)]


def ebr_ours(sizes: Ebr) -> Callable[[torch.dtype, int], list[tuple[str, list[Work]]]]:
    def run(dtype: torch.dtype, batch: int) -> list[tuple[str, list[Work]]]:
        from mmc_fast.kernels.ebr import counter as ebr_counter

        ebr_counter.take(torch.device("cpu"))  # what a process does once is not part of a step
        forward, backward = ebr_step(sizes._replace(batch=batch), dtype, "cpu", "triton")
        first, out = counted_ours(forward)
        second, _ = counted_ours(lambda: backward(out))
        return [("forward", first), ("backward", second)]

    return run


SAMPLES, INPUTS, UNITS, OUTPUTS = 65536, 256, 512, 10


def agop_eager() -> list[tuple[str, list[Work]]]:
    from agop_baselines import sum_trick

    with torch.device("meta"):
        head = torch.nn.Sequential(torch.nn.Linear(INPUTS, UNITS), torch.nn.ReLU(), torch.nn.Linear(UNITS, OUTPUTS))
        works, _ = counted_eager(lambda: sum_trick(head)(torch.empty(SAMPLES, INPUTS)), "none")
    return [("whole", works)]


def agop_ours(dtype: torch.dtype, samples: int) -> list[tuple[str, list[Work]]]:
    import mmc_fast

    head = torch.nn.Sequential(torch.nn.Linear(INPUTS, UNITS), torch.nn.ReLU(), torch.nn.Linear(UNITS, OUTPUTS)).to(
        dtype
    )
    x = torch.randn(samples, INPUTS, dtype=dtype)
    works, _ = counted_ours(lambda: mmc_fast.agop(head, x, backend="triton"))
    return [("whole", works)]


def cases() -> list[Case]:
    agop = "AGOP 1 hidden, N 65536 d 256 h 512 C 10"
    narrow = {"forward": 1, "backward": 3, "bytes": 0.12}
    found = [
        Case(agop, "tf32", agop_ours, agop_eager, SAMPLES, (1024, 2048), {"bytes": 0.05}),
        Case(
            "EBR narrow, m 5 d 128 h 256 k 64 B 4096", "fp32",
            ebr_ours(NARROW), lambda: ebr_eager(NARROW), NARROW.batch, (128, 256), narrow,
        ),
    ]  # fmt: skip
    for m in (2, 4, 8):
        limits = {"forward": 7, "backward": 14} | ({"bytes": 0.5} if m == 4 else {})
        name, sizes = f"EBR paper's widths, m {m} B 512", paper(m)
        found.append(
            Case(name, "tf32", ebr_ours(sizes), lambda sizes=sizes: ebr_eager(sizes), sizes.batch, (64, 128), limits)
        )
    return found


def check(case: Case, stored: dict[str, Any]) -> list[str]:
    """What two small batches say against the record: launches over their limit, bytes that lead elsewhere."""
    start = time.perf_counter()
    with precision(case.precision) as dtype:
        low, high = (dict(case.ours(dtype, batch)) for batch in case.small)
    problems = []
    for phase, works in high.items():
        if len(works) > case.limits.get(phase, len(works)) or len(works) != stored["ours"]["launches"][phase]:
            problems.append(f"{phase}: {len(works)} launches, recorded {stored['ours']['launches'][phase]}")
        few, many = (sum(work.bytes for work in run[phase]) for run in (low, high))
        first, second = case.small
        led = few + (many - few) * (case.batch - first) / (second - first)
        if abs(led - stored["ours"]["bytes"][phase]) > 0.005 * led:
            problems.append(f"{phase}: leads to {led:.0f} bytes, recorded {stored['ours']['bytes'][phase]}")
    if "bytes" in case.limits and stored["byte_ratio"] > case.limits["bytes"]:
        problems.append(f"recorded {stored['byte_ratio']} of eager's bytes, limit {case.limits['bytes']}")
    print(f"{case.name}: {'; '.join(problems) or 'as recorded'}, {time.perf_counter() - start:.0f} s", flush=True)
    return problems


def audit(case: Case) -> dict[str, Any]:
    """Counts of both sides, their ratio, the projection and what misses a limit."""
    start = time.perf_counter()
    with precision(case.precision) as dtype:
        ours = case.ours(dtype, case.batch)
    eager = case.eager()
    row: dict[str, Any] = {"case": case.name, "precision": case.precision, "limits": case.limits}
    for side, phases in (("ours", ours), ("eager", eager)):
        works = [work for _, part in phases for work in part]
        row[side] = {
            "launches": {phase: len(part) for phase, part in phases},
            "bytes": {phase: sum(work.bytes for work in part) for phase, part in phases},
            "flops": sum(sum(work.flops.values()) for work in works),
            "names": [work.name for work in works] if side == "ours" else None,
            "projected_us": {gpu: round(1e6 * sum(w.seconds(gpu) for w in works), 1) for gpu in GPUS},
        }
    total = {side: sum(row[side]["bytes"].values()) for side in ("ours", "eager")}
    row["byte_ratio"] = round(total["ours"] / total["eager"], 4)
    row["problems"] = [
        f"{phase}: {row['ours']['launches'][phase]} launches, limit {limit:.0f}"
        for phase, limit in case.limits.items()
        if phase != "bytes" and row["ours"]["launches"][phase] > limit
    ]
    if "bytes" in case.limits and row["byte_ratio"] > case.limits["bytes"]:
        row["problems"].append(f"{row['byte_ratio']:.3f} of eager's bytes, limit {case.limits['bytes']}")
    sizes = f"{total['ours'] / 1e6:.0f} MB against {total['eager'] / 1e6:.0f} MB ({row['byte_ratio']}), "
    launches = f"launches {row['ours']['launches']} against {row['eager']['launches']}"
    print(f"{case.name}: {launches}, {sizes}{time.perf_counter() - start:.0f} s", flush=True)
    return row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Launches and bytes of both sides, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 0.7 * len(rows) + 1.4), sharey=True)
    for axis, key, title, scale in ((axes[0], "launches", "launches", 1), (axes[1], "bytes", "global memory, MB", 1e6)):
        for offset, side, colour in ((-0.2, "eager", "#b0b0b0"), (0.2, "ours", "#2f6f9f")):
            values = [sum(row[side][key].values()) / scale for row in rows]
            bars = axis.barh([i + offset for i in range(len(rows))], values, 0.38, color=colour, label=side)
            axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=8)
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False, fontsize=8)
    figure.suptitle("Counted on a CPU: eager PyTorch against the Triton kernels", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--check", type=Path, help="count small batches and compare with this record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    import triton_guard  # noqa: F401  before any kernel

    counting_tiles()
    chosen = [case for case in cases() if options.only in case.name]
    if options.check:
        recorded = {row["case"]: row for row in json.loads(options.check.read_text())}
        for case in chosen:
            if case.name not in recorded:
                print(f"note: {case.name} is not in the record yet; make gpu-report enters it")
        found = [f"{c.name}: {p}" for c in chosen if c.name in recorded for p in check(c, recorded[c.name])]
        for problem in found:
            print(f"error: {problem}", file=sys.stderr)
        return 1 if found or not recorded.keys() & {case.name for case in chosen} else 0
    rows = [audit(case) for case in chosen]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        before = json.loads(options.json.read_text()) if options.only and options.json.exists() else []
        fresh_rows = {row["case"]: row for row in before + rows}
        rows = [fresh_rows[case.name] for case in cases() if case.name in fresh_rows]
        fresh = options.json.with_suffix(".new")
        fresh.write_text(json.dumps(rows, indent=1) + "\n")
        os.replace(fresh, options.json)
    if options.plot:
        plot(rows, options.plot)
    problems = [f"{row['case']}: {problem}" for row in rows for problem in row["problems"]]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
