"""A lower bound of the time of launches on an H100, from what the interpreter counted of them. Nothing here was measured.

For each launch its own time plus the longest of three, in whole waves: products at ``OF_PEAK`` of the peak, bytes of memory
at ``OF_MEMORY`` of its bandwidth, bytes of the second-level cache at its. A wave is a program for every multiprocessor:
programs that reside on one together share what it does in a second.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

# An H100 SXM by its data sheet: multiprocessors, bytes a second of memory, operations a second by kind of operand; the second-level
# cache as measured by others
MULTIPROCESSORS, MEMORY, CACHE = 132, 3.35e12, 5.5e12
PEAK = {"fp32:tf32x3": 495e12 / 3, "fp32:tf32": 495e12, "bf16": 989e12, "fp16": 989e12, "int8": 1979e12}
OF_PEAK, OF_MEMORY = 0.6, 0.8  # what good kernels reach
LAUNCH, LAUNCH_IN_GRAPH = 3.0, 1.5  # microseconds


class Work(NamedTuple):
    """An operator, or a launch of ours, of which more is known."""

    name: str
    bytes: float  # between chip and memory
    flops: Mapping[str, float] = MappingProxyType({})
    cache_bytes: float = 0.0
    programs: float = 0.0  # with work to do; 0: not known

    def at(self, other: Work, step: float) -> Work:
        """This one, of a small batch, and ``other``, of a larger one, extended: ``self + step (other - self)``."""

        def line(a: float, b: float) -> float:
            return a + step * (b - a)

        flops = {kind: line(n, other.flops[kind]) for kind, n in self.flops.items()}
        numbers = {
            name: line(getattr(self, name), getattr(other, name)) for name in ("bytes", "cache_bytes", "programs")
        }
        return self._replace(flops=flops, **numbers)

    def microseconds(self) -> tuple[float, str]:
        """Least time without that of the launch, and what bounds it."""
        bounds = {
            "products": sum(n / PEAK[kind] for kind, n in self.flops.items()) / OF_PEAK,
            "memory": self.bytes / MEMORY / OF_MEMORY,
            "cache": self.cache_bytes / CACHE,
        }
        bound = max(bounds, key=lambda name: bounds[name])
        waves = math.ceil(self.programs / MULTIPROCESSORS) * MULTIPROCESSORS / self.programs if self.programs else 1.0
        return 1e6 * bounds[bound] * waves, bound


def roofline(works: list[Work]) -> dict[str, Any]:
    """Sums of the launches, their least time with and without a CUDA graph; of each its programs, bound and microseconds."""
    rows, total = [], 0.0
    for work in works:
        time, bound = work.microseconds()
        total += time
        rows.append([work.name, round(work.programs), bound, round(time, 1)])
    return {
        "GFLOP": round(sum(sum(work.flops.values()) for work in works) / 1e9, 1),
        "memory_MB": round(sum(work.bytes for work in works) / 1e6),
        "cache_MB": round(sum(work.cache_bytes for work in works) / 1e6),
        "microseconds": round(total + LAUNCH * len(works)),
        "in_graph": round(total + LAUNCH_IN_GRAPH * len(works)),
        "launches": rows,
    }
