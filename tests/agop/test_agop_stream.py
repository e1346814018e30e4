"""Streams, restarts and processes: merge, state, sync, changed heads, and memory that does not grow."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from agop_heads import chain, jacrev_agop
from torch import nn

from mmc_fast.agop import AGOPAccumulator, agop
from mmc_fast.errors import InputError
from mmc_fast.testing import relative_error

ROOT = Path(__file__).resolve().parents[2]


class Custom(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def kinds(generator):
    """One head and its options for every way to sum."""
    relu = chain([6, 20, 4], "relu", generator)
    deep = chain([6, 10, 9, 4], "gelu", generator)
    return [
        (relu, {}),
        (relu, {"center": True, "input_cov": True}),
        (chain([6, 20, 4], "leaky_relu", generator), {"center": True}),
        (chain([6, 20, 4], "silu", generator), {}),
        (chain([6, 20, 4], "silu", generator), {"center": True, "reduction": "mean"}),
        (deep, {"center": True}),
        (deep, {"layer": 2}),
        (relu, {"output": "probs", "center": True, "input_cov": True}),
        (deep, {"probes": 3, "center": True}),
        (Custom(deep), {"center": True, "output": "probs"}),
        (Custom(deep), {"probes": 2}),
    ]


def test_merge_equals_one_pass(generator):
    x = torch.randn(400, 6, generator=generator) + torch.linspace(-2, 2, 400)[:, None]
    for head, options in kinds(generator):
        if options.get("probes"):
            continue
        one = AGOPAccumulator(head, **options).update(x).compute()
        parts = [AGOPAccumulator(head, **options).update(part) for part in (x[:0], x[:10], x[10:300], x[300:])]
        total = AGOPAccumulator(head, **options)
        for part in parts:
            total.merge(part)
        merged = total.merge(AGOPAccumulator(head, **options)).compute()
        assert (merged.n, merged.backend) == (400, one.backend)
        assert relative_error(merged.matrix, one.matrix) < 1e-5
        if one.input_cov is not None:
            assert relative_error(merged.input_cov, one.input_cov) < 1e-5
        assert total.update(x[:50]).n == 450


def test_integer_counts_merge_bitwise(generator):
    head = chain([6, 33, 4], "relu", generator)
    x = torch.randn(1000, 6, generator=generator)
    one = AGOPAccumulator(head, center=True).update(x)
    total = AGOPAccumulator(head, center=True)
    for part in reversed(x.split(130)):
        total.merge(AGOPAccumulator(head, center=True).update(part))
    assert torch.equal(total.method.state.counts, one.method.state.counts)
    assert torch.equal(total.compute().matrix, one.compute().matrix)


def test_probe_shards_need_seeds_of_their_own(generator):
    head = chain([6, 10, 9, 4], "gelu", generator)
    x = torch.randn(100, 6, generator=generator)
    first = AGOPAccumulator(head, probes=2, seed=1).update(x)
    with pytest.raises(InputError, match="both accumulators drew probes with seed 1"):
        first.merge(AGOPAccumulator(head, probes=2, seed=1).update(x))
    assert first.merge(AGOPAccumulator(head, probes=2, seed=2).update(x)).n == 200
    resumed = AGOPAccumulator(head, probes=2, seed=3)
    resumed.load_state_dict(first.state_dict())
    assert resumed.state_dict()["seed"] == 1
    with pytest.raises(InputError, match="both accumulators drew probes with seed 1"):
        resumed.merge(AGOPAccumulator(head, probes=2, seed=1).update(x))


def test_a_run_goes_on_from_its_state(generator):
    x = torch.randn(300, 6, generator=generator)
    for head, options in kinds(generator):
        one = AGOPAccumulator(head, **options).update(x[:130]).update(x[130:])
        before = AGOPAccumulator(head, **options).update(x[:130])
        file = io.BytesIO()
        torch.save(before.state_dict(), file)
        file.seek(0)
        after = AGOPAccumulator(copy.deepcopy(head), **options)
        after.load_state_dict(torch.load(file, weights_only=True))
        after.update(x[130:])
        assert after.n == 300
        assert torch.equal(after.compute().matrix, one.compute().matrix), (head, options)
        assert before.update(x[130:]).n == 300  # the saved one goes on as well


def test_a_state_of_something_else_is_refused(generator):
    head = chain([6, 20, 4], "relu", generator)
    state = AGOPAccumulator(head).update(torch.randn(50, 6, generator=generator)).state_dict()
    other = copy.deepcopy(head)
    with torch.no_grad():
        other[0].bias[3] += 1e-6
    changes = {"layer": 1, "output": "probs", "center": True, "probes": 2, "precision": "float64", "input_cov": True}
    for wrong in (AGOPAccumulator(other), *(AGOPAccumulator(head, **{k: v}) for k, v in changes.items())):
        with pytest.raises(InputError, match="belongs to another head"):
            wrong.load_state_dict(state)
        assert wrong.n == 0
        with pytest.raises(InputError, match="differ in the head"):
            AGOPAccumulator(head).update(torch.zeros(1, 6)).merge(wrong)
    with pytest.raises(InputError, match="has version 7; this release reads version 1"):
        AGOPAccumulator(head).load_state_dict({**state, "version": 7})
    with pytest.raises(InputError, match="not the state of an AGOPAccumulator"):
        AGOPAccumulator(head).load_state_dict(head.state_dict())
    AGOPAccumulator(head, reduction="mean", chunk_size=64).load_state_dict(state)  # speed and scale may differ
    half, bits = copy.deepcopy(head).half(), copy.deepcopy(head).bfloat16()
    for a, b in zip(half.parameters(), bits.parameters(), strict=True):
        b.data.copy_(a.data.view(torch.bfloat16))
    assert AGOPAccumulator(half).fingerprint != AGOPAccumulator(bits).fingerprint, "the same bits, other numbers"


def test_a_head_that_changes_is_refused(generator):
    x = torch.randn(50, 6, generator=generator)
    for head in (chain([6, 20, 4], "relu", generator), Custom(chain([6, 5, 4], "tanh", generator))):
        accumulator = AGOPAccumulator(head).update(x)
        optimiser = torch.optim.SGD(head.parameters(), lr=0.1)
        head(x).sum().backward()
        accumulator.update(x)  # gradients are no change
        optimiser.step()
        for act in (lambda a: a.update(x), lambda a: a.compute(), lambda a: a.state_dict()):
            with pytest.raises(RuntimeError, match="weights changed after the accumulator was made"):
                act(accumulator)
        assert accumulator.n == 100
    norm = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()
    accumulator = AGOPAccumulator(norm).update(x)
    norm[1].running_mean.add_(1)
    with pytest.raises(RuntimeError, match="weights changed"):
        accumulator.compute()


def test_what_is_not_finite_stays_so_through_merges_and_states(generator):
    good = torch.randn(40, 6, generator=generator)
    bad = good.clone()
    bad[3] = float("nan")
    for head, options in kinds(generator):
        seeds = iter(range(9))

        def summed(x, head=head, options=options, seeds=seeds):
            return AGOPAccumulator(head, seed=next(seeds), **options).update(x)

        for total in (summed(good).merge(summed(bad)), summed(bad).merge(summed(good))):
            assert total.compute().matrix.isnan().all()
        restored = AGOPAccumulator(head, **options)
        restored.load_state_dict(total.state_dict())
        assert restored.compute().matrix.isnan().all()
        restored.load_state_dict(summed(good).state_dict())
        assert restored.n == 40
        assert restored.compute().matrix.isfinite().all()
        empty = AGOPAccumulator(head, **options).merge(restored)
        assert (empty.n, empty.compute().backend) == (40, restored.compute().backend)
        synced = AGOPAccumulator(head, **options)
        synced.load_state_dict(restored.state_dict() | {"synced": True})
        for late in (lambda s=synced: s.update(good), synced.sync, lambda s=synced: s.merge(summed(good))):
            with pytest.raises(RuntimeError, match="all processes"):
                late()


@pytest.mark.parametrize(
    ("options", "largest"),
    [({"chunk_size": 1}, 64), ({"chunk_size": 64}, 64), ({"chunk_size": 65}, 128), ({"memory_budget": 1}, 1),
     ({"memory_budget": 100_000}, None), ({}, None)],
)  # fmt: skip
def test_chunks_are_whole_words_of_64_and_fit_the_budget(options, largest, generator):
    head = chain([6, 10, 9, 4], "gelu", generator)
    accumulator = AGOPAccumulator(head, **options)
    plain, rows = accumulator.method.update, []
    accumulator.method.update = lambda u, *more: rows.append(len(u)) or plain(u, *more)
    accumulator.update(torch.randn(300, 6, generator=generator))
    assert sum(rows) == 300
    floats = accumulator.method.floats_per_sample + 6
    if largest is None:
        budget = min(options.get("memory_budget", 2**40), 16 * 2**20)
        whole = budget // (4 * floats) // 64 * 64
        assert max(rows) == min(300, whole), "as many as fit"
    else:
        assert set(rows[:-1]) == {largest}


def test_a_result_stays_as_it_is_when_more_data_comes(generator):
    x = torch.randn(200, 6, generator=generator)
    for head, options in kinds(generator):
        accumulator = AGOPAccumulator(head, **options).update(x[:100])
        early, alone = accumulator.compute(), AGOPAccumulator(head, **options).update(x[:100]).compute().matrix
        accumulator.update(x[100:])
        assert torch.equal(early.matrix, alone)
        assert not torch.equal(accumulator.compute().matrix, alone)


WORKER = """
import sys, torch, torch.distributed as dist
from agop_heads import chain
from mmc_fast.agop.accumulator import AGOPAccumulator
torch.set_num_threads(1)
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
generator = torch.Generator().manual_seed(11)
x = torch.randn(403, 6, generator=generator) + torch.linspace(-2, 2, 403)[:, None]
runs = [(chain([6, 40, 4], "relu", generator), dict(center=True, input_cov=True)),
        (chain([6, 40, 4], "silu", generator), dict(center=True)),
        (chain([6, 10, 9, 4], "gelu", generator), dict(output="probs", center=True)),
        (chain([6, 10, 9, 4], "gelu", generator), dict(probes=2, seed=rank))]
out = []
for head, options in runs:
    calls = []
    reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(1), reduce(*args, **kwargs))[1]
    mine = x[rank::world]
    if options.get("output") == "probs" and world > 1:  # the first process has no sample at all
        mine = x[rank - 1 :: world - 1] if rank else x[:0]
    total = AGOPAccumulator(head, **options).update(mine).sync()
    dist.all_reduce = reduce
    assert len(calls) == 1
    for late in (lambda: total.update(x), total.sync):
        try:
            late()
        except RuntimeError:
            pass
        else:
            raise SystemExit("counted twice")
    state = total.method.state
    result = total.compute()
    out.append((total.n, result.matrix, getattr(state, "counts", None), result.input_cov))
other = chain([6, 40, 4], "relu", torch.Generator().manual_seed(rank))
if world > 1:
    same_seed = AGOPAccumulator(runs[3][0], probes=2, seed=3)
    for accumulator, message in ((AGOPAccumulator(other), "different heads"), (same_seed, "one seed")):
        try:
            accumulator.update(x).sync()
        except RuntimeError as error:
            assert message in str(error), error
        else:
            raise SystemExit("not noticed: " + message)
torch.save(out, f"{folder}/out{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_processes_equal_one_process(tmp_path):
    results = {}
    for world in (1, 2, 4):
        folder = tmp_path / str(world)
        folder.mkdir()
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(rank), str(world), str(folder)], env=environment, cwd=ROOT
            )
            for rank in range(world)
        ]
        assert [worker.wait(timeout=200) for worker in workers] == [0] * world
        results[world] = [torch.load(folder / f"out{rank}.pt") for rank in range(world)]
    alone = results[1][0]
    for world in (2, 4):
        for result in results[world]:
            for (n, matrix, counts, covariance), (n1, matrix1, counts1, covariance1) in zip(
                result[:3], alone[:3], strict=True
            ):
                assert n == n1 == 403
                assert relative_error(matrix, matrix1) < 2e-6
                if counts is not None:
                    assert torch.equal(counts, counts1)
                    assert torch.equal(matrix, matrix1)
                if covariance is not None:
                    assert relative_error(covariance, covariance1) < 1e-6
            assert torch.equal(result[3][1], results[world][0][3][1])  # every process holds the same total


def test_sync_needs_a_process_group(generator):
    accumulator = AGOPAccumulator(chain([6, 8, 3], "relu", generator))
    with pytest.raises(RuntimeError, match="needs a process group"):
        accumulator.sync()
    with pytest.raises(RuntimeError, match="has seen no batch"):
        AGOPAccumulator(Custom(chain([6, 8, 3], "relu", generator))).sync()
    with pytest.raises(TypeError, match="merge takes an AGOPAccumulator"):
        accumulator.merge(accumulator.state_dict())


def test_generators_and_loaders_of_batches(generator):
    head = chain([6, 8, 3], "gelu", generator)
    x = torch.randn(150, 6, generator=generator)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=40)
    assert relative_error(agop(head, (batch for batch, *_ in loader)), jacrev_agop(head, x)) < 2e-6


GROWTH = """
import resource, sys, torch
from torch import nn
from mmc_fast.agop import AGOPAccumulator
torch.set_num_threads(1)
d, h, batch, batches = map(int, sys.argv[1:])
head = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, 100))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
x = torch.randn(batch, d)
accumulator = AGOPAccumulator(head, center=batches > 1)
if batches > 1:
    for _ in range(3):
        accumulator.update(x)
else:  # what libraries set up once
    AGOPAccumulator(head).update(x[:64]).compute().matrix
    nn.functional.linear(x[:4096], head[0].weight)
before = peak()
for _ in range(batches):
    accumulator.update(x.roll(1, 0) if batches > 1 else x)
accumulator.compute().matrix
print(peak() - before)
"""


def growth(*sizes: int) -> int:
    """Bytes by which the peak memory of a process of its own grows over a run of [d, h, batch, batches]."""
    command = [sys.executable, "-c", GROWTH, *map(str, sizes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return 1024 * int(subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True).stdout)


def test_a_stream_needs_constant_memory():
    assert growth(64, 256, 50_000, 7) < 25e6


@pytest.mark.slow
def test_ten_million_samples_need_constant_memory():
    assert growth(64, 256, 50_000, 200) < 25e6


def test_memory_beyond_the_inputs_is_sums_and_a_chunk():
    """The largest head of the figures: below the stated 6 (h² + h d + d²) words and a chunk, seen by the system."""
    assert growth(512, 1024, 40_000, 1) <= 8 * 6 * (1024**2 + 1024 * 512 + 512**2) + 64 * 2**20
