"""The examples of docs/guides/data.md run, and its table of sets says what the registry says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmc_fast.experiments import data

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "guides" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"docs/guides/data.md, example {number + 1}", "exec"), {})


def test_first_example_shows_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    exec(BLOCKS[0], {})
    promised = re.search(r"print\(dataset.dims\)  # (.*)", BLOCKS[0])
    assert promised is not None
    assert capsys.readouterr().out.strip() == promised[1]


def test_sets_tasks_and_variants_are_listed() -> None:
    rows = {name: line for line in TEXT.splitlines() for name in re.findall(r"^\| `(\w+)`.* / ", line)}
    for info in data.available():
        if info.name == "avmnist_small":  # "the same" as the row above it
            continue
        for word in (*info.modalities, *info.variants, *(f"`{task}`" for task in info.tasks)):
            assert word in rows[info.name], (info.name, word)
