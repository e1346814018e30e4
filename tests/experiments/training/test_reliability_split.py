"""Gradient accumulation: pieces of a step give the step of all rows, whatever the masks, and the same figures."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace

import pytest
import torch
from distributed_runs import cases, data, matrix, sparse
from training_data import small, tiny

from mmc_fast.experiments.training import loop, train
from mmc_fast.experiments.training.model import MultimodalModel
from mmc_fast.experiments.training.optim import build_optimizer
from mmc_fast.experiments.training.processes import Processes
from mmc_fast.experiments.training.steps import Stepper, pieces

TOLERANCE = 2e-5
"""Relative, of weights after two epochs of SGD (docs/experiments/reliability.md); measured below 1e-6."""


@pytest.fixture(autouse=True)
def _brief_probe(monkeypatch):
    monkeypatch.setattr("mmc_fast.experiments.training.adversarial._PROBE_EPOCHS", 2)


def distance(a: dict, b: dict) -> float:
    """Relative over all weights together; the ranking has to agree as well."""
    assert torch.equal(a["order"], b["order"])
    x, y = (torch.cat([s[k].double().flatten() for k in sorted(a) if k != "order"]) for s in (a, b))
    return float((x - y).norm() / x.norm())


def close(a, b) -> bool:
    """Figures of two runs, equal up to rounding."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(k in ("seconds", "timing") or close(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-3, abs=1e-6) if isinstance(a, float) and isinstance(b, float) else a == b


@pytest.mark.parametrize("name", [n for n, c in cases().items() if c.optimizer == "sgd"])
@pytest.mark.parametrize("count", [2, 5])
def test_accumulated_run_equals_the_run_of_whole_steps(name, count, seed):
    config = cases()[name]
    whole = train(data(seed), config, seed=seed)
    split = train(data(seed), replace(config, accumulate=count), seed=seed)
    assert distance(whole.model.state_dict(), split.model.state_dict()) < TOLERANCE
    assert close(whole.results["history"], split.results["history"])
    assert whole.results["adversarial"] is None or close(
        {k: v for k, v in whole.results["adversarial"].items() if k != "modality_probe" and k != "control"},
        {k: v for k, v in split.results["adversarial"].items() if k != "modality_probe" and k != "control"},
    )


@pytest.mark.parametrize("phase", ["joint", "semantic", "adversarial"])
@pytest.mark.parametrize("complete", [False, True])
def test_gradient_of_pieces_is_that_of_the_whole_in_float64_terms(phase, complete, seed):
    """Pieces of 13 rows by 4, each with other modalities missing; gradients before any step."""
    options = {"ebr_reconstruction": 0.5, "ebr_cross_recovery": 0.3}
    config = small("ebr", consistency=1.0, modality_dropout=0.3, substitute_in_training=True, **options)
    config = replace(config, ebr=replace(config.ebr, substitute="mean"))
    dataset = tiny(seed, absent=0.0 if complete else 0.4)
    part = dataset.part("train").select(torch.arange(13))
    torch.manual_seed(seed)
    model = MultimodalModel(dataset.dims, 3, config)
    found = []
    for count in (1, 4):
        split = replace(config, accumulate=count)
        stepper = Stepper(model, build_optimizer(model.groups(), config), split)
        stepper.reversal.fill_(0.7)
        stepper.random.manual_seed(seed)
        present = None if complete else part.present
        total, parts, _ = stepper.backward(
            phase, part.labels, lambda r: [x[r] for x in part.features], present, None, present
        )
        gradients = {n: None if p.grad is None else p.grad.double() for n, p in model.named_parameters()}
        found.append((gradients, float(total.detach()), parts))
    (a, total_a, parts_a), (b, total_b, parts_b) = found
    assert total_a == pytest.approx(total_b, rel=1e-5)
    torch.testing.assert_close(parts_a, parts_b, rtol=1e-5, atol=1e-6, equal_nan=True)
    scale = max(float(g.abs().max()) for g in a.values() if g is not None)
    for name, g in a.items():
        other = b[name]
        assert (g is None or not g.any()) == (other is None or not other.any()), name
        if g is not None and other is not None:
            torch.testing.assert_close(g, other, rtol=1e-4, atol=1e-6 * scale)


def test_pieces_cover_the_rows_once_and_none_is_empty(seed):
    for rows in range(40):
        for count in range(1, 9):
            found = pieces(slice(3, 3 + rows), count)
            assert [i for s in found for i in range(s.start, s.stop)] == list(range(3, 3 + rows))
            assert all(s.stop > s.start for s in found)
            shares = []
            for rank in range(count):
                process = Processes()
                process.rank, process.size = rank, count
                shares.append(process.rows(rows))
            assert [i for s in shares for i in range(s.start, s.stop)] == list(range(rows))
            assert max(s.stop - s.start for s in shares) - min(s.stop - s.start for s in shares) <= 1


class Played(Processes):
    """A process of several that take turns in threads of this one: each runs up to its next collective."""

    def __init__(self, rank: int, size: int, rounds: list[dict[int, object]], turn: threading.Condition) -> None:
        super().__init__()
        self.rank, self.size, self.rounds, self.turn, self.round = rank, size, rounds, turn, 0

    def wait(self) -> None:
        while self.turn.next % self.size != self.rank:
            assert self.turn.wait(60), "a process went another way than the others"

    def pass_on(self) -> None:
        self.turn.next += 1
        self.turn.notify_all()

    def exchange(self, value):
        if self.round == len(self.rounds):
            self.rounds.append({})
        self.rounds[self.round][self.rank] = value
        self.round += 1
        self.pass_on()
        self.wait()
        return [self.rounds[self.round - 1][rank] for rank in range(self.size)]

    def sum(self, value):
        return torch.stack(self.exchange(value.detach().clone())).sum(0)

    def broadcast(self, value):
        return copy.deepcopy(self.exchange(value if self.first else None)[0])


def in_turns(work, size: int) -> list:
    """What ``work(process)`` returns in each of ``size`` processes."""
    rounds, turn, found = [], threading.Condition(), {}
    turn.next = 0

    def run(process: Played) -> None:
        with turn:
            process.wait()
            try:
                found[process.rank] = work(process)
            finally:
                process.pass_on()

    threads = [threading.Thread(target=run, args=(Played(rank, size, rounds, turn),)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


@pytest.mark.parametrize("asked", [(), (0,), (2,)])
def test_a_wish_to_stop_reaches_every_process_with_the_losses_of_the_step(asked, seed):
    dataset, config = tiny(seed), small("ebr")
    part = dataset.part("train").select(torch.arange(13))

    def work(process: Processes):
        torch.manual_seed(seed)
        model = MultimodalModel(dataset.dims, 3, config)
        stepper = Stepper(model, build_optimizer(model.groups(), config), config, process)
        return stepper.backward(
            "joint", part.labels, lambda r: [x[r] for x in part.features], stop=process.rank in asked
        )

    total, parts, _ = work(Processes())
    for found in in_turns(work, 3):
        torch.testing.assert_close(found[:2], (total, parts))
        assert found[2] is bool(asked)


def test_processes_that_take_turns_train_the_model_of_one(seed, monkeypatch):
    """A modality in 8 % of the rows, and batches of 4 for three processes: many shares have none of it, some no row."""
    dataset, options = sparse(seed), matrix(seed, 2) | {"cross": replace(cases()["everything"], control=False)}
    for name, config in options.items():
        alone = train(dataset, config, seed=seed, evaluate_on=())

        def work(process, config=config):
            loop.join = lambda device, distributed: process
            return train(dataset, config, seed=seed, evaluate_on=())

        with monkeypatch.context() as changed:
            changed.setattr(loop, "join", None)  # and put back
            together = in_turns(work, 3)
        for result in together:
            assert distance(alone.model.state_dict(), result.model.state_dict()) < TOLERANCE, name
            assert close(alone.results["history"], result.results["history"]), name
