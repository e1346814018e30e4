"""Everything that a GPU has to answer, in at most 8 minutes and one JSON file: right, free of races, faster or not.

``python bench/device_check.py out.json`` on a machine with a GPU; ``--dry-run`` runs the same code on the CPU with torch's
backends and small shapes. Each section is a process of its own, so that an illegal access does not end the others, and
the file is written after each. ``table`` has one row per op, shape and precision of this device class: ``backend`` is the
faster one where both are right, by plain calls and by CUDA graphs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from mmc_fast._util.atomic import write_json  # noqa: E402
from mmc_fast.cli import device_bench, device_selftest  # noqa: E402
from mmc_fast.cli.device_bench import SIDES, Shape, make_case, measure, precision  # noqa: E402
from mmc_fast.ops import measured  # noqa: E402
from mmc_fast.ops.dispatch import ran  # noqa: E402

TINY = (
    Shape("EBR step, narrow", 16, 12, 16, 2, 8, (8,)),
    Shape("AGOP, one hidden ReLU layer", 64, 6, 9, outputs=3),
)
EBR_PRECISIONS = ("float32", "tf32", "bfloat16")
MINUTES = 8.0
# share of the time until which each section may run: the later ones inherit what the earlier did not use
SECTIONS = {"selftest": 0.3, "races": 0.45, "times": 0.75, "compiled": 1.0}


def cases(shapes: Sequence[Shape]) -> Iterator[tuple[Shape, str]]:
    """What is timed: EBR in every precision, AGOP in float32."""
    for shape in shapes:
        for name in EBR_PRECISIONS if shape.psi else ("float32",):
            yield shape, name


def selftest(device: torch.device, sizes: Sequence[tuple[int, int, int]], deadline: float) -> dict[str, Any]:
    """Every op, backend and dtype against float64; float32 once with TF32 allowed and once without."""
    found = {}
    for name, dtypes in (("float32", device_selftest.DTYPES), ("tf32", [torch.float32])):
        with precision(name):
            found[name] = [vars(row) for row in device_selftest.device_selftest(device, dtypes, sizes, deadline)]
    rows = list(itertools.chain.from_iterable(found.values()))
    late = sum(row["detail"] == "not run: no time left" for row in rows)
    return {"checks": found, "failed": sum(not row["passed"] for row in rows), "not_run": late}


def differing(run: Callable[[], list[Tensor]], repeats: int, device: torch.device) -> int:
    """Of ``repeats`` results, those that are not bitwise the first; on two streams in turn, where there are streams."""
    first = [t.clone() for t in run()]
    streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []
    if streams:
        torch.cuda.synchronize(device)
    flags = []
    for n in range(repeats):
        with torch.cuda.stream(streams[n % 2] if streams else None):  # None: as it is
            flags.append(torch.stack([(a != b).any() for a, b in zip(run(), first, strict=True)]).any())
    if streams:
        torch.cuda.synchronize(device)
    return int(torch.stack(flags).sum())


def races(device: torch.device, shapes: Sequence[Shape], repeats: int, deadline: float) -> list[dict[str, Any]]:
    """Bitwise repetition of every workload in deterministic mode, where any difference is a race."""
    rows = []
    for shape, name in cases(shapes):
        row: dict[str, Any] = {"name": shape.name, "precision": name, "repeats": repeats, "problem": "no time left"}
        rows.append(row)
        if time.monotonic() > deadline:
            continue
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            with precision(name) as dtype:
                row |= {"differing": differing(make_case(device, shape, dtype).ours, repeats, device), "problem": None}
        except RuntimeError as error:
            row["problem"] = " ".join(str(error).split())[:200]
        finally:
            torch.use_deterministic_algorithms(False)
    return rows


def times(
    device: torch.device, shapes: Sequence[Shape], sides: Sequence[str], compiler: str, deadline: float
) -> list[dict[str, Any]]:
    """One row per workload; those that the deadline leaves no time for say so."""
    rows: list[dict[str, Any]] = []
    for shape, name in cases(shapes):
        if time.monotonic() > deadline:
            rows.append({"name": shape.name, "precision": name, "problem": "no time left", "sides": {}})
        else:
            rows.append(measure(device, shape, name, sides, compiler))
    return rows


def section(name: str, dry: bool, deadline: float) -> dict[str, Any]:
    """Run one section here."""
    device = torch.device("cpu" if dry else "cuda")
    shapes, compiler = (TINY, "eager") if dry else (device_bench.SHAPES, "inductor")
    if name == "selftest":
        return selftest(device, [(15, 17, 16)] if dry else device_selftest.SIZES, deadline)
    if name == "races":
        return {"rows": races(device, shapes, 3 if dry else 200, deadline)}
    sides = ("compiled",) if name == "compiled" else [side for side in SIDES if side != "compiled"]
    return {"rows": times(device, shapes, sides, compiler, deadline), "ran": ran()}


def in_process(name: str, dry: bool, deadline: float) -> dict[str, Any]:
    """Run one section in a new process, which may crash or hang."""
    left = deadline - time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "section.json"
        command = [sys.executable, __file__, str(path), "--section", name, "--minutes", str(left / 60)]
        try:
            done = subprocess.run(
                [*command, *(["--dry-run"] if dry else [])], capture_output=True, text=True, timeout=max(left, 1) + 20
            )
        except subprocess.TimeoutExpired:
            return {"problem": "ran out of time"}
        if not path.is_file():
            return {"problem": f"ended with {done.returncode}: {' '.join(done.stderr.split())[-300:]}"}
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found


def check(
    out: Path, dry: bool, minutes: float = MINUTES, run: Callable[[str, bool, float], dict[str, Any]] = in_process
) -> dict[str, Any]:
    """All sections; the file is whole after each."""
    begun = time.monotonic()
    found: dict[str, Any] = {"dry_run": dry, "minutes": minutes}
    found["environment"] = device_bench.environment(torch.device("cpu" if dry else "cuda"))
    for name, share in SECTIONS.items():
        found[name] = run(name, dry, begun + 60 * minutes * share)
        found["seconds"] = round(time.monotonic() - begun, 1)
        write_json(out, found)
    rows = found["times"].get("rows", [])
    for row, more in zip(rows, found.pop("compiled").get("rows", []), strict=False):
        row["sides"] |= more["sides"]
    found["right"] = is_right(found["selftest"], found["races"])
    found["table"] = measured.table(rows, found["right"], "auto" if dry else "triton")
    if not dry:  # what auto reads from now on
        found["table_file"] = str(measured.write(found["environment"]["device"], found["table"]))
    write_json(out, found)
    return found


def is_right(tests: dict[str, Any], raced: dict[str, Any]) -> bool:
    """Whether both sections ended, every check of theirs ran and passed, and no repetition differed."""
    if "problem" in tests or "problem" in raced or tests["failed"] or tests["not_run"]:
        return False
    return not any(row["problem"] or row["differing"] for row in raced["rows"])


def main(arguments: Sequence[str] | None = None) -> int:
    """0: everything is right; 1: something is not; 2: no GPU here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="the same on the CPU, with small shapes")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if not given.dry_run and not torch.cuda.is_available():
        print("device_check needs a GPU and torch sees none; --dry-run runs it on the CPU", file=sys.stderr)
        return 2
    if given.section:
        found = section(given.section, given.dry_run, time.monotonic() + 60 * given.minutes)
        write_json(given.out, found)
        return 0
    found = check(given.out, given.dry_run, given.minutes, section if given.dry_run else in_process)
    print(f"{'right' if found['right'] else 'WRONG'} after {found['seconds']} s; {given.out}")
    return 0 if found["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
