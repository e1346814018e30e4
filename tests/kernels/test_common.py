"""What all launches share: the device, the precision of float32 products, tensors on several devices."""

from __future__ import annotations

import ast
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from mmc_fast.kernels import common

ROOT = Path(__file__).resolve().parents[2]
MATMUL = torch.backends.cuda.matmul


@pytest.mark.parametrize(
    ("owner", "name", "value", "expected"),
    [
        (MATMUL, "fp32_precision", "tf32", "tf32"),
        (MATMUL, "fp32_precision", "ieee", "tf32x3"),
        (MATMUL, "allow_tf32", True, "tf32"),
        (torch.backends, "fp32_precision", "tf32", "tf32"),
        (torch.backends, "fp32_precision", "ieee", "tf32x3"),
    ],
)
def test_precision_follows_every_interface_of_torch(owner, name, value, expected):
    try:
        setattr(owner, name, value)
        assert common.input_precision() == expected
        assert common.input_precision(torch.bfloat16) == "ieee"
        assert common.product_kind(torch.float32) == expected
        assert common.product_kind(torch.float16) == "half"
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.fp32_precision = MATMUL.fp32_precision = "none"


@pytest.mark.parametrize(("device", "entered"), [("cuda:1", ["cuda:1"]), ("cuda:0", []), ("cpu", [])])
def test_a_launch_makes_the_device_of_its_tensors_current(device, entered, monkeypatch):
    current: list[str] = []
    seen: list[tuple] = []

    @contextmanager
    def enter(value):
        current.append(str(value))
        yield
        current.append("left")

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: seen.append((grid, args, options, list(current)))

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    common.launch(Kernel(), (3,), torch.device(device), 1, BLOCK=2)
    assert seen == [((3,), (1,), {"BLOCK": 2}, entered)]


def test_no_kernel_is_launched_past_the_helper():
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                assert path.name == "common.py", f"{path.name}, line {node.lineno}: call common.launch"


def test_tensors_of_two_devices_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def on(device):
        return SimpleNamespace(device=torch.device(device), dtype=torch.float32, is_floating_point=lambda: True)

    assert common.usable([on("cuda:0"), on("cuda:0")]) is None
    assert "one GPU and got cuda:0, cuda:1" in common.usable([on("cuda:0"), on("cuda:1")])
    assert "got cpu, cuda" in common.usable([on("cuda:0"), on("cpu")])
