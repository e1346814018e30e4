"""The script for a GPU, as far as a CPU can run it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from graph_standin import Graph, install

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import device_check

from mmc_fast.cli import device_bench
from mmc_fast.ops import measured


def test_a_dry_run_fills_every_section(tmp_path, capsys):
    assert device_check.main([str(tmp_path / "out.json"), "--dry-run"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["right"]
    assert found["selftest"]["failed"] == found["selftest"]["not_run"] == 0
    checked = {name: str([c["name"] for c in rows]) for name, rows in found["selftest"]["checks"].items()}
    assert all(f"ebr_step eager {dtype} " in checked["float32"] for dtype in ("float32", "float16", "bfloat16"))
    assert "ebr_step eager float32 " in checked["tf32"]
    cases = [("ebr_step", "float32"), ("ebr_step", "tf32"), ("ebr_step", "bfloat16"), ("agop", "float32")]
    assert [(row["op"], row["precision"]) for row in found["table"]] == cases
    assert all(set(row["ms"]) == {"eager", "ours", "compiled"} for row in found["table"])
    assert [row["differing"] for row in found["races"]["rows"]] == [0] * 4


def test_a_section_of_its_own_process_answers_or_says_how_it_ended(monkeypatch):
    found = device_check.in_process("races", True, time.monotonic() - 1)
    assert [row["problem"] for row in found["rows"]] == ["no time left"] * 4
    monkeypatch.setattr(device_check, "__file__", "nowhere.py")
    assert device_check.in_process("races", True, time.monotonic())["problem"].startswith("ended with 2")


def test_results_that_repeat_otherwise_are_counted():
    draws = iter([1.0, 1.0, 2.0, 1.0])
    assert device_check.differing(lambda: [torch.ones(3), torch.tensor(next(draws))], 3, torch.device("cpu")) == 1


def test_the_table_takes_ours_only_where_all_of_it_is_right_and_faster():
    def backend(right=True, problem=None, **ms):
        sides = {name.replace("_", ", CUDA "): {"ms": value} for name, value in ms.items()}
        return measured.table([{"sides": sides, "problem": problem}], right)[0]["backend"]

    assert backend(ours=1.0, eager=2.0, ours_graph=1.0, eager_graph=2.0) == "triton"
    assert backend(ours=1.0, eager=2.0, ours_graph=2.0, eager_graph=1.0) == "eager"
    assert backend(ours=2.0, eager=1.0) == "eager"
    assert backend(right=False, ours=1.0, eager=2.0) == "eager"
    assert backend(problem="wrong", ours=1.0, eager=2.0) == "eager"
    assert backend() == "eager"
    good = {"failed": 0, "not_run": 0}
    race = {"rows": [{"problem": None, "differing": 0}]}
    assert device_check.is_right(good, race)
    for tests, raced in (
        (good | {"failed": 1}, race),
        (good | {"not_run": 1}, race),
        ({"problem": "ended"}, race),
        (good, {"problem": "ended"}),
        (good, {"rows": [{"problem": None, "differing": 1}]}),
        (good, {"rows": [{"problem": "x"}]}),
    ):
        assert not device_check.is_right(tests, raced)


@pytest.mark.parametrize("name", device_bench.PRECISIONS)
def test_no_tolerance_lets_zeros_or_nan_pass(name):
    right = [torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])]
    assert device_bench.wrong(right, right, name) is None
    for n in range(2):
        for bad in (torch.zeros(2), right[n] * float("nan"), -right[n], right[n] * 1.3):
            got = [bad if i == n else t for i, t in enumerate(right)]
            assert f"in tensor {n}" in device_bench.wrong(got, right, name)
        empty = [torch.zeros(2) if i == n else t for i, t in enumerate(right)]
        assert "cannot be checked" in device_bench.wrong(empty, empty, name)


def test_sides_that_are_graphs_give_what_plain_calls_give(monkeypatch):
    install(monkeypatch)
    case = device_bench.make_case(torch.device("cpu"), device_check.TINY[0], torch.float32)
    expected = case.ours()
    for run in (device_bench._graph(case.eager), device_bench._graph(case.ours), case.graphed()):
        assert device_bench.wrong(run(), expected, "float32") is None
    assert [graph.replays for graph in Graph.made] == [1, 1, 1, 1]
    lost = device_bench._graph(case.eager)
    Graph.made[-1].operators.clear()  # a graph that writes nothing
    assert "nan" in device_bench.wrong(lost(), expected, "float32")
