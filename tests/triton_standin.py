"""A stand-in for Triton's driver: launches from CPU tensors are recorded, nothing is compiled and nothing runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

__all__ = ["Recorder", "standin"]


class _Driver:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Recorder:
    """``launches``: names in order; ``calls``: name, grid and arguments; ``compiled``: name and key of each, once."""

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.calls: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []
        self.compiled: list[tuple[str, str]] = []


class _Compiled:
    function, packed_metadata = 0, (8, 1, 0)

    def __init__(self, name: str, recorder: Recorder) -> None:
        self.name, self.recorder = name, recorder

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        self.recorder.launches.append(self.name)
        self.recorder.calls.append((self.name, args[:3], args[9:]))


@contextmanager
def standin() -> Iterator[Recorder]:
    """Inside the block ``backend="triton"`` of the EBR step takes CPU tensors."""
    from mmc_fast.ops import dispatch

    recorder = Recorder()

    def compile_(self: Any, key: str, signature: Any, device: int, *rest: Any) -> _Compiled:
        compiled = _Compiled(self.fn.__name__, recorder)
        self.device_caches[device][0][key] = compiled
        recorder.compiled.append((self.fn.__name__, key))
        return compiled

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "_do_compile", compile_)
        patch.setitem(dispatch._checks["ebr_step"], "triton", lambda *args: None)
        before = driver._active
        driver.set_active(_Driver())
        try:
            yield recorder
        finally:
            driver._active = before
            for kernel in _kernels():
                kernel.device_caches.clear()


def _kernels() -> Iterator[JITFunction]:
    from mmc_fast.kernels.ebr import products, rows

    for module in (products, rows):
        yield from (k for k in vars(module).values() if isinstance(k, JITFunction))
