"""What an experiment of the paper is here, and what it leaves: tables, and directions whose verdicts are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mmc_fast._util.names import unknown
from mmc_fast._util.numbers import check_seed
from mmc_fast._util.toml import read_toml
from mmc_fast.diagnose.figures import Drawing
from mmc_fast.diagnose.statistics import Interval, ResampledScores, mean_sd
from mmc_fast.errors import InputError

from ..compare.configs import configs_folder
from ..compare.grid import Tune, check_once
from ..jobs import Event
from ..report.comparison import Difference

READINGS = ("both", "train", "test")
TUNES = ("auto", "always", "never")


@dataclass(frozen=True)
class Plan:
    """How an experiment is run.

    ``out``: folder of all experiments; the runs that they share are in ``out/grid``. ``epochs``: None = the budget of the
    data. ``data``: names or files of data configs. ``tune``: as in :class:`~mmc_fast.experiments.compare.grid.Grid`.
    ``reading``: of "missing" in tables 3 and 4.
    """

    out: Path
    data: Sequence[str]
    seeds: Sequence[int] = (0, 1, 2)
    workers: int = 2
    epochs: int | None = None
    tune: Tune = "never"
    reading: Literal["both", "train", "test"] = "both"
    on_event: Event = field(default=lambda event: None)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", [check_seed(seed) for seed in self.seeds])

    @property
    def grid(self) -> Path:
        """Folder of the shared runs and measurements."""
        return self.out / "grid"

    @property
    def changes(self) -> dict[str, Any]:
        """What the plan changes of the budget."""
        return {} if self.epochs is None else {"epochs": self.epochs}


@dataclass(frozen=True)
class Value:
    """One cell of a table: ours over the seeds (None: not measured) beside the paper's number (None: it has none).

    ``mark``: characters that the table's footnote explains.
    """

    mean: float | None = None
    sd: float | None = None
    paper: float | None = None
    mark: str = ""

    @classmethod
    def over(cls, values: Sequence[float], paper: float | None = None) -> Value:
        """Mean and sample standard deviation of the values of the seeds."""
        return cls(*mean_sd(values), paper)


@dataclass(frozen=True)
class ResultTable:
    """Rows x columns of values; a row is its label and one value for each column.

    ``digits``: behind the point in our numbers, ``paper_digits`` in the paper's. ``footnote``: what the marks mean.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Value]]]
    digits: int = 3
    paper_digits: int = 4
    footnote: str = ""

    def __post_init__(self) -> None:
        for label, values in self.rows:
            if len(values) != len(self.columns):
                raise ValueError(f"{self.title}: row {label} has {len(values)} values for {len(self.columns)} columns")


@dataclass(frozen=True)
class Estimate:
    """A paired difference with its 95 % interval; infinite ends where one seed says nothing about the spread."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, found: Interval | Difference) -> Estimate:
        """From an interval, or a difference of a comparison."""
        return cls(found.estimate, found.low, found.high)


def paired(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean difference ``first − second`` of quantities measured once per seed, with Student's interval over the seeds."""
    if len(first) != len(second) or not first:
        raise InputError(f"paired: got {len(first)} and {len(second)} values; give one of each per seed")
    differences = np.subtract(first, second, dtype=np.float64)
    if len(differences) == 1:
        return Estimate(float(differences[0]), -math.inf, math.inf)
    none = np.zeros((len(differences), 2))  # no test samples are drawn again: the spread is that of the seeds alone
    return Estimate.of(ResampledScores(differences, none).interval(0.95))


@dataclass(frozen=True)
class Direction:
    """A claim of the paper as the sign of a difference, and ours.

    ``paper``: the difference in the paper's units, never 0. ``ours``: None where it was not measured (a training diverged).
    ``printed``: whether the paper prints numbers for it; else ``paper`` is only a sign. ``mark``: "†" where it is about an
    under-performing re-implementation.
    """

    claim: str
    paper: float
    ours: Estimate | None
    printed: bool = True
    mark: str = ""

    def __post_init__(self) -> None:
        if not math.isfinite(self.paper) or self.paper == 0:
            raise ValueError(f"{self.claim}: the paper's difference is {self.paper}, which is no direction")

    @property
    def verdict(self) -> Literal["agrees", "disagrees", "undecided", "not measured"]:
        """Whether our interval lies on the paper's side of 0, on the other side, or holds 0."""
        if self.ours is None:
            return "not measured"
        side = math.copysign(1.0, self.paper)
        low, high = sorted((side * self.ours.low, side * self.ours.high))
        return "agrees" if low > 0 else "disagrees" if high < 0 else "undecided"


@dataclass(frozen=True)
class Outcome:
    """What an experiment found.

    ``drawings``: file name without ending -> drawing. ``notes``: what a reader must know, the paper's own oddities
    among them. ``facts``: short names and values of the environment. ``record``: JSON values behind the numbers.
    """

    tables: Sequence[ResultTable]
    directions: Sequence[Direction]
    drawings: Mapping[str, Drawing] = field(default_factory=dict)
    notes: Sequence[str] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    def count(self, verdict: str) -> int:
        """Directions with this verdict."""
        return sum(d.verdict == verdict for d in self.directions)

    @property
    def summary(self) -> str:
        """One line that counts the verdicts."""
        n = len(self.directions)
        parts = [f"{self.count('agrees')} agree", f"{self.count('disagrees')} disagree"]
        marked = [sum(d.verdict == v and bool(d.mark) for d in self.directions) for v in ("agrees", "disagrees")]
        parts = [part + (f" ({k} with a row marked †)" if k else "") for part, k in zip(parts, marked, strict=True)]
        parts.append(f"{self.count('undecided')} undecided")
        if self.count("not measured"):
            parts.append(f"{self.count('not measured')} not measured")
        return f"Of {n} direction{'s' * (n != 1)} of the paper: {', '.join(parts)}."


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper on open data.

    ``paper``: what the paper shows, and where. ``deviations``: how ours differs, plain sentences. ``data``: default data
    configs. ``readings``, ``searches``: whether ``Plan.reading`` and ``Plan.tune`` concern it. ``fixed``: defined on ``data``
    alone.
    """

    name: str
    title: str
    paper: str
    deviations: tuple[str, ...]
    data: tuple[str, ...]
    body: Callable[[Plan], Outcome]
    readings: bool = False
    searches: bool = False
    fixed: bool = False

    def run(self, plan: Plan) -> Outcome:
        """Train, measure and judge what is not there yet. Raises InputError as :meth:`check`."""
        self.check(plan)
        return self.body(plan)

    def check(self, plan: Plan) -> None:
        """Raise InputError for options that this experiment does not have; no data are looked for."""
        for what, value, allowed in (("tune", plan.tune, TUNES), ("reading", plan.reading, READINGS)):
            if value not in allowed:
                raise unknown(what, value, allowed)
        if plan.reading != "both" and not self.readings:
            raise InputError(f"reproduce: {self.name} has no readings of 'missing'; leave --reading out")
        if plan.tune != "never" and not self.searches:
            raise InputError(f"reproduce: {self.name} takes stored settings; leave --tune out, or tune with compare")
        if self.fixed and not set(plan.data) <= set(self.data):
            raise InputError(f"{self.name}: its protocol is defined on {', '.join(self.data)} alone; leave --data out")
        check_once("data", plan.data)


def declare(name: str, body: Callable[[Plan], Outcome]) -> Experiment:
    """The experiment of this name with its texts from configs/paper.toml."""
    about: dict[str, Any] = read_toml(configs_folder() / "paper.toml")[name]
    about |= {key: tuple(about[key]) for key in ("deviations", "data")}
    return Experiment(name, body=body, **about)
