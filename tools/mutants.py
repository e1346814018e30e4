"""Mutation testing of a module that decides numbers: ``make mutants MODULE=mmc_fast/diagnose/statistics.py SEED=1 N=60``.

Single changes of the syntax tree are drawn with a seed from one file or several and made one at a time; the tests that
reach the change run (``mutant_bench.py``), out of the test files of the folder that mirrors the module's, where they name
it or one of its public names. What survives is printed with file, line and function. ``tests/planned_defects.py`` applies
listed changes.
"""

from __future__ import annotations

import argparse
import ast
import copy
import random
import re
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mutant_bench import ROOT, Bench, serve

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
UNTOUCHED = {"strict", "stacklevel", "extra", "encoding", "invalid", "divide"}  # keywords whose loss changes no number


class Mutant(NamedTuple):
    """A change of one node: where it stands and the text of the whole file with it."""

    file: str
    line: int
    function: str
    change: str
    text: str
    lines: range  # of the statement around it, or of that statement's head
    outer: tuple[str, int]  # name and first line of the outermost function around it; ("", 0) outside of functions


def nodes(tree: ast.AST, function: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Every node with the qualified name of its function, without annotations, decorators, f-strings, and what is raised."""
    for child in ast.iter_child_nodes(tree):
        inside = function
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            inside = f"{function}.{child.name}".lstrip(".")
        skipped = [getattr(tree, "annotation", 0), getattr(tree, "returns", 0), *getattr(tree, "decorator_list", ())]
        if (
            isinstance(child, ast.JoinedStr)
            or child in skipped
            or inside.endswith("__repr__")
            or getattr(child, "arg", "") in UNTOUCHED
        ):
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
        case ast.BinOp(left, ast.Sub() | ast.Div() | ast.MatMult(), right) if not getattr(node, "squared", False):
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


def mutants(sources: Mapping[str, str], order: random.Random | None = None) -> Iterator[Mutant]:
    """Every mutant of the sources (by file) that compiles; in the order of the tree, or in one that is drawn."""
    places = []
    for file, source in sources.items():
        tree = ast.parse(source)
        outer = list(_functions(tree))
        heads = sorted((range(n.lineno, _end(n) + 1) for n in ast.walk(tree) if isinstance(n, ast.stmt)), key=len)
        unchanged = ast.dump(tree)
        places += [(file, unchanged, outer, heads, *found, new) for found in nodes(tree) for new in changes(found[1])]
    if order:
        order.shuffle(places)
    seen = set()
    for file, unchanged, outer, heads, function, node, new in places:
        text = apply(sources[file], node, new)
        try:
            same = ast.dump(ast.parse(text)) == unchanged
        except SyntaxError:
            continue
        if same or text in seen:
            continue
        seen.add(text)
        change = " -> ".join(ast.unparse(n).splitlines()[0] for n in (node, new))
        lines = next((head for head in heads if node.lineno in head), range(node.lineno, node.end_lineno + 1))
        around = next(((n.name, start) for n, start in outer if start <= node.lineno <= n.end_lineno), ("", 0))
        yield Mutant(file, node.lineno, function, change, text, lines, around)


def _end(statement: ast.stmt) -> int:
    """The last line of a statement, or of its head where it has a body."""
    body = getattr(statement, "body", None) or [case.pattern for case in getattr(statement, "cases", ())]
    return max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno


def _functions(tree: ast.AST) -> Iterator[tuple[ast.FunctionDef, int]]:
    """The outermost functions and methods, each with its first line (a decorator's)."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child, min([child.lineno, *(d.lineno for d in child.decorator_list)])
        else:
            yield from _functions(child)


def tests_of(module: str) -> list[str]:
    """Test files beside the module's mirror that name the module or one of its public names, else the whole folder; and
    those elsewhere that import from the module."""
    path = Path(module)
    folder = ROOT / "tests" / (path.parent.relative_to("mmc_fast") if path.parts[0] == "mmc_fast" else path.parent)
    body = ast.parse((ROOT / path).read_text()).body
    parent = str(path.parent).replace("/", r"\.")
    names = [
        rf"{parent}(\.| import .*\b){path.stem}",
        *(rf"\b{n.name}" for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef) and n.name[0] != "_"),
    ]
    while not (files := sorted(folder.rglob("test_*.py"))) and folder != ROOT / "tests":
        folder = folder.parent
    naming = [f for f in files if re.search(rf"({'|'.join(names)})\b", f.read_text())]
    others = sorted(set((ROOT / "tests").rglob("test_*.py")) - set(files))
    importing = [f for f in others if re.search(rf"{names[0]}\b", f.read_text())]
    return [str(f.relative_to(ROOT)) for f in [*(naming or files), *importing]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", nargs="+", help="a file, a folder, or several with commas; N mutants of each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--tests", nargs="*", help="instead of those found by name")
    parser.add_argument(
        "--seconds", type=float, default=30, help="CPU seconds of tests for one mutant, the quickest first"
    )
    parser.add_argument("--all", action="store_true", help="print those that were caught too")
    options = parser.parse_args()
    drawn: list[Mutant] = []
    modules, tests = {}, set(options.tests or ())
    for module in options.module:
        paths = [p for part in module.split(",") for p in sorted((ROOT / part).rglob("*.py")) or [ROOT / part]]
        files = [str(p.relative_to(ROOT)) for p in paths]
        sources = {f: (ROOT / f).read_text() for f in files}
        sample = sorted(islice(mutants(sources, random.Random(options.seed)), options.number))
        modules[module] = range(len(drawn), len(drawn) + len(sample))
        drawn += sample
        tests |= set() if options.tests else {t for f in files for t in tests_of(f)}
    answers = serve(Bench(), drawn, sorted(tests), options.seconds)
    first = next(answers)
    if "red" in first:
        print(f"the tests are red before any change: {first['red']}", file=sys.stderr)
        return 2
    print(
        f"seed {options.seed}; {first['tests']} tests of {first['seconds']:.0f} s: {' '.join(sorted(tests))}",
        flush=True,
    )
    caught = []
    for answer in answers:
        mutant, verdict = drawn[answer["number"]], answer["verdict"]
        caught += [answer["number"]] if verdict == "caught" else []
        if verdict != "caught" or options.all:
            line = (ROOT / mutant.file).read_text().splitlines()[mutant.line - 1].strip()
            place = f"{mutant.file}:{mutant.line} {mutant.function}"
            print(f"{verdict} {place}: {mutant.change}   in: {line}   ({answer['why']})", flush=True)
    print("rows of tests/kill_rates.csv (module, seed, sampled, killed, equivalent, reasons):")
    for module, numbers in modules.items():
        print(f'"{module}",{options.seed},{len(numbers)},{len(set(caught) & set(numbers))},0,')
    return 0 if len(caught) == len(drawn) else 1


if __name__ == "__main__":
    sys.exit(main())
