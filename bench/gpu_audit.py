"""Launches and global bytes of our kernels, counted in the sanitizing interpreter, against eager PyTorch, counted too; and a
lower bound of their time that follows from the counts (``gpu_roofline.py``).

``TRITON_INTERPRET=1 python bench/gpu_audit.py --check docs/gpu/audit.json`` compares with the record, ``--json FILE`` writes
one. Our bytes count every element once each way per launch, eager's every operand once per operator; torch operators that
a launcher calls (memsets, sums) count as launches of ours. Every term is linear in the batch, in whole tiles, so two small
batches lead to the full one. Exit code 1 where a figure misses its limit or the record. Nothing here was measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_roofline import Work, roofline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests" / "kernels")]

_ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
Works = dict[str, list[Work]]  # phase: launches or operators


class OperatorCount(TorchDispatchMode):
    """Inside the block every ATen operator is entered in ``operators``, but for views and allocations.

    An operand counts with the elements that it holds in memory: a dimension that was only expanded counts once.
    Works on tensors of the meta device, where nothing is computed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Work] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace != "aten":  # an op of a library: see `inside`
            return out
        name = func._schema.name.removeprefix("aten::")
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        if name not in _ALLOCATIONS and not _is_view(func, inputs, outputs):
            operands = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape): t for t in inputs + outputs}
            self.operators.append(Work(name, sum(map(_bytes, operands.values()))))
        return out

    @contextmanager
    def inside(self, module: Any, *names: str) -> Iterator[None]:
        """Count also what these functions of a module do when a library's op calls them, out of sight of the mode."""
        originals = {name: getattr(module, name) for name in names}

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return function(*args, **kwargs)

            return call

        try:
            for name, function in originals.items():
                setattr(module, name, counted(function))
            yield
        finally:
            for name, function in originals.items():
                setattr(module, name, function)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    if func._schema.is_mutable or not outputs:
        return False
    places = {t.untyped_storage()._cdata for t in inputs}
    return all(t.untyped_storage()._cdata in places for t in outputs)


def _bytes(tensor: Tensor) -> int:
    held = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        held *= size if stride or size == 0 else 1
    return held * tensor.element_size()


class Case(NamedTuple):
    """A comparison: what both sides do, at which batch, and the limits on ours."""

    name: str
    precision: str
    ours: Callable[[torch.dtype, int], Works]  # of a batch
    eager: Callable[[torch.dtype], Works]
    batch: int
    small: tuple[int, int]  # batches from which the full one follows
    limits: dict[str, float]  # "forward", "backward": launches; "bytes": share of eager's; GFLOP


def counted_ours(run: Callable[[], Any]) -> tuple[list[Work], Any]:
    import triton_guard
    from mmc_fast.kernels.ebr import launch as ebr

    with triton_guard.watch(1) as watch, OperatorCount() as count, count.inside(ebr, "forward", "backward"):
        result = run()
    launches = [
        Work(
            launch.name, launch.global_bytes, launch.dot_flops, launch.loaded_bytes + launch.stored_bytes, launch.working,
        )
        for launch in watch.launches
    ]  # fmt: skip
    return [*count.operators, *launches], result


def ebr_case(name: str, precision: str, sizes: Any, limits: dict[str, float]) -> Case:
    """Forward and backward of an EBR step."""
    from ebr_baselines import eager
    from gpu_scenes import ebr_head, ebr_step

    def ours(dtype: torch.dtype, batch: int) -> Works:
        from mmc_fast.kernels.ebr import launch

        forward, backward = ebr_step(sizes._replace(batch=batch), dtype)
        original = launch.shares

        def as_in_full(rows: int, *rest: int) -> int:
            """As many shares of a weight gradient as the full batch has."""
            return original(rows * sizes.batch // batch, *rest)

        launch.shares = as_in_full
        try:
            first, out = counted_ours(forward)
            return {"forward": first, "backward": counted_ours(lambda: backward(out))[0]}
        finally:
            launch.shares = original

    def theirs(dtype: torch.dtype) -> Works:
        with torch.device("meta"):
            head, m = ebr_head(sizes, dtype), sizes.modalities
            features = [torch.empty(sizes.batch, sizes.features, dtype=dtype, requires_grad=True) for _ in range(m)]
            upstream = [*map(torch.empty_like, features), torch.empty(()), torch.empty(())]
            with OperatorCount() as forward:
                recovered, first, second = eager(head)(features)
            with OperatorCount() as backward:
                torch.autograd.backward([*recovered, first, second], upstream)
        return {"forward": forward.operators, "backward": backward.operators}

    return Case(f"EBR, {name}", precision, ours, theirs, sizes.batch, (128, 256), limits)


def agop_case(samples: int, inputs: int, units: int, outputs: int, limits: dict[str, float]) -> Case:
    """AGOP of a head with one hidden layer."""
    from agop_baselines import sum_trick

    import mmc_fast

    def head() -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(inputs, units), torch.nn.ReLU(), torch.nn.Linear(units, outputs))

    def ours(dtype: torch.dtype, batch: int) -> Works:
        model, x = head().to(dtype), torch.randn(batch, inputs, dtype=dtype)
        return {"whole": counted_ours(lambda: mmc_fast.agop(model, x, backend="triton"))[0]}

    def theirs(dtype: torch.dtype) -> Works:
        with torch.device("meta"), OperatorCount() as count:
            model = head()
            count.operators.clear()
            sum_trick(model)(torch.empty(samples, inputs))
        return {"whole": count.operators}

    name = f"AGOP, one hidden layer, N {samples} d {inputs} h {units} C {outputs}"
    return Case(name, "fp32", ours, theirs, samples, (3456, 6912), limits)  # as many splits of the samples as in full


def cases() -> Iterator[Case]:
    from gpu_scenes import Ebr

    yield agop_case(65536, 256, 512, 10, {"whole": 6, "bytes": 0.05})
    launches = {"forward": 8, "backward": 7}
    narrow, paper = Ebr(5, 128, 256, 64, (64,), 4096), Ebr(4, 128, 1024, 512, (512, 256), 512)
    for precision in ("fp32", "tf32", "bf16"):
        yield ebr_case("m 5 d 128 h 256 k 64 B 4096", precision, narrow, launches | {"bytes": 0.5, "GFLOP": 14})
        yield ebr_case("the paper's widths, m 4 B 512", precision, paper, launches | {"bytes": 0.5})


def audit(case: Case) -> dict[str, Any]:
    """Counts of both sides at the full batch, their ratio, the roofline, and what misses a limit."""
    from gpu_scenes import precision

    with precision(case.precision) as dtype:
        low, high = (case.ours(dtype, batch) for batch in case.small)
        eager = case.eager(dtype)
    step = (case.batch - case.small[0]) / (case.small[1] - case.small[0])
    full = {phase: [a.at(b, step) for a, b in zip(low[phase], high[phase], strict=True)] for phase in low}
    counts = [
        {
            "launches": {phase: len(part) for phase, part in run.items()},
            "bytes": {phase: round(sum(work.bytes for work in part)) for phase, part in run.items()},
        }
        for run in (full, eager)
    ]
    ours, theirs = (sum(side["bytes"].values()) for side in counts)
    row = {
        "case": case.name,
        "precision": case.precision,
        "limits": case.limits,
        "ours": counts[0],
        "eager": counts[1],
        "byte_ratio": round(ours / theirs, 3),
        "roofline": roofline([work for part in full.values() for work in part]),
    }
    found = counts[0]["launches"] | {"bytes": row["byte_ratio"]}
    found["GFLOP"] = row["roofline"]["GFLOP"]
    row["problems"] = [f"{k}: {found[k]}, limit {limit}" for k, limit in case.limits.items() if found[k] > limit]
    print(f"{case.name}, {case.precision}: {found}", flush=True)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--check", type=Path, help="record to compare with: what differs is an error")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    import triton_guard  # noqa: F401  before any kernel

    rows = [audit(case) for case in cases()]
    problems = [f"{row['case']}: {problem}" for row in rows for problem in row["problems"]]
    if options.check:
        recorded = json.loads(options.check.read_text())
        problems += [f"{row['case']}, {row['precision']}: not as recorded" for row in rows if row not in recorded]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
