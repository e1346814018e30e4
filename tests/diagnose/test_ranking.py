"""AUROC at constant memory against scikit-learn, and the memory of a whole diagnosis."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from mmc_fast.diagnose.ranking import BINS, EXACT, RankedPairs

GROUPS = 4


def drawn(order: str, seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of five shapes: smooth, far from zero, few values, heavy tails, constant; labels and groups."""
    random = np.random.default_rng(seed)
    labels = (random.random(rows) < 0.2).astype(np.int64)
    if order == "by class":
        labels = np.sort(labels)
    z = random.standard_normal(rows) + labels
    scores = np.stack([z, 500 + 0.01 * z, np.round(2 * z), np.sinh(3 * z), np.zeros(rows)]).astype(np.float32)
    return torch.from_numpy(scores), torch.from_numpy(labels), torch.from_numpy(random.integers(GROUPS, size=rows))


def added(scores: torch.Tensor, labels: torch.Tensor, places: torch.Tensor) -> RankedPairs:
    ranked = RankedPairs(len(scores), GROUPS)
    for index, rows in enumerate(torch.arange(len(labels)).split(5000)):
        ranked.add(scores[:, rows], labels[rows], places[rows])
        if index % 3 == 0:  # as a diagnosis that was killed
            again = RankedPairs(len(scores), GROUPS)
            again.load_state(ranked.to_state())
            ranked = again
    return ranked


@pytest.mark.parametrize("order", ["drawn", "by class"])
@pytest.mark.parametrize("rows", [EXACT - 1, 4 * EXACT])
def test_ranked_pairs_of_groups(rows: int, order: str, seed: int) -> None:
    scores, labels, places = drawn(order, seed, rows)
    ranked = added(scores, labels, places)
    pairs, errors = ranked.pairs(), ranked.errors()
    assert (errors[:2] > 0).all() == (rows > EXACT)
    assert errors[4] == 0
    assert errors.max() < 0.01
    for s, row in enumerate(scores):
        wins = pairs[s].sum() / (int(labels.sum()) * int((1 - labels).sum()))
        truth = roc_auc_score(labels, row)
        assert abs(wins - truth) <= errors[s] + 1e-12, (s, wins, truth)
    for k, l in itertools.product(range(GROUPS), repeat=2):  # pairs of groups, of scores with ties too
        high, low = (labels == 1) & (places == k), (labels == 0) & (places == l)
        some = high | low
        for s in (0, 2):
            expected = roc_auc_score(labels[some], scores[s, some])
            assert pairs[s, k, l] / (int(high.sum()) * int(low.sum())) == pytest.approx(expected, rel=2e-3)
    if rows > EXACT and order == "drawn":
        assert errors[:2].max() <= 1.1 / (2 * BINS), "the bins follow the scores, wherever they lie"


def test_groups_without_a_positive_or_a_negative() -> None:
    ranked = RankedPairs(1, 3)
    ranked.add(torch.tensor([[1.0, 2.0, 2.0, 3.0]]), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]))
    assert ranked.pairs()[0].tolist() == [[1.0, 0.5, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


MEMORY = """
import resource, sys, torch
from torch import nn
from mmc_fast.diagnose import diagnose

class Model:
    def encode(self, batch): return {n: batch[0][:, 2 * i:2 * i + 2] for i, n in enumerate("abcd")}
    def fuse(self, features): return torch.cat(list(features.values()), 1).sum(1, keepdim=True)

class Stream:
    def __init__(self, count): self.count = count
    def __iter__(self):
        for index in range(self.count):
            x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(index))
            yield x, (x[:, 0] > 0).long()

d = diagnose(Model(), Stream(int(sys.argv[1])), probes=False, resamples=20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, d.settings["auroc_error"])
"""


def test_memory_does_not_grow_with_the_rows() -> None:
    """Four times the rows, 36 scores each: by keeping them the peak would rise by half."""
    peaks = []
    for batches in ("40", "160"):
        run = [sys.executable, "-c", MEMORY, batches]
        peak, error = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
        peaks.append(float(peak))
        assert 0 < float(error) < 1e-3
    assert peaks[1] < 1.05 * peaks[0], peaks
