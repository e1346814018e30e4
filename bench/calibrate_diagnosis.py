"""How the thresholds of the diagnosis were set, and how often its verdicts are wrong on seeds that set nothing.

Run: ``python bench/calibrate_diagnosis.py [--set 60] [--judge 100] [--rows rows.jsonl] [--json out.json]``. Seeds below 10,000 set the
thresholds, seeds from 10,000 on judge them; ``--rows`` keeps what is done, so that a stopped run goes on. Known truth:

- healthy: networks trained on modalities that all carry signal of one kind, of drawn strengths and sizes (two or three of
  them); no verdict "collapsed" or "ignored" is right.
- noise: the same with one modality that carries nothing; "collapsed" and "relied on" are wrong for it.
- shuffled: the same, but one modality had its rows shuffled in training, so that the network could learn nothing from it
  though it carries signal; "collapsed" is right.
- hard: networks trained on ``data.planted_collapse``, whose "hard" modality a plain network learns to use by three quarters at
  most; a quarter of these as many. "Collapsed" is right.
- unmixed: ``testing.planted_head`` without shared neurons and with drawn jitter; "mixing" is wrong. And with a quarter of
  the neurons shared; there it is right.

Every network is judged twice: with the scores of unimodal networks of the same shape as ``alone``, and with the probes of the
diagnosis itself, trained on the training part.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from mmc_fast.diagnose import THRESHOLDS, Diagnosis, diagnose
from mmc_fast.experiments import data
from mmc_fast.experiments.data import MultimodalDataset, Part, SyntheticModality
from mmc_fast.testing import planted_head

JUDGING = 10_000
"""The first seed that sets nothing."""


class Concat:
    """A network on the modalities side by side, as an adapter for parts of a data set."""

    def __init__(
        self,
        dataset: MultimodalDataset,
        hidden: int,
        epochs: int,
        dropout: float,
        seed: int,
        shuffled: int | None = None,
    ) -> None:
        self.names = dataset.modalities
        part, random = dataset.part("train"), torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            d, c = sum(dataset.dims.values()), dataset.num_classes
            self.head = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, c))
            optimizer = torch.optim.Adam(self.head.parameters(), lr=3e-3)
            for _ in range(epochs):
                views = list(part.features)
                if shuffled is not None:
                    views[shuffled] = views[shuffled][torch.randperm(len(part), generator=random)]
                x = torch.cat(views, 1)
                for rows in torch.randperm(len(x), generator=random).split(64):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(self.head(x[rows]), part.labels[rows]).backward()
                    optimizer.step()
        self.head.eval()

    def encode(self, batch: Part) -> dict[str, Tensor]:
        return dict(zip(self.names, batch.features, strict=True))

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        return self.head(torch.cat(list(features.values()), 1))

    def labels(self, batch: Part) -> Tensor:
        return batch.labels


def look(dataset: MultimodalDataset, shape: tuple[int, int, float], seed: int, shuffled: int | None = None) -> Any:
    """Train on all modalities and on each alone, in the same way; diagnose the first on the test part, twice."""
    alone = {}
    for name in dataset.modalities:
        kept = dataset.keep([name])
        part = kept.part("test")
        guess = Concat(kept, *shape, seed).fuse({name: part.features[0]}).argmax(1)
        alone[name] = float((guess == part.labels).double().mean())
    model = Concat(dataset, *shape, seed, shuffled)
    given = diagnose(model, dataset, resamples=0, metric="accuracy", alone=alone, probes=False)
    probed = diagnose(model, dataset, resamples=0, metric="accuracy")
    planted = None if shuffled is None else dataset.modalities[shuffled]
    return {"planted": planted, "alone": numbers(given), "probes": numbers(probed)}


def networks(kind: str, seed: int) -> Any:
    """Signal of the same kind in all modalities, equally easy to learn, stronger or weaker; in one none, or shuffled."""
    random = np.random.default_rng([seed, 1])
    count, classes = int(random.integers(2, 4)), int(random.integers(2, 6))
    modalities = {
        chr(ord("a") + i): SyntheticModality(
            dim=int(random.integers(8, 33)), predictive=6, strength=float(random.uniform(1.0, 2.5))
        )
        for i in range(count)
    }
    shape = (int(random.integers(24, 97)), int(random.integers(6, 20)), 0.0)
    chosen = int(random.integers(count))
    name = list(modalities)[chosen]
    if kind == "noise":
        modalities[name] = SyntheticModality(dim=modalities[name].dim, predictive=0)
    dataset = data.synthetic(2000, modalities=modalities, num_classes=classes, seed=seed)
    found = look(dataset, shape, seed, chosen if kind == "shuffled" else None)
    return found | {"planted": None if kind == "healthy" else name}


def hard(seed: int) -> Any:
    return look(data.planted_collapse(seed), (64, 25, 0.5), seed) | {"planted": "hard"}


def entropy(sharing: float, seed: int) -> float | None:
    """Mean neuron entropy of a planted head."""
    random = np.random.default_rng([seed, 2])
    jitter, m = float(random.uniform(0, 0.05)), int(random.integers(2, 4))
    planted = planted_head(seed, sharing=sharing, jitter=jitter, modalities=m, num_samples=1000, rotate=True)
    return diagnose(planted, planted.batches(), resamples=0, reliance=False).value("neuron_entropy")


def numbers(d: Diagnosis) -> list[dict[str, Any]]:
    m = len(d.modalities)
    return [
        {"modality": v.modality, "kind": v.kind, "use": (v.use_share or 0.0) * m}
        | {k: v.evidence[k] for k in ("signal", "loss", "kept") if k in v.evidence}
        for v in d.verdicts
    ]


MAKERS: dict[str, Callable[[int], Any]] = {
    "healthy": lambda seed: networks("healthy", seed),
    "noise": lambda seed: networks("noise", seed),
    "shuffled": lambda seed: networks("shuffled", seed),
    "hard": hard,
    "unmixed": lambda seed: entropy(0.0, seed),
    "quarter": lambda seed: entropy(0.25, seed),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", type=int, default=60, help="seeds of each kind that set thresholds")
    parser.add_argument("--judge", type=int, default=100, help="seeds of each kind that judge them")
    parser.add_argument("--rows", type=Path, help="file that keeps what is done")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done: dict[tuple[str, int], Any] = {}
    if arguments.rows and arguments.rows.exists():
        for line in arguments.rows.read_text("utf-8").splitlines():
            kind, seed, row = json.loads(line)
            done[kind, seed] = row
    for kind, make in MAKERS.items():
        part = 4 if kind == "hard" else 1
        seeds = [*range(arguments.set // part), *range(JUDGING, JUDGING + arguments.judge // part)]
        for seed in seeds:
            if (kind, seed) not in done:
                done[kind, seed] = make(seed)
                if arguments.rows:
                    with arguments.rows.open("a", encoding="utf-8") as file:
                        file.write(json.dumps([kind, seed, done[kind, seed]]) + "\n")
    summary = judge(done)
    print(json.dumps(summary, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def judge(done: dict[tuple[str, int], Any]) -> dict[str, Any]:
    """Quantiles over the setting seeds, error rates of the thresholds in force over the judging ones."""
    setting = {kind: [row for (k, seed), row in done.items() if k == kind and seed < JUDGING] for kind in MAKERS}
    judging = {kind: [row for (k, seed), row in done.items() if k == kind and seed >= JUDGING] for kind in MAKERS}
    found: dict[str, Any] = {"in force": vars(THRESHOLDS), "set": {}, "judged": {}}
    for source in ("alone", "probes"):
        unmissed = [
            v["kept"]
            for row in setting["healthy"]
            for v in row[source]
            if v["loss"] <= THRESHOLDS.loss and v["signal"] >= THRESHOLDS.signal
        ]
        found["set"][source] = {
            "5 % of lowest use share times m": _quantile(
                [min(v["use"] for v in r[source]) for r in setting["healthy"]], 0.05
            ),
            "5 % of kept where nothing is lost without": _quantile(unmissed, 0.05),
            "such modalities": len(unmissed),
            "median, 95 % of kept, shuffled": [
                _quantile(_planted(setting["shuffled"], source, "kept"), q) for q in (0.5, 0.95)
            ],
            "median, 95 % of kept, hard": [
                _quantile(_planted(setting["hard"], source, "kept"), q) for q in (0.5, 0.95)
            ],
        }
        bad = [any(v["kind"] in ("collapsed", "ignored") for v in row[source]) for row in judging["healthy"]]
        found["judged"][source] = {
            "healthy: a modality called collapsed or ignored": rate(bad),
            "noise called collapsed or relied on": rate(
                [k in ("collapsed", "relied on") for k in _planted(judging["noise"], source, "kind")]
            ),
            "shuffled not called collapsed": rate(
                [k != "collapsed" for k in _planted(judging["shuffled"], source, "kind")]
            ),
            "hard not called collapsed": rate([k != "collapsed" for k in _planted(judging["hard"], source, "kind")]),
        }
    found["set"]["95 % of mean neuron entropy, unmixed"] = _quantile(setting["unmixed"], 0.95)
    found["judged"]["unmixed heads called mixing"] = rate([e > THRESHOLDS.entropy for e in judging["unmixed"]])
    found["judged"]["heads with a quarter shared not called mixing"] = rate(
        [e <= THRESHOLDS.entropy for e in judging["quarter"]]
    )
    return found


def rate(wrong: list[bool]) -> str:
    """How many of how many, and the exact 95 % interval of the rate (Clopper and Pearson)."""
    if not wrong:
        return "none judged"
    low, high = stats.binomtest(sum(wrong), len(wrong)).proportion_ci()
    return f"{sum(wrong)} of {len(wrong)}, {low:.1%} to {high:.1%}"


def _planted(rows: list[Any], source: str, key: str) -> list[Any]:
    """A number of the planted modality in every row."""
    return [v[key] for row in rows for v in row[source] if v["modality"] == row["planted"] and key in v]


def _quantile(values: list[float], q: float) -> float | None:
    return round(float(np.quantile(values, q)), 3) if values else None


if __name__ == "__main__":
    main()
