"""Groups of samples and the rows that a pass keeps: sizes, chances, and sums against numpy on repeated rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diagnose_models import Attention, Toy, batches, chain
from scipy.stats import chisquare

from mmc_fast.diagnose import collect
from mmc_fast.diagnose.groups import GroupMoments, dealt, draw_weights
from mmc_fast.diagnose.reservoir import Reservoir
from mmc_fast.errors import InputError
from mmc_fast.ops.native import unavailable_reason

NO_NATIVE = unavailable_reason() or ""

SIZES = (7, 1, 20, 12)


def filled(seed: int, size: int, near: bool = False, stored: bool = False) -> Reservoir:
    """The numbers 0 .. 39 in batches, beside a column that follows them."""
    kept, start = Reservoir(size, seed), 0
    for index, count in enumerate(SIZES):
        rows = torch.arange(start, start + count)
        start += count
        assert kept.near(index, count).dtype == torch.bool
        columns = {"row": rows, "double": 2.0 * rows[:, None]}
        chosen = kept.near(index, count) if near else None
        kept.add(index, columns if chosen is None else {n: x[chosen] for n, x in columns.items()}, chosen)
        if stored:
            again = Reservoir(size, seed)
            again.load_state(kept.to_state())
            kept = again
    return kept


def test_every_row_is_kept_as_often_wherever_it_stands(seed):
    times = np.zeros(40)
    for s in range(400):
        rows = filled(seed + s, 10).columns["row"].numpy()
        assert len(np.unique(rows)) == 10
        times[rows] += 1
    assert chisquare(times).pvalue > 1e-7
    assert chisquare([times[:20].sum(), times[20:].sum()]).pvalue > 1e-7


@pytest.mark.parametrize("size", [1, 10, 39, 40, 50])
def test_kept_rows_do_not_depend_on_how_they_came(size, seed):
    plain = filled(seed, size)
    rows = plain.columns["row"]
    assert len(rows) == min(size, 40)
    assert torch.equal(plain.columns["double"][:, 0], 2.0 * rows)
    for other in (filled(seed, size), filled(seed, size, near=True), filled(seed, size, stored=True)):
        assert torch.equal(other.columns["row"], rows)
        assert torch.equal(other.columns["double"], plain.columns["double"])
    assert (rows.sort().values.tolist() == list(range(40))) == (size >= 40)
    if 1 < size < 40:
        assert any(not torch.equal(filled(seed + s, size).columns["row"], rows) for s in (1, 2))
        assert rows.tolist() != sorted(rows.tolist()), "in random order"


def test_groups_are_dealt_evenly_and_at_random(seed):
    drawn = [dealt(5, 23, seed, "x"), dealt(5, 23, seed, "x"), dealt(5, 23, seed, "y"), dealt(5, 23, seed + 1, "x")]
    for places in drawn:
        assert sorted(torch.bincount(places, minlength=5).tolist()) == [4, 4, 5, 5, 5]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])
    larger = sum((torch.bincount(dealt(5, 23, seed + s, "x"), minlength=5) == 5).numpy() for s in range(500))
    assert chisquare(larger).pvalue > 1e-7, "no group is larger by its number"


def test_weights_of_groups_are_bootstrap_draws(seed):
    weights = draw_weights(8, 3000, seed)
    assert weights.shape == (3000, 8)
    assert (weights.sum(1) == 8).all()
    assert chisquare(weights.sum(0)).pvalue > 1e-7
    assert weights.var() == pytest.approx(1 - 1 / 8, rel=0.1)
    np.testing.assert_array_equal(weights, draw_weights(8, 3000, seed))
    assert (weights != draw_weights(8, 3000, seed + 1)).any()


@pytest.mark.parametrize(
    "native",
    [False, pytest.param(True, marks=pytest.mark.skipif(bool(NO_NATIVE), reason=f"no native library: {NO_NATIVE}"))],
)
def test_moments_of_weighted_groups_are_those_of_the_repeated_rows(native, seed):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(60, 4, generator=g) + torch.tensor([0.0, 5.0, -20.0, 0.0])
    rows[:, 3] = 1e4 + 0.001 * (torch.arange(60) % 2)  # constant but for rounding
    places = torch.randint(3, (60,), generator=g)
    moments = GroupMoments(3, 4, native)
    for some in torch.arange(60).split(25):
        for k in range(3):
            moments.add(k, rows[some][places[some] == k])
    again = GroupMoments(3, 4, native)
    again.load_state(moments.to_state())
    for weights in ([1, 1, 1], [2, 0, 1], [0, 3, 0]):
        chosen = np.concatenate([rows[places == k].double().numpy().repeat(w, 0) for k, w in enumerate(weights)])
        for found in (moments.combine(np.array(weights, float)), again.combine(np.array(weights, float))):
            assert found.n == len(chosen)
            np.testing.assert_allclose(found.mean, chosen.mean(0), rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(
                found.covariance[:3, :3], np.cov(chosen[:, :3].T, bias=True), rtol=1e-4, atol=1e-5
            )
            assert not found.covariance[3].any()
            assert not found.covariance[:, 3].any()


@pytest.mark.parametrize("kind", ["chain", "attention"])
def test_every_batch_is_dealt_out_anew(kind: str, generator: torch.Generator, monkeypatch) -> None:
    """Where batches look alike, equal places would make groups that differ."""
    drawn: list[tuple[object, ...]] = []
    monkeypatch.setattr(collect, "dealt", lambda *a: drawn.append(a[2:]) or dealt(*a))
    head = chain(generator) if kind == "chain" else None
    collector = collect.Collector(Toy(head or Attention(generator), head), 4, 9, 100)
    loader = batches(generator, 256)
    collector.start(loader[0])
    for batch in loader:
        collector.add(batch)
        collector.flush()
    assert sorted(drawn) == sorted((9, kind, index) for kind in ("groups", "scores") for index in range(4))
    assert collector.moments.combine(collector.active()).n == 256


def test_how_far_features_may_move_between_two_readings(generator: torch.Generator) -> None:
    """A ten-thousandth of the variance of the columns, wherever these lie."""
    head = chain(generator)
    collector = collect.Collector(Toy(head, head), 4, 0, 100)
    image, audio, labels = batches(generator, 64)[0]
    image = image / image.std(0, correction=0) + 100 * torch.arange(6)
    audio = audio / audio.std(0, correction=0)
    sign = torch.randint(0, 2, (64, 6), generator=generator) * 2 - 1
    collector.start((image, audio, labels))
    for by, refused in (
        (0.0, False),
        (0.0125, False),
        (0.0133, True),
    ):  # six of ten columns move: 6/10 by² is 1e-4 at 0.0129
        moved = image + by * sign, audio, labels
        if refused:
            with pytest.raises(InputError, match="begin with other features"):
                collector.check_again(moved)
        else:
            collector.check_again(moved)
    with pytest.raises(InputError, match="begin with other features"):
        collector.check_again((image.roll(1, 0), audio, labels))
    with pytest.raises(InputError, match="begin with other features"):
        collector.check_again((image[:63], audio[:63], labels[:63]))
