"""Peak memory of one candidate of one row by the operating system, for ``bench_agop.py --memory``.

Linux only. A process of its own for each, because memory that one candidate has touched stays with a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["peak_of"]


def peak_of(row: str, candidate: str) -> float:
    """MiB that one run of the candidate needs beyond its inputs, at the highest moment."""
    # a fixed threshold, so that what was freed goes back to the system and is not taken for free memory of the next run
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(Path(__file__)), row, candidate]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{row}: memory of {candidate}: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.split()[-1])


def _resident(field: str) -> int:
    """KiB of VmRSS or VmHWM: getrusage's peak of a new process starts at that of the process which started it."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0])


def _measure(row_name: str, candidate: str) -> float:
    import torch
    from bench_agop import ROWS, candidates

    torch.set_num_threads(1)
    row = next(row for row in ROWS if row.name == row_name)
    run = candidates(row)[candidate]
    if candidate not in row.slow or candidate.endswith("_compiled"):
        run()  # compiling, and whatever libraries set up once
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _resident("VmRSS")
    kept = run()
    peak = _resident("VmHWM") - before
    del kept
    return peak / 1024


if __name__ == "__main__":
    print(f"{_measure(*sys.argv[1:]):.1f}")
