"""Mutation testing of a module that decides numbers: ``make mutants MODULE=mmc_fast/diagnose/statistics.py SEED=1 N=60``.

Single changes of the syntax tree are drawn with a seed and applied one at a time to a copy of the tree, in which the
tests of the module run: test files of the folder that mirrors the module's, where they name it or one of its public
names. What survives is printed with file, line and function. ``tests/planned_defects.py`` applies listed changes.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
LEAVE_OUT = (".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
OPERATORS = {
    "+": ast.Add, "-": ast.Sub, "*": ast.Mult, "/": ast.Div, "//": ast.FloorDiv, "**": ast.Pow, "&": ast.BitAnd,
    "|": ast.BitOr, "<": ast.Lt, "<=": ast.LtE, ">": ast.Gt, ">=": ast.GtE, "==": ast.Eq, "!=": ast.NotEq,
    "and": ast.And, "or": ast.Or, "in": ast.In, "not in": ast.NotIn, "is": ast.Is, "is not": ast.IsNot,
}  # fmt: skip
CHANGED = {
    "+": "-", "-": "+", "*": "/", "/": "*", "//": "/", "**": "*", "&": "|", "|": "&", "and": "or", "or": "and",
    "<": "<= >=", "<=": "< >", ">": ">= <=", ">=": "> <", "==": "!=", "!=": "==", "in": "not in", "not in": "in",
    "is": "is not", "is not": "is",
}  # fmt: skip
RENAMED = {
    "min": "max",
    "any": "all",
    "mean": "median",
    "argmin": "argmax",
    "sum": "mean",
    "floor": "ceil",
    "minimum": "maximum",
}
RENAMED |= {new: old for old, new in RENAMED.items() if old != "sum"}
UNTOUCHED = {"strict", "stacklevel", "extra", "encoding"}  # keywords whose loss changes no number


class Mutant(NamedTuple):
    """A change of one node: where it stands and the text of the whole file with it."""

    line: int
    function: str
    change: str
    text: str


def nodes(tree: ast.AST, function: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Every node with the qualified name of its function, without annotations, decorators, f-strings, and what is raised."""
    for child in ast.iter_child_nodes(tree):
        inside = function
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            inside = f"{function}.{child.name}".lstrip(".")
        skipped = [getattr(tree, "annotation", 0), getattr(tree, "returns", 0), *getattr(tree, "decorator_list", ())]
        if isinstance(child, ast.JoinedStr) or child in skipped or getattr(child, "arg", "") in UNTOUCHED:
            continue
        yield inside, child
        if not isinstance(child, ast.Raise):
            yield from nodes(child, inside)


def with_operator(node: ast.AST, old: str, new: str) -> Iterator[ast.AST]:
    """The node with one of its operators ``old`` replaced."""
    kind, other = OPERATORS[old], OPERATORS[new]()
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and isinstance(node.op, kind):
        yield _changed(node, op=other)
    for i, op in enumerate(node.ops if isinstance(node, ast.Compare) else ()):
        if isinstance(op, kind):
            yield _changed(node, ops=[*node.ops[:i], other, *node.ops[i + 1 :]])


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What the mutation operators make of a node."""
    for old, news in CHANGED.items():
        for new in [news] if " not" in news or news == "not in" else news.split():
            yield from with_operator(node, old, new)
    match node:
        case ast.BinOp(left, ast.Sub() | ast.Div() | ast.MatMult(), right):
            yield _changed(node, left=right, right=left)
        case ast.UnaryOp(_, operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield from (ast.Constant(v) for v in {value + 1, value - 1, 0} - {value})
        case ast.If(test) | ast.IfExp(test):
            yield _changed(node, test=ast.UnaryOp(ast.Not(), test))
        case ast.Return(ast.expr() as value) if not isinstance(value, ast.Constant):
            yield ast.Return(ast.Constant(None))
        case ast.Slice(lower, upper) if lower or upper:
            yield from (_changed(node, **{end: None}) for end in ("lower", "upper") if getattr(node, end))
        case ast.Attribute(attr=name) | ast.Name(id=name) if name in RENAMED:
            yield _changed(node, **{"attr" if isinstance(node, ast.Attribute) else "id": RENAMED[name]})
        case ast.ListComp(generators=parts) | ast.GeneratorExp(generators=parts) if parts[0].ifs:
            yield _changed(node, generators=[_changed(parts[0], ifs=parts[0].ifs[1:]), *parts[1:]])
        case ast.Raise() | ast.AugAssign() | ast.Continue() | ast.Expr(ast.Call()) | ast.Assign([ast.Subscript()]):
            yield ast.Pass()
        case ast.Call(_, args, keywords):
            for i, keyword in enumerate(keywords):
                if keyword.arg not in UNTOUCHED:
                    yield _changed(node, keywords=keywords[:i] + keywords[i + 1 :])
            if len(args) > 1:
                yield _changed(node, args=args[:-1])
            if len(args) > 1 and ast.unparse(node.func).split(".")[-1] not in ("min", "max", "minimum", "maximum"):
                yield _changed(node, args=[args[1], args[0], *args[2:]])


def _changed(node: ast.AST, **fields: object) -> ast.AST:
    result = copy.copy(node)
    vars(result).update(fields)
    return result


def apply(source: str, node: ast.AST, new: ast.AST) -> str:
    """The source with ``new`` in the place of ``node``; every other character stays."""
    lines = source.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    text = ast.unparse(ast.fix_missing_locations(new))
    if isinstance(new, ast.expr) and not isinstance(new, ast.Slice):
        text = f"({text})"
    elif isinstance(new, ast.stmt):
        text = text.replace("\n", "\n" + " " * node.col_offset)
    return (source.encode()[:start] + text.encode() + source.encode()[end:]).decode()


def mutants(source: str) -> list[Mutant]:
    """Every mutant of a source that compiles."""
    found = {}
    for function, node in nodes(ast.parse(source)):
        for new in changes(node):
            change = " -> ".join(ast.unparse(n).splitlines()[0] for n in (node, new))
            mutant = Mutant(node.lineno, function, change, apply(source, node, new))
            try:
                if ast.dump(ast.parse(mutant.text)) != ast.dump(ast.parse(source)):
                    found.setdefault(mutant.text, mutant)
            except SyntaxError:
                continue
    return list(found.values())


class Bench:
    """A copy of the tree in which files are changed, tested and put back. Heavy imports are made once, before the forks."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mutants-")
        self.tree = Path(self._folder.name) / "tree"
        shutil.copytree(ROOT, self.tree, ignore=shutil.ignore_patterns(*LEAVE_OUT))
        os.environ |= {"PYTHONPATH": str(self.tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        os.environ.setdefault("MMC_DATA", str(ROOT.parent / "shared" / "data"))
        sys.dont_write_bytecode = True
        for name in ("pytest", "torch", "scipy.stats", "sklearn.linear_model", "sklearn.metrics", "pandas"):
            __import__(name)

    def run(self, file: str, text: str | None, tests: Sequence[str], limit: float = 600.0) -> tuple[str, str]:
        """("caught" | "SURVIVED" | "BROKEN", first red test or last line) with ``text`` in the file (None: unchanged)."""
        path = self.tree / file
        before = path.read_text()
        path.write_text(before if text is None else text)
        try:
            code, output = self._pytest(tests, limit)
        finally:
            path.write_text(before)
        red = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        if code == -1 or (code in (1, 2, 4) and (red or text is not None)):
            return "caught", red[0] if red else "no end in sight" if code == -1 else "no import"
        return ("SURVIVED", "all tests are green") if code == 0 else ("BROKEN", (output.splitlines() or ["?"])[-1])

    def _pytest(self, tests: Sequence[str], limit: float) -> tuple[int, str]:
        log = self.tree / "mutant.log"
        child = os.fork()
        if child == 0:
            os.setsid()
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1), os.dup2(out, 2), os.chdir(self.tree)
            sys.path[:0] = [str(self.tree)]
            import pytest

            os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]))
        end = time.monotonic() + limit
        while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return -1, log.read_text(errors="replace")
            time.sleep(0.05)
        return os.waitstatus_to_exitcode(status[1]), log.read_text(errors="replace")


def tests_of(module: str) -> list[str]:
    """Test files beside the module's mirror that name the module or one of its public names; else the whole folder."""
    path = Path(module)
    folder = ROOT / "tests" / (path.parent.relative_to("mmc_fast") if path.parts[0] == "mmc_fast" else path.parent)
    public = re.search(r"__all__ = \[(.*?)\]", (ROOT / path).read_text(), re.DOTALL)
    parent = str(path.parent).replace("/", r"\.")
    names = [
        rf"{parent}(\.| import .*\b){path.stem}",
        *(rf"\b{name}" for name in re.findall(r'"(\w+)"', public[1] if public else "")),
    ]
    while not (files := sorted(folder.rglob("test_*.py"))) and folder != ROOT / "tests":
        folder = folder.parent
    naming = [f for f in files if re.search(rf"({'|'.join(names)})\b", f.read_text())]
    return [str(f.relative_to(ROOT)) for f in naming or files]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=30)
    parser.add_argument("--tests", nargs="*", help="instead of those found by name")
    options = parser.parse_args()
    tests = options.tests or tests_of(options.module)
    source = (ROOT / options.module).read_text()
    drawn = mutants(source)
    total = len(drawn)
    drawn = random.Random(options.seed).sample(drawn, min(options.number, total))
    bench, start = Bench(), time.monotonic()
    verdict, detail = bench.run(options.module, None, tests)
    if verdict != "SURVIVED":
        print(f"the tests are red before any change: {detail}", file=sys.stderr)
        return 2
    limit = 30 + 5 * (time.monotonic() - start)
    print(
        f"{options.module}: {len(drawn)} of {total} mutants, seed {options.seed}; tests: {' '.join(tests)}", flush=True
    )
    survivors = 0
    for mutant in sorted(drawn):
        verdict, detail = bench.run(options.module, mutant.text, tests, limit)
        survivors += verdict != "caught"
        if verdict != "caught":
            line = source.splitlines()[mutant.line - 1].strip()
            print(
                f"{verdict} {options.module}:{mutant.line} {mutant.function}: {mutant.change}   in: {line}", flush=True
            )
    print(f"{len(drawn) - survivors} of {len(drawn)} mutants caught in {time.monotonic() - start:.0f} s")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
