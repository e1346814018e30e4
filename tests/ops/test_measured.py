"""The table of a GPU that ``mmc-fast tune`` writes and ``auto`` reads, with stand-ins for the device."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from mmc_fast.cli import device_bench
from mmc_fast.cli import tune as command
from mmc_fast.ops import dispatch, measured

TINY = (
    device_bench.Shape("EBR step", 16, 12, 16, 2, 8, (8,)),
    device_bench.Shape("AGOP, one hidden ReLU layer", 64, 6, 9, outputs=3),
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "_name", lambda device: "a GPU")
    measured.read.cache_clear()
    yield
    measured.read.cache_clear()


def on_gpu(batch, dtype=torch.float32):
    return SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda:0"), shape=(batch, 3))


def row(backend, batch, op="ebr_step", precision="float32", **more):
    ms = {"eager": 2.0, "ours": 1.0}
    return {
        "op": op,
        "precision": precision,
        "shape": {"batch": batch},
        "ms": ms,
        "problem": None,
        "backend": backend,
    } | more


def test_the_row_of_the_nearest_batch_counts():
    measured.write("a GPU", [row("triton", 4096), row("eager", 64), row("triton", 64, precision="bfloat16")])
    assert measured.faster("ebr_step", on_gpu(3000)) == "triton"
    assert measured.faster("ebr_step", on_gpu(100)) == "eager"
    assert measured.faster("ebr_step", on_gpu(100, torch.bfloat16)) == "triton"
    assert measured.faster("agop", on_gpu(100)) is None
    assert measured.faster("ebr_step", torch.zeros(64, 3)) is None  # not on a GPU
    assert measured.note("ebr_step", on_gpu(64)) == "measured on this device: eager 2 ms, ours 1 ms"
    assert measured.note("agop", on_gpu(64)) == "not measured on this device"


@pytest.mark.parametrize("change", [{"torch": "1.0"}, {"device": "another"}, {"rows": [row("cuda", 64)]}, {"rows": 3}])
def test_a_table_that_does_not_fit_is_not_read(change):
    path = measured.write("a GPU", [row("triton", 64)])
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert measured.faster("ebr_step", on_gpu(64)) is None


def test_rows_with_a_problem_are_not_read():
    measured.write("a GPU", [row("triton", 64, problem="wrong"), row("eager", 4096)])
    assert measured.faster("ebr_step", on_gpu(64)) == "eager"


@pytest.mark.parametrize(("faster", "first"), [("triton", "triton"), ("eager", "eager"), (None, "eager")])
def test_auto_and_explain_follow_the_table(faster, first, monkeypatch):
    monkeypatch.setattr(measured, "faster", lambda op, like: faster)
    monkeypatch.setitem(dispatch._checks["ebr_step"], "triton", lambda *args: None)
    monkeypatch.setitem(dispatch._checks["ebr_step"], "cpp", lambda *args: "it runs on the CPU")
    arguments = [torch.zeros(4, 3)], [torch.zeros(2, 3)]
    assert dispatch.choose("ebr_step", "auto", *arguments) == first
    usable = [line for line in dispatch.explain("ebr_step", *arguments) if line.usable]
    assert usable[0].backend == first
    assert sorted(line.backend for line in usable) == ["eager", "reference", "triton"]
    assert dispatch.choose("ebr_step", "eager", *arguments) == "eager"
    if faster is None:
        assert "usable; not measured on this device" in [line.reason for line in usable]


def test_tune_writes_what_auto_reads(monkeypatch):
    found = command.tune_device(torch.device("cpu"), "a GPU", TINY)
    assert [(r["op"], r["precision"]) for r in found["rows"]] == [
        ("ebr_step", "float32"), ("ebr_step", "tf32"), ("ebr_step", "bfloat16"), ("agop", "float32")
    ]  # fmt: skip
    assert all(r["problem"] is None and {"eager", "ours"} <= set(r["ms"]) for r in found["rows"])
    assert measured.faster("agop", on_gpu(64)) == found["rows"][-1]["backend"]
    whole = device_bench.make_case

    def zeros(*arguments):
        case = whole(*arguments)
        return case._replace(ours=lambda: [torch.zeros_like(t) for t in case.ours()])

    monkeypatch.setattr(device_bench, "make_case", zeros)
    wrong = command.tune_device(torch.device("cpu"), "a GPU", TINY[1:])
    assert wrong["rows"][0]["backend"] == "eager"
    assert "nothing was timed" in wrong["rows"][0]["problem"]
    assert measured.faster("agop", on_gpu(64)) is None
