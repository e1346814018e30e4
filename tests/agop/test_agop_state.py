"""What an AGOP remembers, against sums over all rows; the sum over processes; the order of a chain's products."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from agop_heads import chain

from mmc_fast.agop.accumulator import AGOPAccumulator
from mmc_fast.agop.rows import ChainRows, _cheapest_order
from mmc_fast.agop.state import MomentState, ProbeState

CPU = torch.device("cpu")


def upper(panel, width: int) -> torch.Tensor:
    """The symmetric matrix of a panel, taken in two pieces."""
    half = torch.zeros(width, width, dtype=torch.float64)
    for start, stop in ((0, width // 3), (width // 3, width)):
        half[start:stop, start:] = panel(start, stop)
    return half.triu() + half.triu(1).t()


@pytest.mark.parametrize("width", [9, 80])  # summed at once, and in steps
@pytest.mark.parametrize("center", [False, True])
def test_moments_of_batches_are_those_of_all_rows(width, center, generator):
    rows = torch.randn(2300, 3, width, generator=generator) + torch.randn(3, width, generator=generator)
    truth = rows.double() - (rows.double().mean(0) if center else 0.0)
    truth = torch.einsum("nri,nrj->ij", truth, truth)
    states = [MomentState(3, width, center, CPU) for _ in range(2)]
    for state, part in zip(states, (rows[:700], rows[700:]), strict=True):
        for batch in (*part.split(500), part[:0]):
            state.add(batch[:, :1])  # one of the three rows, then the others
            state.add(batch[:, 1:], first=1)
            state.advance(len(batch))
    first, second = states
    summed = MomentState(3, width, center, CPU)
    summed.load_sums(iter([a + b for a, b in zip(first.to_sums(), second.to_sums(), strict=True)]))
    again = MomentState(3, width, center, CPU)
    again.load_tensors(second.to_tensors())
    again.merge(first)
    first.merge(MomentState(3, width, center, CPU))
    first.merge(second)
    for state in (first, again, summed):
        assert state.n == 2300
        torch.testing.assert_close(upper(state.panels(2300)[0], width), truth, rtol=2e-5, atol=0.02)
        if center:
            torch.testing.assert_close(state.mean, rows.double().mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("probes", [1, 2, 5])
@pytest.mark.parametrize("center", [False, True])
def test_probe_sums_follow_their_formula(probes, center, generator):
    """``V (1 + (C − 1) / (k N)) / k − MᵀM / (k² N)`` of each half, and the halves weighted by their probes."""
    n, c, width = 40, 3, 6
    half = max(1, probes // 2)
    state = ProbeState(probes, c, width, center, CPU, 5)
    at_once = ProbeState(probes, c, width, center, CPU, 5)
    rows, signs = [], []
    for batch in (25, 15):
        signs.append(state.draw(batch).double())
        rows.append(torch.randn(batch, probes, width, generator=generator, dtype=torch.float64))
        for k in range(probes):
            state.add(rows[-1][:, k : k + 1], signs[-1], first=k)
        state.advance(batch)
    r, v = torch.cat(signs), torch.cat(rows)
    assert torch.equal(at_once.draw(n).double(), r), "the stream does not depend on the cuts"
    assert set(r.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(r.mean())) < 6 / math.sqrt(r.numel())
    at_once.add(v, r)
    at_once.advance(n)
    expected = []
    for some in (slice(0, half), slice(half, probes)):
        k = len(range(probes)[some])
        if k:
            square = torch.einsum("nki,nkj->ij", v[:, some], v[:, some])
            signed = torch.einsum("nkc,nki->ci", r[:, some], v[:, some])
            own = square * (1 + (c - 1) / (k * n)) / k - signed.t() @ signed / (k * k * n)
            expected.append((k, own if center else square / k))
    whole = sum(k * g for k, g in expected) / probes
    for found in (state.panels(n), at_once.panels(n)):
        assert len(found) == (1 if probes == 1 else 3)
        for panel, truth in zip(found, [whole, *(g for _, g in expected)], strict=False):
            torch.testing.assert_close(upper(panel, width), truth)


HEADS = {
    "counts": ([6, 11, 4], "leaky_relu", {"center": True, "input_cov": True}),
    "gram": ([6, 11, 4], "silu", {"center": True}),
    "rows": ([6, 10, 9, 4], "gelu", {"output": "probs", "center": True}),
    "probes": ([6, 10, 9, 4], "gelu", {"probes": 3, "center": True}),
}


@pytest.mark.parametrize("kind", list(HEADS))
def test_the_sum_over_processes_is_that_of_their_sums(kind, generator, monkeypatch):
    """Three processes played one after another: what each gives to the all-reduce, then the total to each."""
    sizes, activation, options = HEADS[kind]
    head = chain(sizes, activation, generator).double()
    x = torch.randn(90, 6, generator=generator, dtype=torch.float64) + torch.linspace(-2, 2, 90)[:, None]
    shares = [x[:0], x[:50], x[50:]]
    probes = "probes" in options

    def played(heads, seeds) -> list[AGOPAccumulator]:
        def made(rank):
            return AGOPAccumulator(heads[rank], **options, seed=seeds[rank]).update(shares[rank])

        packed, found = [], []
        monkeypatch.setattr(dist, "is_available", lambda: True)
        monkeypatch.setattr(dist, "is_initialized", lambda: True)
        monkeypatch.setattr(dist, "get_world_size", lambda group: 3)
        for total in (False, True):
            for rank in range(3):
                monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
                reduce = (
                    (lambda t, group: t.copy_(sum(packed))) if total else (lambda t, group: packed.append(t.clone()))
                )
                monkeypatch.setattr(dist, "all_reduce", reduce)
                accumulator = made(rank)
                if total:
                    found.append(accumulator.sync())
                else:
                    with pytest.raises(RuntimeError, match="different heads"):  # its own vector is no sum
                        accumulator.sync()
        return found

    if kind == "counts":
        with pytest.raises(RuntimeError, match="different heads"):
            played([head, head, chain(sizes, activation, generator).double()], [0, 0, 0])
    if probes:
        with pytest.raises(RuntimeError, match="with one seed"):
            played([head] * 3, [1, 7, 7])
        played([head] * 3, [1, 7, -7])
    parts = [
        AGOPAccumulator(head, **options, seed=seed).update(part) for seed, part in zip((7, 8), shares[1:], strict=True)
    ]
    merged = functools.reduce(AGOPAccumulator.merge, parts).compute()
    for accumulator in played(
        [head] * 3, [7, 7, 8 if probes else 7]
    ):  # the first has no samples, so its seed drew nothing
        result = accumulator.compute()
        assert (result.n, accumulator.n) == (90, 90)
        torch.testing.assert_close(result.matrix, merged.matrix, rtol=1e-9, atol=1e-9)
        if kind == "counts":
            torch.testing.assert_close(result.input_cov, torch.cov(x.t(), correction=0))
            torch.testing.assert_close(result.input_mean, x.mean(0))


@pytest.mark.parametrize("output", ["logits", "probs"])
@pytest.mark.parametrize("outputs", [2, 3, 30])
def test_rows_of_a_chain_and_their_last_product(output, outputs, generator):
    """``L V_r D_r … V_1 D_1 W1`` sample by sample; the last product, where it is one, gives the same rows."""
    ends = set()
    for sizes in ([12, 7], [3, 30], [3, 20, 4], [20, 4, 9], [20, 9, 4, 5], [4, 9, 5, 20], [3, 50, 40, 2]):
        draw = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        w1, *v = [draw(b, a) for a, b in itertools.pairwise([*sizes, outputs])]
        y, derivatives = draw(6, outputs), [draw(6, size) for size in sizes[1:]]
        rows = ChainRows(w1, v, output, None, torch.float64)
        p = torch.softmax(y, 1)
        jacobian = p.diag_embed() - p[:, :, None] * p[:, None] if output == "probs" else torch.eye(outputs).double()
        for factor, a in zip(reversed(v), reversed(derivatives), strict=True):
            jacobian = (jacobian @ factor) * a[:, None]
        truth = torch.einsum("nri,nrj->ij", *[jacobian @ w1] * 2)
        formed, last = rows(y, derivatives, None), rows.last_step(y, derivatives)
        found = [formed]
        if last is not None:
            left, inner, right, outer = last
            found.append(((left * inner[:, None]) @ right) * (1.0 if outer is None else outer[:, None]))
        for b in found:
            assert b.shape[-2:] == (rows.count, rows.width)
            b = b if rows.ends_at_input else b @ w1
            torch.testing.assert_close(torch.einsum("nri,nrj->ij", b, b), truth)
        ends.add((rows.ends_at_input, last is None))
    assert {(False, False), (True, False)} <= ends


def test_the_order_of_products_is_the_cheapest(generator):
    @functools.cache
    def least(sizes: tuple[int, ...]) -> int:
        cuts = range(1, len(sizes) - 1)
        return min(
            (least(sizes[: k + 1]) + least(sizes[k:]) + sizes[0] * sizes[k] * sizes[-1] for k in cuts), default=0
        )

    for count in (1, 2, 3, 4, 5):
        sizes = torch.randint(1, 30, (count + 1,), generator=generator).tolist()
        factors = [torch.empty(a, b) for a, b in itertools.pairwise(sizes)]
        cost, order = _cheapest_order(sizes[0], factors, False)

        def spent(i: int, j: int, order=order, sizes=sizes) -> int:
            k = order.get((i, j))
            return 0 if i == j else spent(i, k) + spent(k + 1, j) + sizes[i] * sizes[k + 1] * sizes[j + 1]

        assert cost == spent(0, count - 1) == least(tuple(sizes))
        products = sum(7 * a * b for a, b in itertools.pairwise(sizes))
        assert _cheapest_order(7, factors, True) == (products, {})
