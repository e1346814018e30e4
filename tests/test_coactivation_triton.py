"""The Triton co-activation kernel under its CPU interpreter, in a process of its own: it is chosen at import."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: pip install 'mmc-fast[triton]'")

_SCRIPT = """
import sys
import torch
from mmc_fast.kernels import agop as kernels
from mmc_fast.ops import agop, backends
from mmc_fast.reference import coactivation as reference

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(int(sys.argv[1]))
for n, d, h in [(1, 1, 1), (65, 3, 63), (130, 5, 65), (257, 8, 129)]:
    active = (torch.rand(n, h, generator=generator) < 0.4).to(torch.int8)
    marked = torch.full((h, h), -7, dtype=torch.int64)
    kernels.coactivation_fwd(active, marked)
    product = active.long().t() @ active.long()
    assert torch.equal(marked.triu(), (product - 7).triu()), (n, h, "upper triangle")
    assert torch.equal(marked.tril(-1), torch.full((h, h), -7).tril(-1)), (n, h, "below the diagonal")
    wide = torch.full((n, 2 * h + 3), 1, dtype=torch.int8)  # ones around the data: a read past an edge would count
    wide[:, 2 : 2 * h + 2 : 2] = active
    counts = torch.zeros(h, h, dtype=torch.int64)
    kernels.coactivation_fwd(wide[:, 2 : 2 * h + 2 : 2], counts)
    assert torch.equal(counts, product.triu()), (n, h, "strides")

    x = torch.randn(n, d, generator=generator)
    weight, bias = torch.randn(h, d, generator=generator), torch.randn(h, generator=generator)
    results = []
    for run in ("triton", "torch"):
        counts, flag = torch.zeros(h, h, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        assert agop.relu_coactivation_update(x, weight, bias, counts, flag, chunk_rows=100, backend=run) == run
        assert flag.item() == 0
        results.append(counts)
    assert torch.equal(*results), (n, d, h, "update")
    x[n // 2, d // 2] = float("nan")
    flag = torch.zeros(1, dtype=torch.int64)
    agop.relu_coactivation_update(x, weight, bias, counts, flag, backend="triton")
    assert flag.item() > 0, "NaN"
empty = torch.zeros(4, 4, dtype=torch.int64)
kernels.coactivation_fwd(torch.zeros(0, 4, dtype=torch.int8), empty)
assert empty.sum() == 0
assert backends.ran()["relu_coactivation_update/triton"] == 8, backends.ran()
print("all equal")
"""


@needs_triton
def test_interpreted_kernel_counts_exactly(seed):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", _SCRIPT, str(seed)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "all equal" in done.stdout


@needs_triton
def test_without_a_gpu_the_backend_refuses_with_the_reason():
    from mmc_fast.ops import agop

    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("there is a GPU, or the interpreter is on: the backend is usable here")
    counts, flag = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="need a GPU"):
        agop.relu_coactivation_update(torch.ones(3, 2), torch.ones(2, 2), None, counts, flag, backend="triton")
    assert counts.sum() == 0
