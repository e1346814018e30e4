"""The repository as a whole: imports follow the arrows, documents agree with the code, nothing foreign slipped in."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mmc_fast
from mmc_fast._env import VARIABLES, env

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mmc_fast"
MARKDOWN = sorted(p for p in ROOT.glob("**/*.md") if not {".venv", "runs", "build"} & set(p.relative_to(ROOT).parts))


def tracked() -> list[Path]:
    """Files under version control; every file of the source tree where there is no repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        skip = {".venv", "build", "runs", "dist", ".git"}
        return [p for p in ROOT.rglob("*") if p.is_file() and not skip & set(p.relative_to(ROOT).parts)]
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def sources() -> list[Path]:
    return [p for p in tracked() if p.suffix == ".py" and (PACKAGE in p.parents or ROOT / "kernels" in p.parents)]


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = [p for p in relative.parts if p != "__init__"]
    return ".".join(["mmc_fast", *parts] if parts[0] == "kernels" else parts)


def imports(path: Path, names: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full name of every module of this project that a file imports, wherever; ``names``: what is taken from it."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(text_of(path))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
            found = [f"{base}.{alias.name}" for alias in node.names] if names or base == "mmc_fast" else [base]
        else:
            continue
        yield from ((node.lineno, f) for f in found if f.split(".")[0] == "mmc_fast")


# Version and metadata


def test_version_is_the_same_everywhere():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    cited = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert 'version = {attr = "mmc_fast.__version__"}' in pyproject
    assert cited is not None
    assert cited[1] == mmc_fast.__version__
    assert mmc_fast.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_importing_the_package_and_its_version_needs_no_heavy_library():
    code = (
        "import sys, mmc_fast, mmc_fast.cli\n"
        "print(mmc_fast.__version__, [m for m in ('sklearn', 'matplotlib', 'scipy', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == f"{mmc_fast.__version__} []", done.stderr


def test_the_package_is_typed_and_carries_its_licences():
    assert (PACKAGE / "py.typed").is_file()
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name in re.findall(r"license-files = \[(.*)\]", pyproject)[0].split(","):
        assert (ROOT / name.strip().strip('"')).is_file(), name


# Layers

CORE = ("_util", "_env", "errors", "kernels", "ops", "functional", "nn", "agop", "diagnose", "integrations", "_C")
LAYERS = [
    {"errors"}, {"_env", "_checkout", "_util"}, {"kernels", "_C", "testing"}, {"ops"}, {"functional"}, {"nn"}, {"agop"}, {"diagnose"},
    {"integrations"}, {"experiments"}, {"cli"}, {"__main__"},
]  # fmt: skip
"""A package imports itself and packages of earlier layers."""


def package_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_the_core_never_imports_the_experiments():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for path in sources()
        if package_of(module_name(path)) in CORE
        for line, target in imports(path)
        if package_of(target) not in (*CORE, "", "__version__")
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_run_one_way():
    rank = {package: i for i, layer in enumerate(LAYERS) for package in layer}
    wrong = []
    for path in sources():
        here = package_of(module_name(path))
        if here == "" and path.name == "__init__.py":
            continue  # the public names are gathered here
        for line, target in imports(path):
            there = package_of(target)
            if there not in ("", "__version__", here) and rank[there] >= rank[here]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_by_way_of_others():
    known = {module_name(path): path for path in sources()}
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = {t for _, t in imports(path, names=True)}
        graph[name] = {t if t in known else t.rpartition(".")[0] for t in targets} & set(known) - {name, "mmc_fast"}
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name]):
                walk(target, (*above, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def test_the_check_of_arrows_sees_what_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The reader of imports finds absolute, relative, nested and aliased ones."""
    module = PACKAGE / "nn" / "ebr.py"
    text = (
        "from ..training import loop\nimport mmc_fast.analysis as a\n"
        "def f():\n    from mmc_fast import ops, cli\n    from . import config\n    import torch\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "text_of", lambda path: text)
    assert sorted(target for _, target in imports(module)) == [
        "mmc_fast.analysis",
        "mmc_fast.cli",
        "mmc_fast.nn",
        "mmc_fast.ops",
        "mmc_fast.training",
    ]


# Environment variables


def test_every_variable_stands_in_the_table_and_is_used():
    table = {v.name for v in VARIABLES}
    suffixes = (".py", ".cpp", ".h", ".cu", ".cmake")
    code = [p for p in tracked() if p.suffix in suffixes and ROOT / "tests" not in p.parents]
    read = r"""(?:env|getenv|environ(?:\.get)?)\s*[\(\[]\s*["'](MMC_[A-Z_]+)["']"""
    used: dict[str, Path] = {}
    for path in code:
        for name in re.findall(read, text_of(path)):
            used[name] = path
    assert set(used) - table == set(), {n: str(p.relative_to(ROOT)) for n, p in used.items() if n not in table}
    assert table - set(used) == set(), "in the table but read nowhere"


def test_no_variable_is_read_behind_the_tables_back(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(KeyError, match="add a row"):
        env("MMC_SECRET")
    monkeypatch.setenv("MMC_DATA", "/somewhere")
    assert env("MMC_DATA") == "/somewhere"
    direct = re.compile(r"""environ(?:\.get)?\s*[\(\[]\s*["']MMC_""")
    readers = [p for p in sources() if direct.search(text_of(p))]
    assert readers == [], "these read the environment directly; use mmc_fast._env.env"


# Documents


def headings(path: Path) -> set[str]:
    anchors = set()
    for title in re.findall(r"^#+ (.+)$", text_of(path), re.MULTILINE):
        plain = re.sub(r"[`*]", "", title).strip().lower()
        anchors.add(re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain)))
    return anchors


@pytest.mark.parametrize("path", MARKDOWN, ids=[str(p.relative_to(ROOT)) for p in MARKDOWN])
def test_links_between_documents_resolve(path: Path):
    text = re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{path.name}: {target}"
        if anchor and linked.suffix == ".md":
            assert anchor in headings(linked), f"{path.name}: {target}"


def test_the_readme_stays_short():
    text = text_of(ROOT / "README.md")
    assert text.count("\n") <= 140
    assert len(re.sub(r"```.*?```", "", text, flags=re.DOTALL).split()) <= 1300


def tool_named(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_the_readme_tables_are_those_of_the_recorded_results():
    tool = tool_named("render_results")
    readme, results = text_of(tool.README), text_of(tool.RESULTS)
    comparison = tool.render_comparison(tool.read("comparison"))
    assert tool.replace(readme, "demo", tool.render_demo(tool.read("demo"))) == readme, "run tools/render_results.py"
    assert comparison in results, "run tools/render_results.py"
    cell = {"data": "d", "metric": "m", "condition": "complete", "seeds": "3", "reference": "r", "p": "0.1"}
    of = {"a": (-0.01, -0.03, 0.01), "b": (0.02, 0.01, 0.03)}  # the table has the reference minus the method
    some = [
        cell
        | {"method": name}
        | dict(zip(("difference", "difference_low", "difference_high"), map(str, v), strict=True))
        for name, v in of.items()
    ]
    row = "| d (3) | +0.0100 [−0.0100, +0.0300] | **−0.0200 [−0.0300, −0.0100]** |"
    assert tool.render_claims(some, ("complete",)).splitlines()[-1] == row
    claims, record = tool.read("claims"), text_of(tool.RECORDS / "claims.md")
    assert tool.replace(record, "claims", tool.render_claims(claims)) == record, "run tools/render_results.py"
    short = tool.render_claims(claims, ("mean missing",))
    assert tool.replace(text_of(tool.LEARNER), "claims", short) == text_of(tool.LEARNER), "run tools/render_results.py"
    details = text_of(tool.RECORDS / "comparison.md")
    for line in tool.read("comparison"):  # the long tables come from the same run
        if line["mean"] and line["condition"] == "mean missing":
            assert f"{float(line['mean']):.3f}" in details, f"comparison.md lacks {line['method']} on {line['data']}"


def test_documented_commands_exist():
    from typer.testing import CliRunner

    from mmc_fast.cli import app

    named = set()
    for path in MARKDOWN:
        code = re.findall(r"```.*?```|`[^`\n]+`", text_of(path), re.DOTALL)
        named |= {name for part in code for name in re.findall(r"(?:^|`)mmc-fast ([a-z]+)", part, re.MULTILINE)}
    assert {"demo", "train", "evaluate", "info"} <= named
    for command in named:
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0, f"mmc-fast {command} is documented but does not exist"


def test_make_targets_that_documents_name_exist():
    makefile = text_of(ROOT / "Makefile")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    for path in [*MARKDOWN, ROOT / ".ci" / "run", *ROOT.glob(".github/workflows/*.yml")]:
        for line in re.findall(r"(?:^|`|^stage \S+ |^ *- run: )make ((?:[a-z-]+ ?)+)", text_of(path), re.MULTILINE):
            named = {word for word in line.split() if word}
            assert named <= targets, f"{path.name}: make {line}"


# What must not be here


def test_the_project_speaks_of_itself_alone():
    # Assembled, so that this file does not match itself.
    forbidden = [
        "/" + r"work/(?!flows)",
        r"\.\./shared(?!/data\b)",
        "/" + "root/",
        "/" + "opt/(?:wheels|pypi)",
        r"pypi\.org|files\.pythonhosted",
        r"\b" + r"issue #?\d",
    ]
    pattern = re.compile("|".join(forbidden), re.IGNORECASE)
    found = []
    for path in tracked():
        for number, line in enumerate(text_of(path).splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_nothing_large_or_pickled_is_tracked():
    for path in tracked():
        assert path.suffix not in (".pkl", ".pickle", ".pt", ".pth", ".so", ".o"), path
        assert path.stat().st_size <= 2_200_000, f"{path} has {path.stat().st_size} bytes"


def test_ci_runs_everything_loudly():
    script = text_of(ROOT / ".ci" / "run")
    assert script.startswith("#!/usr/bin/env bash")
    assert "set -euo pipefail" in script
    for target in ("lint", "typecheck", "test", "test-bare"):
        assert re.search(rf"^stage \d+ make {target}$", script, re.MULTILINE)
    assert "||" not in script


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by name; those of kernels run in a process of their own."""
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py") if "kernels" not in p.parts]
    assert sorted(names) == sorted(set(names))
