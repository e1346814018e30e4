"""Runs tests against changed sources, in forks of one process that has imported everything once.

:class:`Bench` runs whole test files with a changed file on disk. :func:`serve` is quicker: it collects the tests once, notes
which lines each of them runs and how long it takes, and puts a changed function in the place of the imported one in a fork
that runs only the tests which reach the change, the quickest files first, until one is red.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEAVE_OUT = (".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
PYTEST = ["-q", "-p", "no:cacheprovider", "-m", "not slow"]
HEAVY = ("pytest", "torch", "scipy.stats", "sklearn.linear_model", "sklearn.metrics", "pandas")


class Bench:
    """A copy of the tree in which files are changed, tested and put back. Heavy imports are made once, before the forks."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mutants-")
        self.tree = Path(self._folder.name) / "tree"
        shutil.copytree(ROOT, self.tree, ignore=shutil.ignore_patterns(*LEAVE_OUT))
        os.environ |= {"PYTHONPATH": str(self.tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        os.environ.setdefault("MMC_DATA", str(ROOT.parent / "shared" / "data"))
        sys.dont_write_bytecode = True
        for name in HEAVY:
            __import__(name)

    def run(self, file: str, text: str | None, tests: Sequence[str], limit: float = 600.0) -> tuple[str, str]:
        """("caught" | "SURVIVED" | "BROKEN", first red test or last line) with ``text`` in the file (None: unchanged)."""
        path = self.tree / file
        before = path.read_text()
        path.write_text(before if text is None else text)
        log = self.tree / "mutant.log"
        try:
            code = forked(lambda: self.pytest(["-x", *tests], log), limit)
        finally:
            path.write_text(before)
        output = log.read_text(errors="replace")
        red = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        if code < 0 or (code in (1, 2, 4) and (red or text is not None)):
            return "caught", red[0] if red else "no end in sight" if code < 0 else "no import"
        return ("SURVIVED", "all tests are green") if code == 0 else ("BROKEN", (output.splitlines() or ["?"])[-1])

    def pytest(self, arguments: Sequence[str], log: Path, plugins: Sequence[object] = ()) -> int:
        """pytest in the copy; for a fork, whose output and working folder it changes."""
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2), os.chdir(self.tree)
        sys.path[:0] = [str(self.tree)]
        import pytest

        return int(pytest.main([*PYTEST, *arguments], plugins=list(plugins)))


def forked(work: Callable[[], int], limit: float) -> int:
    """The exit code of ``work`` in a fork; negative where a signal, or the time limit, ended it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            code = work()
        finally:
            os._exit(code)
    end = time.monotonic() + limit
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -1
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(status[1])


class Reach:
    """Which lines of the modules each test runs, and its CPU seconds. What a fixture or an import runs counts for the whole file."""

    def __init__(self, files: Iterable[str]) -> None:
        self.files, self.hits = frozenset(files), set()
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, set[tuple[str, int]]] = defaultdict(set)  # by test, and by test file

    def trace(self, frame: types.FrameType, event: str, _: object) -> Callable | None:
        if frame.f_code.co_filename not in self.files:
            return None
        self.hits.add((frame.f_code.co_filename, frame.f_lineno))
        return self.trace

    def take(self, name: str) -> None:
        """What was run since the last call is the doing of ``name``."""
        self.lines[name] |= self.hits
        self.hits.clear()

    def on(self) -> None:
        sys.settrace(self.trace), threading.settrace(self.trace)

    def off(self) -> None:
        sys.settrace(None), threading.settrace(None)

    def tests(self, file: str, lines: range | None, budget: float) -> list[str]:
        """The tests that run one of the lines (None: all): files with the least to do first, and no more than ``budget`` seconds."""
        wanted = {(file, line) for line in lines or ()}
        found = [t for t in self.seconds if lines is None or wanted & (self.lines[t] | self.lines[t.split("::")[0]])]
        total: dict[str, float] = defaultdict(float)
        for test in found:
            total[test.split("::")[0]] += self.seconds[test]
        found.sort(key=lambda t: (total[t.split("::")[0]], t.split("::")[0], self.seconds[t]))
        spent, chosen = 0.0, []
        for test in found:
            if not chosen or spent + self.seconds[test] <= budget:
                spent += self.seconds[test]
                chosen.append(test)
        return chosen


class _Server:
    """pytest plugin: instead of the tests, the mutants. Writes a line of JSON for each to ``out``."""

    def __init__(self, bench: Bench, mutants: Sequence, out: int, budget: float) -> None:
        self.bench, self.mutants, self.out, self.budget = bench, mutants, os.fdopen(out, "w"), budget
        self.path = {m.file: str(bench.tree / m.file) for m in mutants}
        self.reach = Reach(self.path.values())
        self.reach.on()

    def pytest_runtestloop(self, session) -> bool:
        for file in self.path:
            importlib.import_module(file.removesuffix(".py").replace("/", ".").removesuffix(".__init__"))
        self.reach.off()
        sys.dont_write_bytecode = True
        imported = frozenset(self.reach.hits)
        self.reach.hits.clear()
        state = self.bench.tree / "reach.json"
        if session.testsfailed or forked(lambda: self.baseline(session, state), 1800):
            self.say({"red": "see the log"})
            return True
        for name, (seconds, lines) in json.loads(state.read_text()).items():
            self.reach.lines[name] = {(f, n) for f, n in lines}
            if seconds is not None:
                self.reach.seconds[name] = seconds
        self.say({"tests": len(self.reach.seconds), "seconds": sum(self.reach.seconds.values())})
        by_line = defaultdict(list)
        for f in gc.get_objects():
            if type(f) is types.FunctionType and f.__code__.co_filename in self.reach.files:
                by_line[f.__code__.co_filename, f.__code__.co_name, f.__code__.co_firstlineno].append(f)
        gc.freeze()
        for number, mutant in enumerate(self.mutants):
            self.say({"number": number} | self.judge(session, mutant, imported, by_line))
        return True

    def judge(self, session, mutant, imported: frozenset, by_line: dict) -> dict:
        path = self.path[mutant.file]
        code = compile(mutant.text, path, "exec", dont_inherit=True)
        new = next((c for c in functions(code) if (c.co_name, c.co_firstlineno) == mutant.outer), None)
        old = by_line[(path, *mutant.outer)] if new else ()
        at_import = any((path, line) in imported for line in mutant.lines)
        if at_import or not old or any(len(f.__code__.co_freevars) != len(new.co_freevars) for f in old):
            return {"whole": self.reach.tests(path, None, self.budget)}
        tests = self.reach.tests(path, mutant.lines, self.budget)
        if not tests:
            return {"verdict": "SURVIVED", "why": "no test runs it"}
        items = {item.nodeid: item for item in session.items}

        seconds = 10 + math.ceil(5 * sum(self.reach.seconds[t] for t in tests))

        def work() -> int:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            for f in old:
                f.__code__ = new
            return _run(session, [items[t] for t in tests])

        result = forked(work, 10 * seconds)
        return {"verdict": "caught" if result else "SURVIVED", "why": f"{len(tests)} tests"}

    def baseline(self, session, state: Path) -> int:
        self.reach.on()
        for item, after in zip(session.items, [*session.items[1:], None], strict=True):
            start = time.process_time()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            self.reach.seconds[item.nodeid] = time.process_time() - start
            self.reach.take(item.nodeid)
            if session.testsfailed:
                return 1
        self.reach.off()
        state.write_text(json.dumps({n: [self.reach.seconds.get(n), sorted(l)] for n, l in self.reach.lines.items()}))
        return 0

    def pytest_runtest_call(self, item) -> None:
        if sys.gettrace():
            self.reach.take(item.nodeid.split("::")[0])

    def say(self, what: dict) -> None:
        print(json.dumps(what), file=self.out, flush=True)


def _run(session, items: Sequence) -> int:
    for item, after in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        if session.testsfailed:
            return 1
    return 0


def functions(code: types.CodeType) -> Iterator[types.CodeType]:
    """The functions and methods of a module's code, without those inside of functions."""
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            if const.co_flags & inspect.CO_NEWLOCALS:  # a class body has not
                yield const
            else:
                yield from functions(const)


def serve(bench: Bench, mutants: Sequence, tests: Sequence[str], budget: float) -> Iterator[dict]:
    """First {"tests", "seconds"} (or {"red"}), then for each mutant {"number", "verdict", "why"}."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid(), os.close(source)
            sys.dont_write_bytecode = False  # spares the later forks the compilation
            code = bench.pytest(tests, bench.tree / "serve.log", [_Server(bench, mutants, sink, budget)])
        finally:
            os._exit(code)
    os.close(sink)
    answered = False
    try:
        for line in os.fdopen(source):
            answer, answered = json.loads(line), True
            if "whole" in answer:
                m, whole = mutants[answer["number"]], answer["whole"]
                found = bench.run(m.file, m.text, whole, 60 + 10 * budget) if whole else ("SURVIVED", "no test runs it")
                answer |= zip(("verdict", "why"), found, strict=True)
            yield answer
        if not answered:
            yield {"red": (bench.tree / "serve.log").read_text(errors="replace")[-2000:]}
    finally:
        os.waitpid(child, 0)
