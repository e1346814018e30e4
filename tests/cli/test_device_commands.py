"""``--device cuda``: refused with one line where there is no GPU; what it runs is exercised on the CPU."""

from __future__ import annotations

import json
import time

import pytest
import torch
from typer.testing import CliRunner

from mmc_fast.cli import app, device_bench, device_selftest
from mmc_fast.ops.agop import op as agop

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@without_gpu
@pytest.mark.parametrize("command", ["selftest", "bench", "tune"])
def test_without_a_gpu_one_line_and_exit_code_2(command):
    result = CliRunner().invoke(app, [command, "--device", "cuda"])
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert "needs a GPU and torch sees none" in line
    assert "nothing was run" in line


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x", ""])
def test_other_devices_are_refused(name):
    result = CliRunner().invoke(app, ["bench", "--device", name])
    assert result.exit_code == 2
    assert "allowed are cpu, cuda and cuda:N" in result.stderr


def test_the_device_selftest_passes_on_torch_and_sees_a_wrong_op(monkeypatch):
    sizes = ((15, 17, 16), (129, 33, 65))
    checks = device_selftest.device_selftest(torch.device("cpu"), sizes=sizes)
    assert {check.name.split()[0] for check in checks} == {
        "relu_coactivation_update", "derivative_gram_update", "chain_gram_update", "ebr_step",
    }  # fmt: skip
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]

    right = agop.relu_coactivation_update

    def wrong(*args, **kwargs):
        right(*args, **kwargs)
        args[3][0, -1] += 1

    monkeypatch.setattr(device_selftest.agop, "relu_coactivation_update", wrong)
    checks = device_selftest.device_selftest(torch.device("cpu"), (torch.float32,), sizes)
    failed = [check for check in checks if not check.passed]
    assert len(failed) == 2
    assert "1 counts differ" in failed[0].detail
    late = device_selftest.device_selftest(torch.device("cpu"), (torch.float32,), sizes, time.monotonic() - 1)
    assert {check.detail.split("; ")[0] for check in late[-3:]} == {"not run: no time left"}


def test_the_bench_measures_what_is_right_and_refuses_what_is_wrong(monkeypatch):
    shapes = [
        device_bench.Shape("ebr", 32, 12, 16, 2, 8, (8,)),
        device_bench.Shape("agop", 200, 6, 9, outputs=3),
    ]
    monkeypatch.setattr(torch, "compile", lambda run, backend: run)
    found = device_bench.device_bench(torch.device("cpu"), shapes, ("float32",))
    json.dumps(found, allow_nan=False)
    for row in found["rows"]:
        assert row["problem"] is None, row
        assert set(row["sides"]) == {"eager", "compiled", "ours"}
        assert all(side["ms"] > 0 and side["GB/s"] > 0 and side["TFLOP/s"] > 0 for side in row["sides"].values())
    # 2 modalities, 32 samples: two heads of 12 x 16 and 16 x 8 each way, psi 8-8-2; forward and twice that backward
    assert found["rows"][0]["flops"] == 3 * 2 * 32 * 2 * (2 * (12 * 16 + 16 * 8) + 8 * 8 + 8 * 2)
    monkeypatch.setattr(device_bench.mmc_fast, "agop", lambda head, x, backend: torch.eye(6))
    wrong = device_bench.device_bench(torch.device("cpu"), shapes[1:], ("float32",))["rows"][0]
    assert wrong["sides"] == {}
    assert "nothing was timed" in wrong["problem"]


@pytest.mark.gpu
def test_the_device_selftest_passes_on_the_gpu():
    checks = device_selftest.device_selftest(torch.device("cuda"))
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
