"""How the thresholds of the diagnosis were set, and how often its verdicts are wrong on seeds that set nothing.

Run: ``python bench/calibrate_diagnosis.py [--healthy 60] [--collapsed 20] [--unmixed 100] [--json out.json]``. Even seeds set the
thresholds, odd seeds count false alarms and hits. Three kinds of known truth:

- healthy: networks trained on modalities that all carry signal of one kind, of drawn strengths and sizes (two or three of
  them); no verdict "collapsed" or "ignored" is right.
- collapsed: networks trained on ``data.planted_collapse``, whose "hard" modality a plain network does not learn to use;
  the kinds of verdict on it are listed.
- unmixed: ``testing.planted_head`` without shared neurons and with drawn jitter; "mixing" is wrong. And with a quarter of
  the neurons shared; there it is right.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmc_fast import data
from mmc_fast.analysis.diagnosis import THRESHOLDS, Diagnosis, diagnose
from mmc_fast.data import MultimodalDataset, Part, SyntheticModality
from mmc_fast.testing import planted_head

BAD = ("collapsed", "ignored")


class Concat:
    """A network on the modalities side by side, as an adapter for parts of a data set."""

    def __init__(self, dataset: MultimodalDataset, hidden: int, epochs: int, dropout: float, seed: int) -> None:
        self.names = dataset.modalities
        part, random = dataset.part("train"), torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            d, c = sum(dataset.dims.values()), dataset.num_classes
            self.head = nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, c))
            optimizer = torch.optim.Adam(self.head.parameters(), lr=3e-3)
            x = torch.cat(part.features, 1)
            for _ in range(epochs):
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


def look(dataset: MultimodalDataset, hidden: int, epochs: int, dropout: float, seed: int) -> Diagnosis:
    """Train on all modalities and on each alone, in the same way; diagnose the first on the test part."""
    alone = {}
    for name in dataset.modalities:
        kept = dataset.keep([name])
        part = kept.part("test")
        guess = Concat(kept, hidden, epochs, dropout, seed).fuse({name: part.features[0]}).argmax(1)
        alone[name] = float((guess == part.labels).double().mean())
    model = Concat(dataset, hidden, epochs, dropout, seed)
    return diagnose(model, dataset, resamples=0, metric="accuracy", alone=alone, probes=False, thresholds=THRESHOLDS)


def healthy(seed: int) -> Diagnosis:
    """Signal of the same kind in all modalities, equally easy to learn, stronger or weaker."""
    random = np.random.default_rng([seed, 1])
    count, classes = int(random.integers(2, 4)), int(random.integers(2, 6))
    modalities = {
        chr(ord("a") + i): SyntheticModality(
            dim=int(random.integers(8, 33)), predictive=6, strength=float(random.uniform(1.0, 2.5))
        )
        for i in range(count)
    }
    dataset = data.synthetic(2000, modalities=modalities, num_classes=classes, seed=seed)
    return look(dataset, int(random.integers(24, 97)), int(random.integers(6, 20)), 0.0, seed)


def collapsed(seed: int) -> Diagnosis:
    return look(data.planted_collapse(seed), 64, 25, 0.5, seed)


def numbers(d: Diagnosis) -> list[dict[str, Any]]:
    m = len(d.modalities)
    return [
        {"modality": v.modality, "kind": v.kind, "use": (v.use_share or 0.0) * m}
        | {k: v.evidence[k] for k in ("signal", "loss", "kept") if k in v.evidence}
        for v in d.verdicts
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--healthy", type=int, default=60)
    parser.add_argument("--collapsed", type=int, default=20)
    parser.add_argument("--unmixed", type=int, default=100)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, list[Any]] = {"healthy": [], "collapsed": [], "unmixed": [], "quarter": []}
    for kind, make, count in (("healthy", healthy, arguments.healthy), ("collapsed", collapsed, arguments.collapsed)):
        for seed in range(count):
            rows[kind].append(numbers(make(seed)))
            print(kind, seed, rows[kind][-1], flush=True)
    for seed in range(arguments.unmixed):
        random = np.random.default_rng([seed, 2])
        jitter, m = float(random.uniform(0, 0.05)), int(random.integers(2, 4))
        for kind, sharing in (("unmixed", 0.0), ("quarter", 0.25)):
            planted = planted_head(seed, sharing=sharing, jitter=jitter, modalities=m, num_samples=1000, rotate=True)
            d = diagnose(planted, planted.batches(), resamples=0, reliance=False)
            rows[kind].append(d.value("neuron_entropy"))
    summary = judge(rows)
    print(json.dumps(summary, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps({"summary": summary, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def judge(rows: dict[str, list[Any]]) -> dict[str, Any]:
    """Quantiles over even seeds, error rates of the thresholds in force over odd seeds."""
    even = [v for model in rows["healthy"][::2] for v in model]
    odd = rows["healthy"][1::2]
    lowest = [min(v["use"] for v in model) for model in rows["healthy"][::2]]
    candidates = [v["kept"] for v in even if v.get("loss", 1.0) <= THRESHOLDS.loss and v["signal"] >= THRESHOLDS.signal]
    hard = [next(v for v in model if v["modality"] == "hard") for model in rows["collapsed"]]
    return {
        "in force": vars(THRESHOLDS),
        "set on even seeds": {
            "5 % of lowest use share times m, healthy": _quantile(lowest, 0.05),
            "5 % of kept where nothing is lost without, healthy": _quantile(candidates, 0.05),
            "such modalities": len(candidates),
            "95 % of mean neuron entropy, unmixed": _quantile(rows["unmixed"][::2], 0.95),
        },
        "on odd seeds": {
            "healthy models": len(odd),
            "false alarms (a modality called collapsed or ignored)": sum(any(v["kind"] in BAD for v in m) for m in odd),
            "hard modality, planted collapse": [v["kind"] for v in hard[1::2]],
            "unmixed heads": len(rows["unmixed"][1::2]),
            "unmixed heads called mixing": sum(e > THRESHOLDS.entropy for e in rows["unmixed"][1::2]),
            "heads with a quarter shared called mixing": sum(e > THRESHOLDS.entropy for e in rows["quarter"][1::2]),
        },
    }


def _quantile(values: list[float], q: float) -> float | None:
    return float(np.quantile(values, q)) if values else None


if __name__ == "__main__":
    main()
