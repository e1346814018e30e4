"""The gates of the benches: processor classes, records, busy machines, repeats and exit codes, with numbers fed in."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benches are part of the source tree only", allow_module_level=True)
sys.path.insert(0, str(ROOT / "bench"))

import bench_agop  # noqa: E402
import bench_ebr  # noqa: E402
import gate  # noqa: E402
import machine  # noqa: E402
import recorded  # noqa: E402

AVX512 = "fma avx2 avx512f avx512dq avx512bw avx512vl avx512_vpopcntdq avx512_bf16"
QUIET = machine.Load(processors=2, threads=1, others=1.0, steal=0.0, wall=1.02, spread=0.1)


def cpuinfo(vendor: str, flags: str) -> str:
    first = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: A: B\nflags\t\t: fpu {flags}\n"
    return first + "\n" + first.replace(vendor, "Second")


@pytest.mark.parametrize(
    ("text", "environ", "expected"),
    [
        (cpuinfo("AuthenticAMD", AVX512), {}, "AMD avx2 avx512 vpopcntdq bf16"),
        (
            cpuinfo("GenuineIntel", f"{AVX512} amx_bf16 amx_tile amx_int8"),
            {},
            "Intel avx2 avx512 vpopcntdq bf16 amx",
        ),
        (cpuinfo("GenuineIntel", "avx2 fma avx512f"), {}, "Intel avx2"),
        (cpuinfo("Somebody", "avx2"), {"MMC_CPU_ISA": ""}, "Somebody"),
        (cpuinfo("AuthenticAMD", "avx2 fma"), {"MMC_CPU_ISA": "base"}, "AMD avx2 MMC_CPU_ISA=base"),
        ("processor : 0\nFeatures : fp asimd sve\nCPU implementer : 0x41\n", {}, "0x41 neon sve"),
    ],
)
def test_the_class_of_a_processor(text, environ, expected):
    assert machine.processor_class(text, environ) == expected


def test_where_there_is_no_cpuinfo_the_class_is_the_architecture(monkeypatch):
    monkeypatch.setattr(machine.platform, "machine", lambda: "arm64")
    assert machine.processor_class("", {}) == "arm64"


def test_a_quiet_machine_gives_no_reason():
    assert QUIET.reasons() == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"others": 1.6}, "1.6 of 2 processors"),
        ({"steal": 0.07}, "7% of the time is stolen"),
        ({"wall": 1.31}, "1.31 times as long"),
        ({"spread": 0.45}, "spread by 45%"),
        ({"threads": 2, "others": 0.4}, "0.4 of 2 processors"),
    ],
)
def test_each_sign_of_a_busy_machine_is_told(change, word):
    (reason,) = replace(QUIET, **change).reasons()
    assert word in reason


def test_the_load_between_two_moments():
    start = machine.Moment(wall=10.0, own=1.0, busy=100.0, steal=5.0, total=400.0)
    end = machine.Moment(wall=20.0, own=9.0, busy=115.0, steal=6.0, total=420.0)
    load = machine.between(start, end, processors=2, threads=1, spread=0.2)
    assert load == machine.Load(2, 1, others=pytest.approx(0.7), steal=pytest.approx(0.05), wall=1.25, spread=0.2)
    assert machine.between(start, end, 2, threads=2, spread=0.2).wall == 0.0  # says nothing with several threads


def test_without_counters_of_the_system_the_load_average_serves(monkeypatch):
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (3.5, 0.0, 0.0))
    load = machine.between(machine.Moment(0.0, 0.0), machine.Moment(1.0, 1.0), 2, 1, 0.0)
    assert (load.others, load.steal) == (2.5, 0.0)
    assert "2.5 of 2" in load.reasons()[0]


def test_the_moment_of_this_machine_moves_forward():
    first = machine.Moment.now()
    sum(range(200_000))
    second = machine.Moment.now()
    assert second.wall > first.wall
    assert second.own > first.own
    assert second.total >= first.total


def attempt(value: float, load: tuple[str, ...] = (), target: float = 1.0) -> dict:
    """One measurement of a row with one ratio."""
    ratios = gate.ratios([("a", "b", target)], {"a": value, "b": 1.0})
    return {"row": "row", "load": list(load), "ratios": ratios, "milliseconds": {}}


@pytest.mark.parametrize(
    ("attempts", "reached", "value", "state"),
    [
        ([attempt(2.19)], 2.0, 2.19, "within"),
        ([attempt(2.21)], 2.0, 2.21, "above"),
        ([attempt(2.5), attempt(2.1), attempt(2.3)], 2.0, 2.1, "within"),
        ([attempt(9.0)], None, 9.0, "no record"),
        ([attempt(9.0, ("busy",))], 2.0, 9.0, "not judged"),
        ([attempt(1.0, ("busy",))], 2.0, 1.0, "not judged"),
        ([attempt(1.0, ("busy",)), attempt(2.5)], 2.0, 2.5, "above"),  # the quiet one counts, though it is slower
    ],
)
def test_a_ratio_is_judged_by_its_record(attempts, reached, value, state):
    (found,) = gate.judged(attempts, {} if reached is None else {"a / b": reached})
    assert (found["value"], found["state"], found["recorded"]) == (value, state, reached)
    assert found["gate"] == (None if reached is None else pytest.approx(1.1 * reached))


def test_a_slow_record_leaves_the_target_missed():
    (found,) = gate.judged([attempt(1.2, target=1.0)], {"a / b": 1.15})
    assert (found["state"], found["target"], found["met"]) == ("within", 1.0, False)
    line = gate.table([{"row": "row", "ratios": [found]}]).splitlines()[1]
    assert " ".join(line.split()) == "row a / b 1.2 1.15 1.26 1 TARGET MISSED within the gate"


HERE = "Vendor set"


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table with one ratio, 2.0, for the class that this machine is made to have."""
    path = tmp_path / "recorded.csv"
    monkeypatch.setattr(recorded, "TABLE", path)
    monkeypatch.setattr(machine, "this_class", lambda: HERE)
    monkeypatch.setattr(machine, "name", lambda: "this machine")
    recorded.write([recorded.Entry(HERE, "ebr", "row", "a / b", 2.0, "that machine", "2026-01-02")])
    return path


@pytest.mark.parametrize(
    ("series", "quiet", "taken", "state"),
    [
        ([attempt(2.0)], False, 1, "within"),
        ([attempt(3.0), attempt(2.0)], False, 2, "within"),
        ([attempt(3.0), attempt(2.9), attempt(2.8)], False, 3, "above"),
        ([attempt(3.0, ("busy",)), attempt(2.9, ("busy",)), attempt(2.8, ("busy",))], False, 3, "not judged"),
        ([attempt(3.0, ("busy",)), attempt(2.1)], False, 2, "within"),
        ([attempt(2.0, ("busy",))], False, 1, "not judged"),
        ([attempt(2.0, ("busy",)), attempt(2.1)], True, 2, "within"),
    ],
)
def test_a_row_is_measured_again_up_to_three_times(records, series, quiet, taken, state):
    feed = iter(series)
    count = itertools.count(1)
    seen = [0]

    def measure() -> dict:
        seen[0] = next(count)
        return next(feed)

    result = gate.tried(measure, "ebr", quiet)
    assert (seen[0], result["attempts"], result["ratios"][0]["state"]) == (taken, taken, state)
    assert bool(result["load"]) == (state == "not judged")


def finished(argv: list[str], series: list[dict], bench: str = "ebr") -> int:
    options = gate.parser(None, ["row"], 1).parse_args(argv)
    feed = iter(series)
    result = gate.tried(lambda: next(feed), bench, options.record)
    return gate.finish(bench, [result], options)


def test_only_the_gate_by_hand_fails(records, capsys):
    slow = [attempt(3.0)] * 3
    assert finished([], slow) == 0
    told = capsys.readouterr().out
    assert "ABOVE THE GATE" in told
    assert "that machine, 2026-01-02" in told
    assert finished(["--gate"], slow) == 1
    assert finished(["--gate"], [attempt(2.1)]) == 0
    assert finished(["--gate"], [attempt(3.0, ("a neighbour",))] * 3) == 0
    assert "row: not judged, the machine is busy: a neighbour" in capsys.readouterr().out


def test_a_class_without_records_passes_and_says_so(records, capsys, monkeypatch):
    monkeypatch.setattr(machine, "this_class", lambda: "Another")
    assert finished(["--gate"], [attempt(9.0)]) == 0
    told = capsys.readouterr().out
    assert "processors: Another\nnothing was recorded for these processors" in told
    assert "ABOVE" not in told
    assert "that machine" not in told


def test_a_record_takes_the_place_of_the_older_one(records):
    other = recorded.Entry("Another", "ebr", "row", "a / b", 5.0, "other", "2026-01-01")
    recorded.write([other])
    assert finished(["--record"], [attempt(2.34567), attempt(2.5), attempt(2.6)]) == 0
    table = recorded.read()
    assert table[other.key] == other
    mine = table[HERE, "ebr", "row", "a / b"]
    assert (mine.value, mine.machine) == (2.35, "this machine")
    assert len(table) == 2
    assert records.read_text().count("\n") == 3


def test_a_busy_machine_records_nothing(records, capsys):
    before = records.read_text()
    assert finished(["--record"], [attempt(2.0, ("a neighbour",))] * 3) == 1
    assert records.read_text() == before
    assert "row: not recorded" in capsys.readouterr().err


def test_recording_and_gating_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        gate.parser(None, ["row"], 1).parse_args(["--gate", "--record"])
    assert "not allowed with" in capsys.readouterr().err


def test_a_ratio_that_stands_twice_is_refused(records):
    records.write_text(records.read_text() + records.read_text().splitlines()[1] + "\n")
    with pytest.raises(ValueError, match="Vendor set / ebr / row / a / b stands there twice"):
        recorded.read()


def test_every_shipped_record_belongs_to_a_ratio_that_is_measured():
    asked = {
        (bench, row.name, f"{over} / {under}")
        for bench, rows in (("agop", bench_agop.ROWS), ("ebr", bench_ebr.ROWS))
        for row in rows
        for over, under, _ in row.targets
    }
    table = recorded.read(ROOT / "bench" / "recorded.csv")
    assert {key[1:] for key in table} <= asked
    assert {key[0] for key in table} >= {
        "AMD avx2 avx512 vpopcntdq bf16",
        "Intel avx2 avx512 vpopcntdq bf16 amx",
    }
    assert all(math.isfinite(e.value) and e.value > 0 and e.machine and e.date for e in table.values())
