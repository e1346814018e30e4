"""Triton's CPU interpreter made strict: what a GPU would get wrong, or leave undefined, is an error here.

Import this before any kernel module, in a process started with ``TRITON_INTERPRET=1``; launches inside ``watch()`` are
checked and counted::

    from mmc_fast.testing import triton_guard

    with triton_guard.watch(seed=7) as watch:
        launcher(...)
    print(watch.launches[0].read_bytes)

Checked: every address lies in an element of a tensor argument, aligned; no two programs touch one element unless both
only read, both use atomics, or an atomic of the whole device orders what precedes a barrier of the one before what follows a
barrier of the other, past the first-level cache; no two lanes of one store meet; what a program does to an element that it
loaded, stored or added to comes after a barrier, but for a tile that goes back where it came from; counters start at zero;
``tl.dot`` has the depth that CUDA asks for, masks are booleans and claims of alignment true. Made true: bfloat16 arithmetic and
rounding, TF32 operands, ``tl.maximum`` and ``tl.minimum`` that swallow NaN, masked-off lanes that hold garbage. Programs
run in shuffled order. Not modelled: threads within a program beyond that, shared memory, the order of floating sums, special functions.
"""

from __future__ import annotations

import os
import sys

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton.language as _tl
from triton.runtime.interpreter import InterpretedFunction as _InterpretedFunction

if not isinstance(_tl.cdiv, _InterpretedFunction):
    raise RuntimeError(
        "triton_guard: Triton was imported for compilation in this process; start it with TRITON_INTERPRET=1"
    )

from mmc_fast.kernels import common as _common

from triton_guard import launches as _launches
from triton_guard import numerics as _numerics
from triton_guard.launches import Launch, Watch, watch
from triton_guard.memory import GuardFault

_common.BFLOAT16_PRODUCTS = True
_numerics.install()
_launches.install()

__all__ = ["GuardFault", "Launch", "Watch", "watch"]
