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
    from mmc_fast.kernels.ebr import launch as kernels

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "usable", lambda tensors: None)
    with pytest.raises(RuntimeError, match="float64"):
        call("triton", torch.float64)
    x = [torch.ones(2, 3)] * 65
    assert "64 modalities" in kernels.unsupported(x, [])


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


@pytest.mark.gpu
@pytest.mark.parametrize(("latent", "psi"), [(16, (24,)), (144, (64, 32))])
def test_a_step_is_captured_into_a_cuda_graph(latent, psi, generator):
    """One capture of forward and backward serves other inputs and another λ."""
    head = EBRHead([40, 24], latent_dim=latent, hidden_dim=48, psi_dims=psi, backend="triton").cuda()
    features = [torch.zeros(130, d, device="cuda", requires_grad=True) for d in head.dims]
    present = torch.ones(130, 2, dtype=torch.bool, device="cuda")
    strength = torch.tensor(0.5, device="cuda")

    def draw(value: float) -> None:
        with torch.no_grad():
            for feature in features:
                feature.copy_(torch.randn(feature.shape, generator=generator))
            present.copy_(torch.rand(present.shape, generator=generator) < 0.7)
            strength.fill_(value)

    def step() -> list[torch.Tensor]:
        out = head(features, present, reversal=strength)
        loss = sum(r.square().sum() for r in out.recovered) + out.discrimination_loss + out.reconstruction_loss
        results = [*out.recovered, out.latents, out.discrimination_loss, out.reconstruction_loss]
        return [*results, *torch.autograd.grad(loss, [*features, *head.parameters()])]

    draw(0.5)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles before the capture
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in (0.5, 2.0, 0.0):
        draw(value)
        graph.replay()
        got = [t.clone() for t in captured]
        for backend, rtol in (("triton", 1e-4), ("eager", 1e-3)):
            head.backend = backend
            for one, two in zip(got, step(), strict=True):
                torch.testing.assert_close(one, two, rtol=rtol, atol=rtol * float(two.abs().max() + 1e-3))
        head.backend = "triton"
