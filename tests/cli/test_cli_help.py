"""Help, examples, completion and JSON Schemas of the command line."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import typer
from command_line import run

from mmc_fast.cli import COMMANDS, app
from mmc_fast.cli.schemas import SCHEMAS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "words", [*([name] for name in COMMANDS), ["data", "list"], ["data", "prepare"], ["data", "check"]]
)
def test_every_help_ends_with_an_example_that_the_command_accepts(words: list[str]):
    shown = " ".join(run(*words, "--help")[0].split())
    example = re.search(r"Example: mmc-fast (.*)$", shown)
    assert example is not None
    group, arguments = typer.main.get_command(app), shlex.split(example[1])
    assert arguments[: len(words)] == words
    context = typer.Context(group, info_name="mmc-fast")
    while hasattr(group, "resolve_command"):
        name, group, arguments = group.resolve_command(context, arguments)
        context = group.make_context(name, list(arguments), parent=context)  # raises where an option does not exist
        arguments = [*context._protected_args, *context.args] if hasattr(group, "resolve_command") else arguments


def test_completion_knows_the_options_of_a_command():
    environment = {
        **os.environ,
        "_MMC_FAST_COMPLETE": "complete_bash",
        "COMP_WORDS": "mmc-fast demo --qu",
        "COMP_CWORD": "2",
    }
    code = "from mmc_fast.cli import app; app(prog_name='mmc-fast')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.stdout.split() == ["--quick"], done.stderr


def test_schemas_of_json_outputs_are_documented():
    files = runpy.run_path(str(ROOT / "tools" / "render_schemas.py"))["files"]()
    assert {p.name for p in (ROOT / "docs" / "schemas").iterdir()} == {p.name for p in files}
    for path, text in files.items():
        assert path.read_text(encoding="utf-8") == text, "run python tools/render_schemas.py"
        jsonschema.Draft7Validator.check_schema(json.loads(text))
    with_json = [
        w for w in (*COMMANDS, "data list", "data prepare", "data check") if "--json" in run(*w.split(), "--help")[0]
    ]
    assert {*with_json} - {"data"} == set(SCHEMAS)
