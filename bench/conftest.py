"""Benchmarks time CPU work of this process, on one thread unless a row says otherwise."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config) -> None:
    if hasattr(config.option, "benchmark_timer"):
        from pytest_benchmark.utils import NameWrapper

        config.option.benchmark_timer = NameWrapper(time.thread_time)
