"""The processor class that a recorded figure belongs to, and whether the machine is too busy to judge by what it shows."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

VENDORS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel", "HygonGenuine": "Hygon"}
SETS = {
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "vpopcntdq": {"avx512_vpopcntdq"},
    "bf16": {"avx512_bf16"},
    "amx": {"amx_tile", "amx_bf16"},
    "neon": {"asimd"},
    "sve": {"sve"},
}
# what makes a processor act as an older one, for this library and for torch
LIMITS = ("MMC_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")


def fields(cpuinfo: str) -> dict[str, str]:
    """The fields of the first processor in the text of ``/proc/cpuinfo``."""
    lines = (line.partition(":") for line in cpuinfo.strip().split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def processor_class(cpuinfo: str, environ: Mapping[str, str]) -> str:
    """Vendor, instruction sets that kernels choose by, and the limits set in the environment: ``"AMD avx2 avx512"``."""
    found = fields(cpuinfo)
    vendor = found.get("vendor_id") or found.get("CPU implementer") or platform.machine() or "unknown"
    flags = set((found.get("flags") or found.get("Features") or "").split())
    sets = [name for name, needed in SETS.items() if needed <= flags]
    limits = [f"{name}={environ[name]}" for name in LIMITS if environ.get(name)]
    return " ".join([VENDORS.get(vendor, vendor), *sets, *limits])


def this_cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def this_class() -> str:
    return processor_class(this_cpuinfo(), os.environ)


def name() -> str:
    """The name of this machine's processor, with family and model where the name says little."""
    found = fields(this_cpuinfo())
    model = found.get("model name") or platform.processor() or platform.machine()
    family = f" (family {found['cpu family']}, model {found['model']})" if {"cpu family", "model"} <= set(found) else ""
    return model + family


def resident(mark: str = "VmRSS") -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most since :func:`peak_bytes` began (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(mark))


def peak_bytes(run: Callable[[], object]) -> int:
    """What one call adds to the resident memory at its highest; what earlier calls have freed goes back to the system first."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins anew
    before = resident()
    kept = run()
    peak = max(0, resident("VmHWM") - before)
    del kept
    return peak


@dataclass(frozen=True)
class Moment:
    """Counters at one time, in seconds: wall, CPU of this process, and, of all processors, busy, stolen and all time."""

    wall: float
    own: float
    busy: float | None = None
    steal: float = 0.0
    total: float = 0.0

    @classmethod
    def now(cls) -> Moment:
        stat = Path("/proc/stat")
        rest: tuple[float | None, float, float] = (None, 0.0, 0.0)
        if stat.exists():
            tick = os.sysconf("SC_CLK_TCK")
            user, nice, system, idle, iowait, irq, softirq, steal = (
                int(v) / tick for v in stat.read_text().split("\n", 1)[0].split()[1:9]
            )
            busy = user + nice + system + irq + softirq
            rest = (busy, steal, busy + idle + iowait + steal)
        return cls(time.perf_counter(), time.process_time(), *rest)


@dataclass(frozen=True)
class Load:
    """What else went on during a measurement.

    ``others``: processors kept busy by other processes; ``steal``: share of time that the hypervisor gave to others;
    ``wall``: wall time / CPU time of this process (0: not known, several threads); ``spread``: median / best time of a
    candidate, less 1, the largest of a row.
    """

    processors: int
    threads: int
    others: float
    steal: float
    wall: float
    spread: float

    def reasons(self) -> list[str]:
        """Why nothing should be judged by this measurement, in words; empty on a quiet machine."""
        found = []
        if self.threads + self.others > self.processors + 0.25:
            found.append(f"other processes keep {self.others:.1f} of {self.processors} processors busy")
        if self.steal > 0.05:
            found.append(f"{self.steal:.0%} of the time is stolen by other virtual machines")
        if self.wall > 1.2:
            found.append(f"the clock ran {self.wall:.2f} times as long as this process")
        if self.spread > 0.3:
            found.append(f"repeats spread by {self.spread:.0%}")
        return found


def between(start: Moment, end: Moment, processors: int, threads: int, spread: float) -> Load:
    """The load between two moments."""
    wall, own = end.wall - start.wall, end.own - start.own
    if start.busy is None or end.busy is None:  # no /proc/stat: the average of a minute, which counts this process too
        others, steal = max(0.0, os.getloadavg()[0] - threads), 0.0
    else:
        others = max(0.0, (end.busy - start.busy - own) / max(wall, 1e-9))
        steal = (end.steal - start.steal) / max(end.total - start.total, 1e-9)
    return Load(processors, threads, others, steal, wall / max(own, 1e-9) if threads == 1 else 0.0, spread)
