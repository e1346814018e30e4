"""The tools behind docs/gpu.md: counting operators, reading binaries, comparing with a record, the shipped record."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import gpu_compile  # noqa: E402
from gpu_counts import OperatorCount  # noqa: E402

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
RECORD = ROOT / "docs" / "gpu" / "compiled.json"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operators_are_counted_without_views(device):
    x, weight = torch.ones(6, 4, device=device), torch.ones(3, 4, device=device)
    with OperatorCount() as count:
        out = torch.nn.functional.linear(x, weight).t()[1:].relu()
        torch.empty(5, device=device)
        out.add_(torch.ones(1, device=device).expand(2, 6))
    assert count.names() == {"mm": 1, "relu": 1, "ones": 1, "add_": 1}
    sizes = {operator.name: operator.bytes for operator in count.operators}
    assert sizes == {"mm": 4 * (24 + 12 + 18), "relu": 4 * (12 + 12), "ones": 4, "add_": 4 * (12 + 1)}
    assert sum(operator.flops for operator in count.operators) == 2 * 6 * 4 * 3
    assert count.bytes == sum(sizes.values())


def test_backward_and_library_ops_are_counted_from_inside():
    kernels = types.SimpleNamespace(twice=lambda x: (x + x) * 1)
    library = torch.library.Library("mmc_fast_test_counts", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: kernels.twice(x), "CompositeExplicitAutograd")
    x = torch.ones(8, requires_grad=True)
    with OperatorCount() as count:
        torch.ops.mmc_fast_test_counts.twice(x.detach())
        assert count.names() == {}
        with count.inside(kernels, "twice"):
            torch.ops.mmc_fast_test_counts.twice(x.detach())
        assert count.names() == {"add": 1, "mul": 1}
        (2 * x).sum().backward()
    assert count.names()["mul"] == 3
    assert "twice" not in count.names()


def test_matrix_instructions_are_read_from_ptx():
    ptx = """
    mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32 {%r1}, {%r2};
    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1}, {%r2};
    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1}, {%r2};
    wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1};
    wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {%r1};
    tcgen05.mma.cta_group::1.kind::f16 [%r1];
    fma.rn.f32 %f1, %f2, %f3, %f4;
    """
    assert gpu_compile.matrix_instructions(ptx) == {
        "int8 mma": 1, "int8 wgmma": 1, "tf32 mma": 2, "half wgmma": 1, "half tcgen05": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "blocks"),
    [
        (80, 32, 128, 0, 16),
        (80, 255, 256, 0, 1),
        (80, 128, 128, 0, 4),
        (90, 64, 128, 100_000, 2),
        (80, 64, 128, 170_000, 0),
    ],
)
def test_resident_blocks(arch, registers, threads, shared, blocks):
    assert gpu_compile.blocks_per_sm(arch, registers, threads, shared) == blocks


def test_what_got_worse_is_named():
    row = {"kernel": "k", "arch": 80, "triton": "1", "main": False, "spill_bytes": 0, "blocks_per_sm": 3}
    assert gpu_compile.regressions([row], [row]) == []
    assert "spills 8" in gpu_compile.regressions([row | {"spill_bytes": 8}], [row])[0]
    assert "2 blocks per SM, recorded 3" in gpu_compile.regressions([row | {"blocks_per_sm": 2}], [row])[0]
    assert "not compiled" in gpu_compile.regressions([row | {"kernel": "other"}], [row])[0]
    assert gpu_compile.regressions([row, row | {"kernel": "new"}], [row]) == []
    assert gpu_compile.unrecorded([row, row | {"kernel": "new"}], [row]) == ["new"]
    assert gpu_compile.regressions([row | {"arch": 90}], [row]) == []
    other = row | {"kernel": "other"}
    assert gpu_compile.regressions([other], [row], main=True) == []
    assert "not compiled" in gpu_compile.regressions([other], [row | {"main": True}], main=True)[0]


def test_the_record_keeps_its_promises():
    rows = json.loads(RECORD.read_text())
    assert {80, 90, 100} <= {row["arch"] for row in rows}
    assert {(row["kernel"], row["arch"], row["triton"]) for row in rows if row["problems"]} <= gpu_compile.KNOWN
    assert not [row["kernel"] for row in rows if row["arch"] in (80, 90) and row["spill_bytes"]]
    assert len({row["triton"] for row in rows}) == 2
    kernels = {row["kernel"].split(" [")[0] for row in rows}
    for path in (ROOT / "kernels").glob("*.py"):
        jitted = set(re.findall(r"^def _?(\w+)_kernel\(", path.read_text(), re.MULTILINE))
        if path.name.startswith("agop") or jitted & kernels:
            assert jitted <= kernels, f"{path.name}: every kernel is in the record; make gpu-report"


def test_the_stored_counts_keep_their_limits():
    rows = json.loads(RECORD.with_name("audit.json").read_text())
    assert {row["case"].split(",")[0].split(" 1 ")[0] for row in rows} == {"AGOP", "EBR narrow", "EBR paper's widths"}
    for row in rows:
        assert row["problems"] == []
        for phase, limit in row["limits"].items():
            assert (row["byte_ratio"] if phase == "bytes" else row["ours"]["launches"][phase]) <= limit, row["case"]
        shares = [sum(row[side]["bytes"].values()) for side in ("ours", "eager")]
        assert row["byte_ratio"] == pytest.approx(shares[0] / shares[1], abs=1e-4)


def test_every_product_names_its_precision():
    for path in (ROOT / "kernels").glob("*.py"):
        text = path.read_text()
        for match in re.finditer(r"tl\.dot\(", text):
            depth, end = 1, match.end()
            while depth:
                depth += {"(": 1, ")": -1}.get(text[end], 0)
                end += 1
            call = text[match.start() : end]
            assert "input_precision=" in call or "out_dtype=tl.int32" in call, f"{path.name}: {call}"


def test_no_kernel_is_tuned_by_batch_size():
    for path in (ROOT / "kernels").glob("*.py"):
        for key in re.findall(r"key=\[(.*?)\]", path.read_text()):
            assert not {"B", "N", "M", "batch", "samples"} & {name.strip(" \"'") for name in key.split(",")}, path.name


@needs_triton
@pytest.mark.slow
def test_a_shipped_kernel_compiles_here_and_the_gate_sees_a_spill(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        ROOT / "bench" / "gpu_compile.py",
        "--arch",
        "80",
        "--only",
        "coactivation",
        "--jobs",
        "1",
    ]
    done = subprocess.run([*command, "--json", tmp_path / "o.json"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads((tmp_path / "o.json").read_text())
    assert row["matrix"].keys() == {"int8 mma"}
    assert gpu_compile._problems(gpu_compile.Row(**{**row, "spill_bytes": 4, "seconds": 0.0}), {"int8"}) == [
        "spills 4 bytes"
    ]
