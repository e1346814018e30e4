"""Backend "triton" of the EBR step outside the interpreter: it refuses with the reason, and nothing else needs it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from mmc_fast import explain
from mmc_fast.nn import EBRHead

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: pip install 'mmc-fast[triton]'"
)
usable_here = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


def call(backend: str, dtype: torch.dtype = torch.float32, **options):
    head = EBRHead([5, 3], latent_dim=4, hidden_dim=6, psi_dims=(7,), backend=backend, **options).to(dtype)
    return head([torch.ones(2, 5, dtype=dtype), torch.ones(2, 3, dtype=dtype)])


@needs_triton
@pytest.mark.skipif(usable_here, reason="there is a GPU, or the interpreter is on: the backend is usable here")
def test_without_a_gpu_the_backend_refuses_with_the_reason():
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run: .*need a GPU"):
        call("triton")
    rows = {row.backend: row for row in explain("ebr_step")}
    assert not rows["triton"].usable
    assert "GPU" in rows["triton"].reason


@needs_triton
def test_what_the_kernels_do_not_compute_is_refused_with_the_reason(monkeypatch):
    from mmc_fast.kernels import ebr as kernels

    monkeypatch.setattr(kernels, "usable", lambda tensors: None)
    with pytest.raises(RuntimeError, match="float64"):
        call("triton", torch.float64)
    x = [torch.ones(2, 3)] * 65
    assert "64 modalities" in kernels.unsupported(x, [])
    wide = EBRHead([3, 3], latent_dim=4, hidden_dim=6, psi_dims=(513,))
    flat = [p for seq in (*wide.encoders, *wide.decoders, wide.discriminator) for p in seq.parameters()]
    assert "512" in kernels.unsupported(x[:2], flat)


def test_the_package_works_where_triton_is_not_installed():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from mmc_fast import explain\n"
        "from mmc_fast.nn import EBRHead\n"
        "out = EBRHead([5, 3], latent_dim=4, hidden_dim=6, psi_dims=(7,))([torch.ones(2, 5), torch.ones(2, 3)])\n"
        "assert torch.isfinite(out.discrimination_loss)\n"
        "rows = {row.backend: row for row in explain('ebr_step')}\n"
        "assert 'Triton is not installed' in rows['triton'].reason, rows\n"
        "try:\n"
        "    EBRHead([5, 3], backend='triton')([torch.ones(2, 5), torch.ones(2, 3)])\n"
        "except RuntimeError as error:\n"
        "    assert 'Triton is not installed' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('it ran')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
