"""What all Triton kernels share: whether they can run, how float32 products are rounded, tiles, and the launch itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

__all__ = [
    "DTYPES",
    "Launches",
    "Tile",
    "active_driver",
    "cdiv",
    "input_precision",
    "launch",
    "padded",
    "product_kind",
    "relaunch",
    "splits",
    "triton_version",
    "usable",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BFLOAT16_PRODUCTS = not _INTERPRETED  # the stock interpreter multiplies their bits as integers
PROGRAMS = 264  # about two per multiprocessor of an H100; fewer tiles than this are split along the samples


class Tile(NamedTuple):
    """``blocks``: the constexpr sizes by name; warps per program, stages of the pipeline, registers to a thread at most."""

    blocks: dict[str, int]
    warps: int
    stages: int
    registers: int | None = None  # None: ptxas decides, which may spill a few bytes to run one block more

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        options = {**self.blocks, "num_warps": self.warps, "num_stages": self.stages}
        return options if self.registers is None else {**options, "maxnreg": self.registers}


def triton_version() -> tuple[int, ...]:
    """Major and minor number of the installed Triton."""
    return tuple(map(int, triton.__version__.split(".")[:2]))


def usable(tensors: Sequence[Tensor]) -> str | None:
    """Say why the kernels cannot run on these tensors, None where they can."""
    if triton_version() < (3, 7):  # older ones were never compiled or interpreted
        return f"Triton {triton.__version__} is installed and the kernels need 3.7 or newer"
    devices = {tensor.device for tensor in tensors}
    types = {device.type for device in devices}
    if os.environ.get("TRITON_INTERPRET") == "1":
        if not types <= {"cpu"}:
            return "TRITON_INTERPRET=1 interprets kernels on CPU tensors only"
    elif not torch.cuda.is_available():
        return "Triton kernels need a GPU and torch sees none (TRITON_INTERPRET=1 interprets them, for tests)"
    elif not types <= {"cuda"}:
        return f"Triton kernels need tensors on the GPU and got {', '.join(sorted(types))}"
    elif len(devices) > 1:
        return f"Triton kernels need tensors on one GPU and got {', '.join(sorted(map(str, devices)))}"
    wrong = {t.dtype for t in tensors if t.is_floating_point()} - set(DTYPES)
    return f"they compute in float32, bfloat16 and float16 and a tensor is {wrong.pop()}" if wrong else None


def input_precision(dtype: torch.dtype = torch.float32) -> str:
    """``input_precision`` of ``tl.dot``: for float32 ``"tf32"`` where torch's settings allow it, else ``"tf32x3"``.

    The latter splits both operands into a TF32 number and the rest and leaves out the product of the rests: tensor cores
    do it, a product ``a b`` is off by at most ``2⁻²¹ |a b|``, and sums are of float32. Other dtypes: "ieee".
    ``torch.backends.cuda.matmul.fp32_precision`` also shows what ``torch.set_float32_matmul_precision``, ``allow_tf32`` or
    ``torch.backends.fp32_precision`` set.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def product_kind(dtype: torch.dtype) -> str:
    """Key of the tables of tiles: ``"half"`` for 16-bit operands, else the precision that float32 products may have."""
    return input_precision() if dtype == torch.float32 else "half"


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up; ``triton.cdiv`` takes the host microseconds."""
    return -(-a // b)


def padded(width: int) -> int:
    """The next power of two that a matrix unit takes."""
    return max(16, 1 << (width - 1).bit_length())


def splits(tiles: int, rows: int, smallest: int) -> int:
    """Into how many parts to cut ``rows``, so that ``tiles`` of each fill the machine; at least ``smallest`` rows each."""
    return max(1, min(-(-PROGRAMS // max(1, tiles)), rows // smallest))


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, reaches: Sequence[Tensor] = (), **options: Any
) -> Any:
    """Launch on ``device`` and its current stream; returns the compiled kernel, None in the interpreter.

    Triton by itself launches on torch's current device. ``reaches``: tensors whose addresses lie in memory that the kernel reads; they must outlive the launch, and the
    sanitizer of the tests looks at them.
    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return kernel[grid](*args, **options)
    with torch.cuda.device(device):
        return kernel[grid](*args, **options)


def active_driver() -> Any:
    """Triton's driver, to whose device and context compiled kernels belong; None in the interpreter, which has none."""
    return None if _INTERPRETED else triton.runtime.driver.active


def relaunch(compiled: Any, grid: tuple[int, int, int], device: torch.device, args: tuple[Any, ...]) -> None:
    """Launch a compiled kernel with all arguments in order, constants too, of the types and alignments that it has.

    What ``kernel[grid]`` does after it has found the compiled kernel, which takes it longer than all the rest.
    """
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            relaunch(compiled, grid, device, args)
        return
    driver, hooks = triton.runtime.driver.active, triton.knobs.runtime
    stream = driver.get_current_stream(driver.get_current_device())
    compiled.run(
        *grid, stream, compiled.function, compiled.packed_metadata, compiled.launch_metadata(grid, stream, *args),
        hooks.launch_enter_hook, hooks.launch_exit_hook, *args,
    )  # fmt: skip


class Launches:
    """The launches of one call in order, on ``device``.

    ``compiled``: by number what earlier calls of the same kind launched, each with its grid and constants; with ``relaunches``
    it is launched again without a look-up. ``reached``: see :func:`launch`.
    """

    def __init__(self, device: torch.device, compiled: dict[int, Any], relaunches: bool) -> None:
        self.device, self.compiled, self.relaunches = device, compiled, relaunches
        self.launched = 0
        self.reached: list[Tensor] = []

    def launch(self, kernel: Any, programs: int | tuple[int, ...], *args: Any, **options: Any) -> None:
        """Launch ``programs``, a number or a grid; none of an empty grid."""
        number, self.launched = self.launched, self.launched + 1
        if self.relaunches and (ready := self.compiled.get(number)) is not None:
            relaunch(ready[0], ready[1], self.device, args + ready[2])
            return
        grid = (programs,) if isinstance(programs, int) else programs
        if not all(grid):
            return
        compiled = launch(kernel, grid, self.device, *args, reaches=self.reached, **options)
        if self.relaunches and compiled is not None:
            constants = tuple(options[name] for name in kernel.arg_names[len(args) :])
            self.compiled[number] = compiled, (*grid, 1, 1)[:3], constants
