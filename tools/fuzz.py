"""Repeat every test that draws its inputs with new seeds until the time is over: ``make fuzz MINUTES=10``.

The first seed is drawn, or given with ``--seed``; each round takes the next one. A failure ends it with exit code 1 and
the line that repeats it.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    first = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    end, seed = time.monotonic() + 60 * options.minutes, first
    while time.monotonic() < end:
        command = [
            "-m",
            "pytest",
            "-m",
            "fuzz",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            f"--seed={seed}",
            f"--hypothesis-seed={seed}",
        ]
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
            print(done.stdout[-6000:], done.stderr[-2000:], sep="\n")
            print(f"repeat: python -m pytest {' '.join(map(repr, failed))} --seed={seed} --hypothesis-seed={seed}")
            return 1
        print(f"seed {seed}: {done.stdout.strip().splitlines()[-1]}", flush=True)
        seed += 1
    print(f"{seed - first} round(s) from seed {first}, nothing found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
