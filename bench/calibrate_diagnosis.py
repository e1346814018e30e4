"""How often the diagnosis is wrong: planted truth in real data, models trained here.

Run: ``MMC_DATA=folder python bench/calibrate_diagnosis.py [--seeds 0 1 2] [--rows docs/results/diagnosis-calibration.jsonl] [--csv out.csv]``. ``--rows`` keeps what is
done, so that a stopped run goes on; ``--seeds`` without a number only judges it. For each data set, fusion and seed one modality is drawn, and

- healthy: the model is trained with modality dropout on the data as they are; every modality that carries something by itself is
  used by such a model, so "collapsed", "misleading" and "under-used" are wrong;
- collapsed: the modality's rows are shuffled anew in each epoch of training (plain, or with modality dropout), so that the model learned nothing from it,
  and untouched in the test; "collapsed" is right where the modality carries something;
- noise: the modality is standard normal noise everywhere; "uninformative" is right, and so is "misleading", where the model answers it.

Ability comes from unimodal models trained on the untouched data. The rule and its thresholds were set on the seeds 0 to 4 and are
judged on the other seeds.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import nn

from mmc_fast.diagnose import THRESHOLDS, diagnose
from mmc_fast.diagnose.verdict import Thresholds, carries, kind_of
from mmc_fast.experiments import data
from mmc_fast.experiments.data import MultimodalDataset
from mmc_fast.experiments.training.adapter import RunAdapter
from mmc_fast.experiments.training.config import TrainConfig
from mmc_fast.experiments.training.model import MultimodalModel
from mmc_fast.experiments.training.unimodal import UnimodalModels, train_unimodal

SETS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "mfeat": ("mfeat", {}, ()),
    "support2": ("support2", {}, ()),
    "avmnist": ("avmnist_small", {}, ()),
    "avmnist speaker": ("avmnist", {"variant": "speaker"}, ()),
    "p2012": ("p2012", {}, ()),
    "diabetes130": ("diabetes130", {}, ("admission", "utilisation_labs", "diagnoses", "disposition")),
    "avmnist hard": ("avmnist", {"variant": "hard"}, ()),
    "eicu_demo": ("eicu_demo", {}, ("demographics", "bedside", "labs", "bp_series", "diagnoses")),
}
"""Name here -> data set, options, the modalities that are kept (none: all)."""
SETTING = (0, 1, 2, 3, 4)
"""Seeds that the rule was set on; the others judge it."""
PLANTED = ("healthy", "collapsed", "noise")
FUSIONS = ("concat", "late", "transformer")
ROWS = {"diabetes130": (8000, 4000, 4)}
"""Rows of the train and the test part at most, and epochs, where they are not these: a weak signal needs more rows."""
USUAL, DROPOUT = (2500, 1500, 12), 0.5


EVIDENCE = (
    "all", "chance", "chance_error", "alone", "alone_error", "only", "ability", "shuffled", "lost_error", "total_effect", "loss",
    "index", "index_low", "index_high", "alignment",
)  # fmt: skip


RATES = (
    ("healthy", "healthy: collapsed or misleading", ("collapsed", "misleading")),
    ("healthy", "healthy: under-used", ("under-used",)),
    ("healthy", "healthy: undecided", ("undecided",)),
    ("collapsed", "shuffled in training: collapsed", ("collapsed",)),
    ("noise", "noise: uninformative or misleading", ("uninformative", "misleading")),
    ("noise", "noise: misleading", ("misleading",)),
)
"""What is planted, the name of a rate, and the verdicts that count in it."""


class Job(NamedTuple):
    """One model: its data set, fusion, seed, what is planted, whether modalities are dropped in training."""

    data: str
    fusion: str
    seed: int
    planted: str
    dropout: bool


def jobs(seeds: Sequence[int]) -> Iterator[Job]:
    """All models, one seed after the other, so that a stopped run covers all data sets."""
    for seed in seeds:
        for fusion in FUSIONS if seed % 2 == 0 else FUSIONS[::-1]:
            for name in SETS:
                yield Job(name, fusion, seed, "healthy", True)
                for planted in ("collapsed", "noise"):
                    for dropout in (False, True):
                        yield Job(name, fusion, seed, planted, dropout)


def load(name: str, seed: int) -> MultimodalDataset:
    """A data set with at most so many rows in each part."""
    source, options, kept = SETS[name]
    found = data.load(source, **options)
    found = found.keep(list(kept)) if kept else found
    random, chosen = torch.Generator().manual_seed(seed), []
    for part, most in ((0, ROWS.get(name, USUAL)[0]), (1, 500), (2, ROWS.get(name, USUAL)[1])):
        rows = torch.nonzero(found.split == part).flatten()
        chosen.append(rows[torch.randperm(len(rows), generator=random)[:most]].sort().values)
    rows = torch.cat(chosen)
    features = {n: x[rows] for n, x in found.features.items()}
    return replace(
        found, features=features, present=found.present[rows], labels=found.labels[rows], split=found.split[rows],
        ids=None if found.ids is None else found.ids[rows],
    )  # fmt: skip


def plant(dataset: MultimodalDataset, modality: str, planted: str, seed: int) -> MultimodalDataset:
    """The data set with one modality shuffled in its train part, or noise everywhere."""
    random = torch.Generator().manual_seed(seed + 1)
    x, column = dataset.features[modality].clone(), dataset.modalities.index(modality)
    present = dataset.present.clone()
    if planted == "noise":
        x = torch.randn(x.shape, generator=random)
        present[:, column] = True
    else:
        rows = torch.nonzero(dataset.split == 0).flatten()
        order = rows[torch.randperm(len(rows), generator=random)]
        x[rows], present[rows, column] = x[order], dataset.present[order, column]
        present[~present.any(1), column] = True
    return replace(dataset, features=dataset.features | {modality: x}, present=present)


def fit(dataset: MultimodalDataset, config: TrainConfig, seed: int, shuffled: str | None = None) -> MultimodalModel:
    """A model trained by Adam on cross-entropy; with modality dropout no row loses all.

    ``shuffled``: a modality whose rows are dealt out anew in each epoch: one order, kept, goes along with the labels by accident.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MultimodalModel(dataset.dims, dataset.num_classes, config)
    model.prior.copy_(model.task.prior(dataset.part("train").labels))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(config.epochs):
        part = (plant(dataset, shuffled, "collapsed", 1000 * seed + epoch) if shuffled else dataset).part("train")
        for rows in torch.randperm(len(part), generator=random).split(64):
            present = part.present[rows]
            if config.modality_dropout:
                kept = present & (torch.rand(present.shape, generator=random) >= config.modality_dropout)
                present = torch.where(kept.any(1, keepdim=True), kept, present)
            optimizer.zero_grad()
            logits = model([x[rows] for x in part.features], present).logits
            nn.functional.cross_entropy(logits, part.labels[rows]).backward()
            optimizer.step()
    return model.eval()


def measure(job: Job, known: dict[tuple[str, int], tuple[MultimodalDataset, UnimodalModels]]) -> dict[str, Any]:
    """Train one model and diagnose it: by modality the evidence that the rule reads, of the planted one or of all of a healthy one."""
    epochs = ROWS.get(job.data, USUAL)[2]
    if (job.data, job.seed) not in known:
        known.clear()
        dataset = load(job.data, job.seed)
        config = TrainConfig(epochs=epochs, batch_size=64)
        known[job.data, job.seed] = dataset, train_unimodal(dataset, config, seed=job.seed, fingerprint="")
    dataset, unimodal = known[job.data, job.seed]
    random = np.random.default_rng([job.seed, FUSIONS.index(job.fusion), list(SETS).index(job.data)])
    modality = str(random.choice(dataset.modalities))
    config = TrainConfig(epochs=epochs, fusion=job.fusion, modality_dropout=DROPOUT if job.dropout else 0.0)  # type: ignore[arg-type]
    judged = plant(dataset, modality, "noise", job.seed) if job.planted == "noise" else dataset
    if job.planted == "noise":  # what the noise allows by itself
        alone = train_unimodal(judged.keep([modality]), TrainConfig(epochs=epochs, batch_size=64), seed=job.seed,
                               fingerprint="")  # fmt: skip
        unimodal = replace(unimodal, models=unimodal.models | alone.models, scores=unimodal.scores | alone.scores)
    adapter = RunAdapter(fit(judged, config, job.seed, modality if job.planted == "collapsed" else None), unimodal)
    found = diagnose(adapter, judged, agop=False, probes=False, metric=dataset.metric).verdicts
    return {
        v.modality: {k: round(v.evidence[k], 5) for k in EVIDENCE if k in v.evidence}
        for v in found if job.planted == "healthy" or v.modality == modality
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[5, 6])
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--planted", nargs="*", default=list(PLANTED), choices=PLANTED)
    parser.add_argument("--rows", type=Path, help="file that keeps what is done")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--document", type=Path, help="page whose table, between two markers, is written anew")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done: dict[Job, Any] = {}
    if arguments.rows and arguments.rows.exists():
        for line in arguments.rows.read_text("utf-8").splitlines():
            job, row = json.loads(line)
            done[Job(*job)] = row
    known: dict[tuple[str, int], Any] = {}
    for job in sorted(jobs(arguments.seeds), key=lambda j: (arguments.seeds.index(j.seed), list(SETS).index(j.data))):
        if job not in done and job.data in arguments.sets and job.planted in arguments.planted:
            done[job] = measure(job, known)
            if arguments.rows:
                with arguments.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([job, done[job]]) + "\n")
    table = judged(done)
    if arguments.document:
        text = arguments.document.read_text("utf-8")
        start, end = (f"<!-- calibration: {word} -->" for word in ("start", "end"))
        before, after = text.split(start)[0], text.split(end)[1]
        arguments.document.write_text(f"{before}{start}\n{rendered(table, done)}\n{end}{after}", "utf-8")
    for line in table:
        print(", ".join(f"{key} {value}" for key, value in line.items()))
    if arguments.csv:
        with arguments.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)


def judged(done: dict[Job, Any], thresholds: Thresholds = THRESHOLDS) -> list[dict[str, Any]]:
    """Rates of right and wrong verdicts with exact 95 % intervals (Clopper and Pearson), for both halves."""
    table = []
    for half in ("setting", "judging"):
        chosen = {j: r for j, r in done.items() if (j.seed in SETTING) == (half == "setting")}
        found = {
            planted: [e for j, r in chosen.items() if j.planted == planted for e in r.values()] for planted in PLANTED
        }
        found["collapsed"] = [e for e in found["collapsed"] if carries(e, thresholds)]
        for planted, name, kinds in RATES:
            table.append(_rate(half, name, [kind_of(e, thresholds) in kinds for e in found[planted]]))
    return table


def rendered(table: list[dict[str, Any]], done: Iterable[Job]) -> str:
    """The table as Markdown: one line per kind of verdict, setting and judging side by side."""
    lines = ["| planted: verdict | models that set the rule | models that judge it |", "|---|---|---|"]
    for name in dict.fromkeys(row["verdict"] for row in table):
        cells = [
            f"{row['count']} of {row['of']}: {row['share']} [{row['low']}, {row['high']}]" if row["of"] else "–"
            for row in table
            if row["verdict"] == name
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for half, inside in (("that set the rule", True), ("that judge it", False)):
        counts = Counter(job.data for job in done if (job.seed in SETTING) == inside)
        lines += ["", f"Models {half}: {', '.join(f'{name} {counts[name]}' for name in SETS)}."]
    return "\n".join(lines)


def _rate(half: str, what: str, hits: list[bool]) -> dict[str, Any]:
    low, high = stats.binomtest(sum(hits), len(hits)).proportion_ci() if hits else (0.0, 1.0)
    share = sum(hits) / len(hits) if hits else float("nan")
    found = {"half": half, "verdict": what, "count": sum(hits), "of": len(hits)}
    return found | {"share": f"{share:.3f}", "low": f"{low:.3f}", "high": f"{high:.3f}"}


if __name__ == "__main__":
    main()
