"""``mmc-fast selftest`` and ``mmc-fast bench``: what they print, as text and as JSON, and their exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from command_line import run

import mmc_fast
from mmc_fast.errors import InputError
from mmc_fast.ops import native as library
from mmc_fast.ops import selftest
from mmc_fast.ops.agop import op as agop

ISAS = library.supported_isas()
BACKENDS = [*(f"cpp on {isa}" for isa in ISAS), "eager"]
CHECKS = ["co-activation counts", "derivative Gram", "final product"]


def call(*arguments, code=0):
    return run(*arguments, code=code)[0]


def lose_the_last_sample(monkeypatch):
    real = agop.relu_coactivation_update
    monkeypatch.setattr(agop, "relu_coactivation_update", lambda x, *a, **k: real(x[:-1], *a, **k))


def expected_names():
    return sorted(f"{check}, {backend}" for check in CHECKS for backend in BACKENDS)


def test_selftest_says_ok_for_every_kernel_on_every_instruction_set():
    lines = [line for line in call("selftest").splitlines() if "native library" not in line]
    assert all(line.startswith("ok ") for line in lines), lines
    assert sorted(line.removeprefix("ok").strip().split(":")[0] for line in lines) == expected_names()


def test_selftest_as_json():
    rows = [row for row in json.loads(call("selftest", "--json")) if row["name"] != "native library"]
    assert sorted(row["name"] for row in rows) == expected_names()
    assert all(row["passed"] is True and row["detail"] for row in rows)


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_selftest_fails_where_a_kernel_is_wrong(monkeypatch, flags):
    lose_the_last_sample(monkeypatch)
    out = call("selftest", *flags, code=1)
    if flags:
        wrong = [row["name"] for row in json.loads(out) if not row["passed"]]
    else:
        wrong = [line.removeprefix("FAILED").strip() for line in out.splitlines() if line.startswith("FAILED")]
    assert any(name.startswith("co-activation counts") for name in wrong), out
    assert not any(name.startswith("derivative Gram") for name in wrong), out


@pytest.mark.skipif(not ISAS, reason=library.unavailable_reason() or "")
def test_an_unknown_instruction_set_is_one_line_and_exit_code_2():
    environment = {**os.environ, "MMC_CPU_ISA": "pentium"}
    command = [sys.executable, "-m", "mmc_fast", "selftest"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "pentium" in line
    assert all(isa in line for isa in ISAS)
    assert done.stdout == ""


@pytest.fixture
def quick(monkeypatch):
    """One round instead of seven."""
    real = selftest.quick_bench
    monkeypatch.setattr(selftest, "quick_bench", lambda: real(rounds=1))


def test_bench_times_every_instruction_set(quick):
    threads = torch.get_num_threads()
    lines = call("bench").splitlines()
    expected = [*(isa for isa in ISAS if isa not in library.FOR_TESTS), "eager"]
    assert [line.split(" on ")[1].split(":")[0] for line in lines] == expected
    assert all("x the forward product" in line for line in lines)
    assert torch.get_num_threads() == threads


def test_bench_as_json(quick):
    rows = json.loads(call("bench", "--json"))
    assert [row["isa"] for row in rows] == [*(isa for isa in ISAS if isa not in library.FOR_TESTS), "eager"]
    for row in rows:
        assert row["milliseconds"] > 0
        assert row["ratio"] == pytest.approx(row["milliseconds"] / row["forward_milliseconds"])


def test_explain_agop_judges_the_head():
    def head(activation, *between):
        return torch.nn.Sequential(torch.nn.Linear(3, 5), activation, *between, torch.nn.Linear(5, 2))

    for module, name in [
        (head(torch.nn.ReLU()), "co-activation counts"),
        (head(torch.nn.GELU()), "derivative Gram"),
        (head(torch.nn.ReLU(), torch.nn.Linear(5, 5), torch.nn.Tanh()), "row chain"),
        (head(torch.nn.ReLU(), torch.nn.LayerNorm(5)), "vector-Jacobian products"),
    ]:
        rows = mmc_fast.explain("agop", module.eval(), torch.ones(2, 3))
        first = next(row for row in rows if row.usable)
        result = mmc_fast.AGOPAccumulator(module).update(torch.randn(9, 3)).compute()
        assert (first.backend, result.method) == (result.backend, name)
        assert name in first.reason
    double = mmc_fast.explain("agop", head(torch.nn.ReLU()).double())
    assert [row.usable for row in double if row.backend == "cpp"] == [False]
    assert mmc_fast.explain("agop") == mmc_fast.explain("relu_coactivation_update")
    with pytest.raises(InputError, match="takes the head"):
        mmc_fast.explain("agop", torch.ones(2, 3))


def test_explain_ebr_step_judges_a_head_as_its_tensors():
    head = mmc_fast.nn.EBRHead({"a": 3, "b": 4}, latent_dim=5, hidden_dim=6, psi_dims=(4,))
    tensors = [torch.ones(2, 3), torch.ones(2, 4), *head.parameters()]
    features = {"a": tensors[0], "b": None}
    for same in ([head], [head, features], [head, tensors[:2]]):
        assert mmc_fast.explain("ebr_step", *same) == mmc_fast.explain("ebr_step", *tensors)
    rows = mmc_fast.explain("ebr_step", head.double(), {"a": torch.ones(2, 3).double(), "b": None})
    assert [row.usable for row in rows if row.backend == "cpp"] == [False]
    head.encoders[0][0].register_forward_hook(lambda *a: None)
    assert [row.reason for row in mmc_fast.explain("ebr_step", head)] == [
        "usable: layer by layer, as some layers are no plain linear layers"
    ]


@pytest.mark.parametrize(("args", "said"), [((torch.nn.ReLU(), 3), "name of an op comes first"),
                                            (("ebr_step", torch.nn.ReLU()), "takes an EBRHead, or tensors; got ReLU"),
                                            (("syrk_update", 3), "takes the tensors of the call; got int")])  # fmt: skip
def test_explain_refuses_what_it_cannot_judge(args, said):
    with pytest.raises(InputError, match=said):
        mmc_fast.explain(*args)


def test_explain_is_public_and_names_what_auto_takes():
    rows = mmc_fast.explain("relu_coactivation_update", torch.ones(2, 2), torch.ones(3, 2))
    assert [row.backend for row in rows] == ["cpp", "triton", "cuda", "eager"]
    assert rows[0].usable == bool(ISAS)
    assert rows[-1].usable
    counts, flag = torch.zeros(3, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    ran = agop.relu_coactivation_update(torch.ones(2, 2), torch.ones(3, 2), None, counts, flag)
    assert ran == next(row.backend for row in rows if row.usable)
    in_double = mmc_fast.explain("relu_coactivation_update", torch.ones(2, 2).double())
    assert not in_double[0].usable
    assert "float32" in in_double[0].reason or not ISAS
