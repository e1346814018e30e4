"""Break the code in listed ways and see that the tests notice: ``python tests/planned_defects.py [--only TEXT]``.

``planned_defects.toml`` lists single changes by module and function: ``change = "OLD -> NEW"``, where OLD is an operator, an
expression, a keyword argument or a statement that occurs once in the function (or ``nth``), in any layout; NEW ``pass`` drops a
statement. Sources in other languages have a ``find`` that occurs once and its ``replace``. Each change is made in a copy of
the tree, where one of its tests must turn red. Exit code 1 if a defect survives or no longer applies.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))
import mutants  # noqa: E402
from mutant_bench import Bench  # noqa: E402


@dataclass(frozen=True)
class Defect:
    name: str
    file: str
    tests: tuple[str, ...]
    function: str = ""  # "" is the whole module
    change: str = ""
    nth: int | None = None  # None: it occurs once
    find: str = ""
    replace: str = ""
    build: bool = False  # compile the native library of the copy before the tests run

    def text(self) -> str:
        """The file with the defect; ValueError where it does not apply."""
        path = ROOT / self.file
        missing = [t for t in (path, *(ROOT / t.split("::")[0] for t in self.tests)) if not t.exists()]
        if missing:
            raise ValueError(f"no file {missing[0].relative_to(ROOT)}")
        source = path.read_text()
        if self.find:
            if source.count(self.find) != 1:
                raise ValueError(f"its text occurs {source.count(self.find)} times in {self.file}; it must occur once")
            return source.replace(self.find, self.replace)
        found = list(self._changes(ast.parse(source)))
        if len(found) < (self.nth or 1) or (self.nth is None and len(found) > 1):
            raise ValueError(f"{len(found)} places in {self.function or self.file} fit {self.change!r}")
        text = mutants.apply(source, *found[(self.nth or 1) - 1])
        if ast.dump(ast.parse(text)) == ast.dump(ast.parse(source)):
            raise ValueError(f"{self.change!r} changes nothing")
        return text

    def _changes(self, tree: ast.AST):
        old, new = self.change.split(" -> ")
        for function, node in mutants.nodes(tree):
            if not f"{function}.".startswith(f"{self.function}." if self.function else ""):
                continue
            if old in mutants.OPERATORS:
                yield from ((node, changed) for changed in mutants.with_operator(node, old, new))
                continue
            for what, other in zip(_forms(old, new == "pass"), _forms(new, new == "pass"), strict=False):
                if type(node) is type(what) and ast.dump(node) == ast.dump(what):
                    yield node, other


def _forms(text: str, whole: bool) -> list[ast.AST]:
    """What the text may stand for: an expression (not where a ``whole`` statement is meant), a statement, a keyword argument."""
    statement = ast.parse(text).body[0]
    if isinstance(statement, ast.Expr) and not whole:
        return [statement.value]
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        return [statement, ast.keyword(statement.targets[0].id, statement.value)]
    return [statement]


def load() -> list[Defect]:
    with open(Path(__file__).with_suffix(".toml"), "rb") as f:
        groups = tomllib.load(f)["group"]
    common = ({"file": g["file"], "tests": tuple(g["tests"]), "build": g.get("build", False)} for g in groups)
    return [Defect(**shared, **row) for shared, g in zip(common, groups, strict=True) for row in g["defects"]]


def problem(defect: Defect) -> str | None:
    """Why the defect cannot be applied to the tree, or None."""
    try:
        defect.text()
    except (ValueError, SyntaxError) as error:
        return str(error)
    return None


def run(defect: Defect, bench: Bench, text: str | None = None) -> tuple[str, str]:
    """(verdict, detail); verdict is "caught", "SURVIVED" or "BROKEN". ``text``: of the file, instead of the defect's."""
    if why := problem(defect):
        return "BROKEN", why
    if not defect.build:
        return bench.run(defect.file, text or defect.text(), defect.tests)
    bench = Bench()  # of its own: its library is rebuilt
    (bench.tree / defect.file).write_text(text or defect.text())
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if subprocess.run(command, cwd=bench.tree, capture_output=True).returncode:
        return "BROKEN", "the copy does not compile"
    return bench.run(defect.file, None, defect.tests)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="run the defects whose name or file contains this text")
    options = parser.parse_args()
    only = options.only or [""]
    defects = [d for d in load() if any(text in f"{d.name} {d.file}" for text in only)]
    bench, start, bad = Bench(), time.monotonic(), 0
    for defect in defects:
        verdict, detail = run(defect, bench)
        bad += verdict != "caught"
        print(f"{verdict:9} {defect.file}: {defect.name}: {detail}", flush=True)
    print(f"{len(defects) - bad} of {len(defects)} defects caught in {time.monotonic() - start:.0f} s")
    return 1 if bad or not defects else 0


if __name__ == "__main__":
    sys.exit(main())
