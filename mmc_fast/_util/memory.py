"""Memory: what is there, and the refusal of what cannot fit, before it is asked for."""

from __future__ import annotations

import os
from pathlib import Path

from mmc_fast.errors import InputError

_LIMITS = (  # of the control group that this process runs in: most, and in use
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available_memory() -> int | None:
    """Bytes that this process can still get, swap not counted; None where the system does not say."""
    found = []
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(1024 * int(line.split()[1]))
    for most, used in _LIMITS:
        limit, now = _text(most).strip(), _text(used).strip()
        if limit.isdecimal() and now.isdecimal():
            found.append(max(0, int(limit) - int(now)))
    if not found and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=None)


def check_memory(needed: float, what: str, advice: str) -> None:
    """Raise InputError where ``what`` needs more bytes than there are."""
    there = available_memory()
    if there is not None and needed > there:
        raise InputError(f"{what} would take {needed / 1e9:.3g} GB and {there / 1e9:.3g} GB are free; {advice}")


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
