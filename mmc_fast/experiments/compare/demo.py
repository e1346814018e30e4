"""The demo: a comparison of the standard loop's presets on the two data sets that come along, models kept and looked into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mmc_fast._util.names import choose
from mmc_fast._util.numbers import check_seed, make_plain
from mmc_fast.diagnose.document import Block, Callout, Cell, Details, Table, literal
from mmc_fast.diagnose.figures import Drawing
from mmc_fast.diagnose.verdict import ModalityVerdict, overall
from mmc_fast.errors import InputError

from ..jobs import Event, Job, Result, finish
from ..report.drawings import draw_adversary, draw_reliance, draw_repair, metric_name
from ..report.trained import (
    Results,
    chance_score,
    probe,
    probe_table,
    reliance,
    reliance_table,
    settings_table,
    verdicts,
    without_effect,
)
from ..tasks import task_from_dict
from ..training import TrainConfig, load_predictions, load_run
from .configs import MethodConfig, load_data_configs
from .findings import Findings, find
from .grid import Finished, Run
from .runs import settings_of, train_and_keep

DEMO_DATA = ("mfeat", "support2")
_FIRST = "vanilla"  # trains the unimodal models that the others share
_LOOKED_INTO = ("vanilla", "ebr", "robust")
_REPAIR = "robust"
_WORTH_TELLING = 0.02  # of the way from chance to a perfect score
_METHODS = {
    "vanilla": MethodConfig("vanilla", "vanilla", "vanilla"),
    "dropout": MethodConfig("dropout", "dropout", "modality dropout"),
    "kd": MethodConfig("kd", "kd", "KD"),
    "ebr": MethodConfig("ebr", "ebr-paper", "EBR"),
    "robust": MethodConfig("robust", "ebr-robust", "EBR robust"),
}


@dataclass(frozen=True)
class DemoPlan:
    """What the demo runs; ``methods`` are presets of ``TrainConfig``, "vanilla" among them.

    With ``quick`` it is a smoke test whose numbers mean nothing.
    """

    data: tuple[str, ...] = DEMO_DATA
    methods: tuple[str, ...] = tuple(_METHODS)
    seeds: tuple[int, ...] = (0, 1, 2)
    epochs: int = 40
    quick: bool = False

    @classmethod
    def smoke(cls) -> DemoPlan:
        """Two epochs and one seed."""
        return cls(seeds=(0,), epochs=2, quick=True)

    def __post_init__(self) -> None:
        make_plain(self)
        object.__setattr__(self, "seeds", tuple(map(check_seed, self.seeds)))
        if not self.data or not self.seeds or _FIRST not in self.methods:
            raise InputError(f"demo: give at least one data set, one seed, and {_FIRST} among the methods")
        for method in self.methods:
            choose("demo method", method, tuple(_METHODS))
        if len(set(self.seeds)) < len(self.seeds):
            raise InputError(f"demo: seeds are {list(self.seeds)}; name each once")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}


@dataclass(frozen=True)
class DemoFindings:
    """One data set: the comparison, chance, and by title of a method its runs and the verdicts on their modalities."""

    comparison: Findings
    chance: float
    runs: Mapping[str, Sequence[Results]]
    verdicts: Mapping[str, Sequence[ModalityVerdict]]

    @property
    def looked_into(self) -> dict[str, Sequence[Results]]:
        """The methods whose models are shown: vanilla and the forms of EBR."""
        return {t: runs for t, runs in self.runs.items() if t in [_METHODS[m].title for m in _LOOKED_INTO]}

    @property
    def summary(self) -> str:
        """What became of the modalities in the vanilla model."""
        data, title = self.comparison.data, _METHODS[_FIRST].title
        return f"{data}, {title} model: {overall(self.verdicts[title], None, {})}"


def demo_config(plan: DemoPlan, method: str) -> TrainConfig:
    """Settings of one method: its small preset. Checkpoints are written at the end and on Ctrl-C."""
    config = TrainConfig.preset(
        method, epochs=plan.epochs, checkpoint_every=plan.epochs, keep_checkpoints=1, control=False
    )
    if plan.quick and config.kd is not None:
        config = replace(config, kd=replace(config.kd, epochs=1))
    return config


@dataclass(frozen=True)
class Story:
    """One model that lost a modality, and the same repaired: scores on the test part, means over the seeds.

    ``kept``, ``repaired``: of the vanilla and of the repaired model when ``modality`` is all there is; ``alone``: a model of
    that modality only; ``complete``: both models with everything.
    """

    data: str
    modality: str
    metric: str
    alone: float
    kept: float
    repaired: float
    complete: tuple[float, float]
    drawing: Drawing

    @property
    def sentence(self) -> str:
        """The story in words."""
        name = metric_name(self.metric)
        return (
            f"Plain training on **{self.data}** reaches a test {name} of {self.complete[0]:.3f}, but has not learned to use "
            f"**{self.modality}** by itself: given it alone, the model scores **{self.kept:.3f}**, where a model of that modality "
            f"reaches {self.alone:.3f}. The same architecture with EBR, trained with missing modalities, scores "
            f"**{self.repaired:.3f}**, and {self.complete[1]:.3f} with everything."
        )

    @property
    def blocks(self) -> list[Block]:
        """The sentence, the picture, and its numbers."""
        rows: list[list[Cell | str]] = [
            ["a model of this modality alone", f"{self.alone:.3f}", "–"],
            ["plain training", Cell(f"{self.kept:.3f}", strong=True), f"{self.complete[0]:.3f}"],
            ["EBR robust", Cell(f"{self.repaired:.3f}", strong=True), f"{self.complete[1]:.3f}"],
        ]
        columns = [self.data, f"{self.modality} alone", "everything"]
        return [Callout(self.sentence, "finding"), self.drawing.figure(), Table(columns, rows, "")]


def demo_story(found: Sequence[DemoFindings]) -> Story | None:
    """Of all modalities the one that plain training kept least of and the repair brought back most of; None without both
    models, or where nothing was lost and brought back."""
    best: tuple[float, DemoFindings, str] | None = None
    for f in found:
        before, after = (f.runs.get(_METHODS[name].title) for name in (_FIRST, _REPAIR))
        if before and after:
            kept, repaired = reliance(before)[1], reliance(after)[1]
            for m in kept:
                gain = (repaired[m]["single_modality"] - kept[m]["single_modality"]) / max(1e-9, 1 - f.chance)
                if gain < _WORTH_TELLING or kept[m]["unimodal"] <= kept[m]["single_modality"]:
                    continue
                best = max(filter(None, (best, (gain, f, m))), key=lambda entry: entry[0])
    if best is None:
        return None
    _, f, m = best
    before, after = (f.runs[_METHODS[name].title] for name in (_FIRST, _REPAIR))
    (whole, kept), (whole_after, repaired) = reliance(before), reliance(after)
    titles = ("plain training", _METHODS[_REPAIR].title)
    return Story(
        f.comparison.data, m, f.comparison.main.metric, kept[m]["unimodal"], kept[m]["single_modality"],
        repaired[m]["single_modality"], (whole, whole_after), draw_repair(before, after, titles, f.chance),
    )  # fmt: skip


def run_demo(plan: DemoPlan, folder: Path, *, workers: int, on_event: Event) -> list[DemoFindings]:
    """Finish every run in ``folder``; what is finished is taken over. Events and errors as in ``jobs.finish``."""
    data_sets = load_data_configs(plan.data)

    def job(method: str, data: Any, seed: int, unimodal: str | None) -> Job:
        config = demo_config(plan, method)
        everything = settings_of(data, seed, config, evaluate_on=["test"], unimodal=unimodal)
        return Job(f"runs/{data.name}/{method}-{seed}", train_and_keep, everything)

    first = [(_FIRST, d, s, job(_FIRST, d, s, None)) for d in data_sets for s in plan.seeds]
    number = len(plan.methods) * len(first)

    def counted(event: Any) -> None:
        """One bar over both stages: the first one announces the jobs of the second too."""
        on_event((*event[:2], event[2] + number - len(first)) if event[0] == "plan" else event)

    results = finish([j for *_, j in first], folder, workers=workers, on_event=counted)
    shared = {(d.name, s): None if r.failed else j.own for (_, d, s, j), r in zip(first, results, strict=True)}
    jobs = [
        (m, d, s, job(m, d, s, None if m == _FIRST else shared[d.name, s]))
        for m in plan.methods
        for d in data_sets
        for s in plan.seeds
    ]
    results = finish(
        [j for *_, j in jobs], folder, workers=workers, on_event=lambda e: None if e[0] == "plan" else on_event(e)
    )
    runs, stored = [], {}
    for (m, d, s, j), result in zip(jobs, results, strict=True):
        if not result.failed:
            stored[m, d.name, s] = load_run(folder / j.own).results
            result = _scored(result, stored[m, d.name, s], folder / j.own)
        runs.append(Run(m, d.name, s, j, result))
    finished = Finished({(m, d.name): {} for m in plan.methods for d in data_sets}, runs)
    return [
        _one(f, [m for m in plan.methods if m in f.main.scores], runs, stored)
        for f in find(finished, [_METHODS[m] for m in plan.methods], resamples=100 if plan.quick else 1000)
    ]


def _scored(result: Result, stored: Results, own: Path) -> Result:
    """The result with what a comparison needs: test predictions, scores, realised missing rates."""
    test = load_predictions(own)["test"]
    task = task_from_dict(stored["data"]["task"])
    # Predictions of unimodal models are stored beside these and are NaN where their modality is absent.
    found = {n: p for n, p in test.answers.items() if n == "complete" or n.startswith("missing_")}
    values = {
        "metric": task.metric,
        "batch_rows": None,
        "scores": {name: task.scores(p, test.labels) for name, p in found.items()},
        "realised": {f"missing_{e['rate']:g}": e["realised"] for e in stored["scores"]["missing"]},
        "without_effect": without_effect(stored),
    }
    arrays = {"labels": test.labels.numpy()} | {name: p.numpy() for name, p in found.items()}
    return replace(result, values=values, arrays=arrays)


def _one(f: Findings, methods: Sequence[str], runs: Sequence[Run], stored: Mapping[Any, Results]) -> DemoFindings:
    labels = next(r.result.arrays["labels"] for r in runs if r.data == f.data and not r.result.failed)
    chance = chance_score(f.main.metric, torch.as_tensor(labels).numpy())
    by_title = {_METHODS[m].title: [stored[m, f.data, s] for s in f.main.seeds] for m in methods}
    return DemoFindings(f, chance, by_title, {title: verdicts(some) for title, some in by_title.items()})


def demo_drawings(f: DemoFindings) -> dict[str, Drawing]:
    """Reliance of the models that are looked into, and the adversary of those that have one."""
    drawings = {}
    for title, runs in f.looked_into.items():
        name = next(m for m, config in _METHODS.items() if config.title == title)
        drawings[f"reliance-{name}"] = draw_reliance(runs, title, f.chance)
        found = probe(runs[0])
        if found is not None:
            drawings[f"adversary-{name}"] = draw_adversary(runs, title, found["chance"])
    return drawings


def demo_blocks(f: DemoFindings) -> list[Block]:
    """What became of the modalities, the post-hoc probe, every setting."""
    collapsed = any(v.kind == "collapsed" for v in f.verdicts[_METHODS[_FIRST].title])
    blocks: list[Block] = [Callout(literal(f.summary), "finding" if collapsed else "note")]
    blocks.append(reliance_table(f.looked_into))
    if (table := probe_table(f.looked_into)) is not None:
        blocks.append(table)
    configs = {title: runs[0]["config"] for title, runs in f.runs.items()}
    return [*blocks, Details("All settings", [settings_table(configs)])]
