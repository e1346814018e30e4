"""Benchmarks time CPU work of this process, on one thread unless a row says otherwise."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config) -> None:
    if hasattr(config.option, "benchmark_timer"):
        config.option.benchmark_timer = "time.thread_time"
