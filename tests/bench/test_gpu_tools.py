"""The tools behind docs/gpu.md: counting operators, reading binaries, comparing with a record, the shipped records."""

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
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tools")]

import gpu_compile  # noqa: E402
import render_gpu  # noqa: E402
from gpu_audit import OperatorCount  # noqa: E402
from gpu_roofline import Work, roofline  # noqa: E402

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
RECORD = ROOT / "docs" / "gpu" / "compiled.json"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operators_are_counted_without_views(device):
    x, weight = torch.ones(6, 4, device=device), torch.ones(3, 4, device=device)
    with OperatorCount() as count:
        out = torch.nn.functional.linear(x, weight).t()[1:].relu()
        torch.empty(5, device=device)
        out.add_(torch.ones(1, device=device).expand(2, 6))
    assert [(work.name, work.bytes) for work in count.operators] == [
        ("mm", 4 * (24 + 12 + 18)), ("relu", 4 * (12 + 12)), ("ones", 4), ("add_", 4 * (12 + 1))
    ]  # fmt: skip


def test_backward_and_library_ops_are_counted_from_inside():
    kernels = types.SimpleNamespace(twice=lambda x: (x + x) * 1)
    library = torch.library.Library("mmc_fast_test_counts", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: kernels.twice(x), "CompositeExplicitAutograd")
    x = torch.ones(8, requires_grad=True)
    with OperatorCount() as count:
        torch.ops.mmc_fast_test_counts.twice(x.detach())
        assert count.operators == []
        with count.inside(kernels, "twice"):
            torch.ops.mmc_fast_test_counts.twice(x.detach())
        assert [work.name for work in count.operators] == ["add", "mul"]
        (2 * x).sum().backward()
    names = [work.name for work in count.operators]
    assert names.count("mul") == 3
    assert "twice" not in names


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


def test_what_machine_code_says_about_moving_and_multiplying():
    sass = """
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5+0x40], desc[UR12][R2.64], P1 ;
        /*0050*/              @!P0 LDGSTS.E [R5], desc[UR12][R2.64] ;
        /*0060*/             @!UP0 UTMALDG.2D [UR8], [UR4], desc[URZ] ;
        /*0070*/               @P1 LDG.E.128.CONSTANT R12, desc[UR12][R26.64+0x218] ;
        /*0080*/                   LDG.E.U16 R14, desc[UR12][R26.64+0x200] ;
        /*0090*/                   LDG.E.64 R14, desc[UR12][R26.64] ;
        /*00a0*/                   STG.E.ENL2.256 desc[UR4][R2.64], R4, R8 ;
        /*00b0*/                   STG.E.U8 desc[UR4][R2.64], R4 ;
        /*00c0*/                   STL [R1], R4 ;
        /*00d0*/                   LDL.LU.128 R4, [R1] ;
        /*00e0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00f0*/                   HMMA.1688.F32.TF32 R4, R8, R12, R4 ;
        /*0100*/                   HGMMA.64x64x8.F32.TF32 R24, gdesc[UR16], R24 ;
        /*0110*/              @!P0 UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP1 ;
        /*0120*/                   RED.E.ADD.S32.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*0130*/                   LDGDEPBAR ;
        /*0140*/                   UTCBAR [UR4], URZ ;
        /*0150*/                   LDS.128 R4, [R5] ;
"""
    found = gpu_compile.instructions(sass)
    assert found == {
        "BAR": 1, "HGMMA": 1, "HMMA": 1, "LDG.128": 1, "LDG.16": 1, "LDG.64": 1, "LDGSTS.128": 1, "LDGSTS.32": 1,
        "LDL.128": 1, "RED": 1, "STG.256": 1, "STG.8": 1, "STL.32": 1, "UTCHMMA": 1, "UTMALDG": 1,
    }  # fmt: skip
    assert gpu_compile.facts(found) == {
        "async_copies": 3, "narrow_copies": 1, "barriers": 1, "narrow_loads": 1, "wide_loads": 1, "narrow_stores": 1,
        "wide_stores": 1, "local_accesses": 2,
    }  # fmt: skip


def test_least_times_follow_from_counts():
    small, large = (Work("k", n * 3.35e6, {"bf16": n * 989e6, "int8": 0}, n * 5.5e6, n) for n in (1, 2))
    full = small.at(large, 65)
    assert full == Work("k", 66 * 3.35e6, {"bf16": 66 * 989e6, "int8": 0}, 66 * 5.5e6, 66)
    waves = 132 / 66
    assert full.microseconds() == (pytest.approx(66 / 0.6 * waves), "products")
    assert full._replace(flops={}).microseconds() == (pytest.approx(66 / 0.8 * waves), "memory")
    assert full._replace(flops={}, bytes=0, programs=133).microseconds() == (pytest.approx(66 * 264 / 133), "cache")
    found = roofline([full, Work("zeros", 0)])
    assert (found["microseconds"], found["in_graph"]) == (226, 223)
    assert found["launches"] == [["k", 66, "products", 220.0], ["zeros", 0, "products", 0.0]]


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
    row = {"kernel": "k", "arch": 80, "triton": "1", "spill_bytes": 0, "blocks_per_sm": 3, "problems": ["known"]}
    worse = gpu_compile.regressions
    assert worse([row], [row]) == []
    row |= {
        "matrix": {"half mma": 4},
        "sass": dict.fromkeys(("BAR", "HMMA", "LDG.16", "LDG.128", "LDGSTS.128", "STG.128"), 4),
    }
    assert worse([row], [row]) == []
    for name, bad, good, told in (
        ("LDGSTS.128", 3, 5, "3 async copies, recorded 4"), ("LDGSTS.32", 1, 0, "1 narrow copies, recorded 0"),
        ("LDG.16", 5, 3, "5 narrow loads, recorded 4"), ("LDG.128", 3, 5, "3 wide loads, recorded 4"),
        ("STG.8", 1, 0, "1 narrow stores, recorded 0"), ("STG.128", 3, 5, "3 wide stores, recorded 4"),
        ("BAR", 5, 3, "5 barriers, recorded 4"), ("STL.64", 2, 0, "2 local accesses, recorded 0"),
        ("HMMA", 8, 4, "8 HMMA instructions, recorded 4"), ("HMMA", 0, 2, "0 HMMA instructions, recorded 4"),
    ):  # fmt: skip
        assert worse([row | {"sass": row["sass"] | {name: good}}], [row]) == []
        assert worse([row | {"sass": row["sass"] | {name: bad}}], [row]) == [f"k on sm_80: {told}"]
    for fact, bad, good in (("spill_bytes", 8, 0), ("blocks_per_sm", 2, 4)):
        assert worse([row | {fact: good}], [row]) == []
        assert worse([row | {fact: bad}], [row]) == [
            f"k on sm_80: {bad} {fact.replace('_', ' ')}, recorded {row[fact]}"
        ]
    assert worse([row | {"matrix": {"half mma": 2}}], [row]) == []
    assert "8 half mma instructions, recorded 4" in worse([row | {"matrix": {"half mma": 8}}], [row])[0]
    assert "0 half wgmma instructions" in worse([row], [row | {"matrix": {"half wgmma": 4}}])[0]
    assert "k on sm_80: new" in worse([row | {"problems": ["known", "new"]}], [row])[0]
    assert "4 spill bytes" in worse([row, row | {"kernel": "other", "spill_bytes": 4, "problems": []}], [row])[0]
    assert "not compiled" in worse([row | {"kernel": "other", "problems": []}], [row])[0]
    assert worse([row | {"arch": 90, "problems": []}], [row]) == []
    spec = {"matrix": ["int8"], "constants": []}
    row |= {"shared_bytes": 10**6, "matrix": {"tf32 mma": 1}}
    assert [p.split()[0] for p in gpu_compile.problems_of(row, spec)] == ["needs", "products"]


def test_the_record_of_compilations():
    rows = json.loads(RECORD.read_text())
    assert {row["arch"] for row in rows} == {80, 90, 100}
    common = [row for row in rows if row["arch"] in (80, 90)]
    for row in common:
        assert row["spill_bytes"] == 0, (row["kernel"], row["arch"])
        assert not row["problems"], row
    assert all("sass" in row for row in rows if row["arch"] == 90)
    for row in (row for row in rows if "sass" in row):  # machine code against PTX and against what ptxas says
        name, sass = (row["kernel"], row["arch"]), row["sass"]
        units = {found.removesuffix("MMA")[:-1] for found in sass if found.endswith("MMA")}
        families = {{"": "mma", "UTC": "tcgen05"}.get(unit, "wgmma") for unit in units}
        assert families == {unit.split()[1] for unit in row["matrix"]}, name
        assert (gpu_compile.facts(sass)["local_accesses"] > 0) == (row["spill_bytes"] > 0), name
    assert not [row for row in rows if row["arch"] == 90 and row["problems"]]
    kernels = {row["kernel"].split(" [")[0] for row in rows}
    for path in (ROOT / "kernels").rglob("*.py"):
        jitted = set(re.findall(r"^def _?(\w+)_kernel\(", path.read_text(), re.MULTILINE))
        assert jitted <= kernels, f"{path.name}: every kernel is in the record; make gpu-report"


def test_the_record_of_counts():
    rows = json.loads(RECORD.with_name("audit.json").read_text())
    assert [row["case"].split(",")[0] for row in rows] == ["AGOP", *["EBR"] * 6]
    for row in rows:
        assert row["problems"] == []
        found = row["ours"]["launches"] | {"bytes": row["byte_ratio"], "GFLOP": row["roofline"]["GFLOP"]}
        assert all(found[name] <= limit for name, limit in row["limits"].items()), row["case"]
        shares = [sum(row[side]["bytes"].values()) for side in ("ours", "eager")]
        assert row["byte_ratio"] == pytest.approx(shares[0] / shares[1], abs=1e-3)


def test_the_page_holds_the_records():
    page = render_gpu.PAGE.read_text(encoding="utf-8")
    assert render_gpu.render(page) == page, "docs/gpu-appendix.md is not of these records; python tools/render_gpu.py"
    assert "**Nothing on this page has run on hardware.**" in page


def test_every_product_names_its_precision():
    for path in (ROOT / "kernels").rglob("*.py"):
        for match in re.finditer(r"tl\.dot\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", path.read_text()):
            call = match.group()
            assert "input_precision=" in call or "out_dtype=tl.int32" in call, f"{path.name}: {call}"


@needs_triton
@pytest.mark.slow
def test_a_shipped_kernel_compiles_here_as_recorded():
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
    done = subprocess.run([*command, "--check", RECORD], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 compilations" in done.stdout
