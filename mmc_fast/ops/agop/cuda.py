"""The CUDA library of co-activation counts: loaded once, called on the current stream, every return code checked."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from . import signs

_LIBRARY = Path(__file__).resolve().parents[2] / "libmmc_cuda.so"
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_CHUNK_BYTES = 256 << 20  # of pre-activations that live at a time
_MOST_ROWS = 1 << 29  # samples of one launch: 32-bit sums cannot overflow
_OLDEST = (8, 0)


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    if not _LIBRARY.exists():
        return None, "the CUDA library was not built (no nvcc at installation, or MMC_WITH_CUDA=0)"
    try:
        library = ctypes.CDLL(str(_LIBRARY))
    except OSError as error:
        return None, f"the CUDA library did not load ({str(error).splitlines()[0]}): build again"
    pointer, number, whole = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    pack = (pointer, whole, number, number, number, number, pointer, number, pointer, pointer)
    library.mmc_cuda_pack_signs.argtypes = pack
    library.mmc_cuda_coactivation.argtypes = (pointer, number, number, pointer, number, whole, pointer)
    library.mmc_cuda_error_text.argtypes = (whole,)
    library.mmc_cuda_error_text.restype = ctypes.c_char_p
    return library, ""


def unusable_reason(tensors: Sequence[Tensor]) -> str | None:
    """Say why the CUDA kernels cannot run on these tensors, None where they can."""
    library, reason = _load()
    if library is None:
        return reason
    devices = library.mmc_cuda_devices()
    if devices <= 0:
        text = "no device" if devices == 0 else library.mmc_cuda_error_text(-devices).decode()
        return f"the CUDA library finds no GPU ({text})"
    if not torch.cuda.is_available():
        return "this torch was built without CUDA or sees no GPU"
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"CUDA kernels need tensors on the GPU and one is on {tensor.device}"
        if tensor.is_floating_point() and tensor.dtype not in _DTYPES:
            return f"it packs float32, float16 and bfloat16 and a tensor is {tensor.dtype}"
        if torch.cuda.get_device_capability(tensor.device) < _OLDEST:
            return f"{torch.cuda.get_device_name(tensor.device)} is older than compute capability 8.0"
    return None


def relu_coactivation_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, nonfinite: Tensor, chunk_rows: int = 0, plain: bool = False
) -> None:  # fmt: skip
    """Add the co-activation counts of ``z = x Wᵀ + b`` to the upper triangle of ``counts``.

    A chunk is a float64 product by cuBLAS, a look at the signs that it leaves open (which waits for the device), and two
    launches: signs to bits, bits to counts. ``plain`` takes popcounts in place
    of the int8 matrix units. Raises ``RuntimeError`` with CUDA's text where a launch fails.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(reason)
    units = weight.shape[0]
    rows = min(chunk_rows or max(1024, _CHUNK_BYTES // max(1, 8 * units)), _MOST_ROWS)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        for part in x.split(rows):
            z = signs.active(part, weight, bias, nonfinite).to(torch.float16)  # [n, h]
            pitch = 4 * -(-part.shape[0] // 128)
            words = torch.empty(units, pitch, dtype=torch.int32, device=x.device)
            _check(
                library.mmc_cuda_pack_signs(
                    z.data_ptr(), _DTYPES[z.dtype], *z.shape, *z.stride(), words.data_ptr(), pitch,
                    nonfinite.data_ptr(), stream,
                ), library,
            )  # fmt: skip
            _check(
                library.mmc_cuda_coactivation(
                    words.data_ptr(), units, pitch, counts.data_ptr(), counts.stride(0), int(plain), stream
                ), library,
            )  # fmt: skip


def _check(code: int, library: ctypes.CDLL) -> None:
    if code:
        raise RuntimeError(f"relu_coactivation_update: CUDA error {code}: {library.mmc_cuda_error_text(code).decode()}")
