"""Which latent stands in for a missing modality: the rules of the paper, by brute force."""

from __future__ import annotations

import pytest
import torch

from mmc_fast.nn import substitution as S


def brute_force_ranked(present, order):
    out = torch.full(present.shape, -1)
    for b in range(present.shape[0]):
        for i in range(present.shape[1]):
            best = None
            for j in range(present.shape[1]):
                if present[b, j]:
                    key = (abs(order.index(i) - order.index(j)), order.index(j))
                    if best is None or key < best[0]:
                        best = (key, j)
            if best:
                out[b, i] = best[1]
    return out


@pytest.mark.parametrize("m", range(1, 7))
def test_sources_by_brute_force(m, generator):
    order = torch.randperm(m, generator=generator).tolist()
    present = torch.rand(40, m, generator=generator) < 0.5
    assert torch.equal(S.ranked_source(present, order), brute_force_ranked(present, order))
    similarity = torch.randint(3, (m, m), generator=generator).float()  # ties
    nearest = S.pairwise_source(present, similarity)
    assert S.rank_modalities(similarity, m - 1)[1:] == sorted(range(m - 1), key=lambda j: -similarity[m - 1, j])
    for b, row in enumerate(present.tolist()):
        for i in range(m):
            there = [j for j in range(m) if row[j]]
            best = i if row[i] else max(there, key=lambda j: float(similarity[i, j]), default=-1)
            assert nearest[b, i] == best, "of equal ones the first"


def test_ties_go_to_the_side_of_the_reference():
    present = torch.tensor([[True, False, True]])
    assert S.ranked_source(present, [0, 1, 2]).tolist() == [[0, 0, 2]]
    assert S.ranked_source(present, [2, 1, 0]).tolist() == [[0, 2, 2]]


def test_reference_and_pairwise_rankings_differ_where_they_should():
    similarity = torch.tensor([[1.0, 0.9, 0.8], [0.9, 1.0, 0.1], [0.8, 0.1, 1.0]])
    order = S.rank_modalities(similarity, 0)
    assert order == [0, 1, 2]
    present = torch.tensor([[True, True, False]])
    assert S.ranked_source(present, order).tolist() == [[0, 1, 1]]  # nearest in the list: modality 1
    assert S.pairwise_source(present, similarity).tolist() == [[0, 1, 0]]  # most similar: modality 0


def test_nothing_missing_is_the_identity_and_nothing_present_is_none():
    present = torch.tensor([[True] * 3, [False] * 3])
    want = [[0, 1, 2], [-1, -1, -1]]
    assert S.ranked_source(present, [2, 0, 1]).tolist() == want
    assert S.pairwise_source(present, torch.eye(3)).tolist() == want
    weights = S.mean_source(present)
    assert torch.equal(weights[0], torch.eye(3))
    assert not weights[1].any()


def test_mean_source_weighs_present_latents_equally():
    weights = S.mean_source(torch.tensor([[True, False, True]]))[0]
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0, 0], [0.5, 0, 0.5], [0, 0, 1.0]]))
    assert S.mean_source(torch.ones(1, 3, dtype=torch.bool), torch.float64).dtype == torch.float64


def test_similarity_is_the_mean_cosine_over_samples_that_have_both(generator):
    latents = torch.randn(3, 50, 4, generator=generator)
    present = torch.rand(50, 3, generator=generator) < 0.6
    latents[~present.t()] = float("nan")  # never read
    got = S.latent_similarity(latents, present)
    parts = [S.cosine_sums(latents[:, rows], present[rows]) for rows in torch.arange(50).split(17)]
    torch.testing.assert_close(S.similarity_of_sums(sum(parts)), got)
    assert got.dtype == torch.float64
    for i in range(3):
        for j in range(3):
            both = present[:, i] & present[:, j]
            want = torch.nn.functional.cosine_similarity(latents[i, both], latents[j, both], dim=-1).mean()
            assert float(got[i, j]) == pytest.approx(float(want) if i != j else 1.0, abs=1e-6)


def test_pair_that_is_never_observed_together_is_last_and_warns():
    present = torch.tensor([[True, False, True], [False, True, True]])
    with pytest.warns(UserWarning, match="modalities 0 and 1 together"):
        similarity = S.latent_similarity(torch.ones(3, 2, 4), present)
    assert similarity[0, 1] == -1
    assert S.rank_modalities(similarity, 0) == [0, 2, 1]


def test_nothing_is_made_on_another_device():
    present = torch.ones(2, 3, dtype=torch.bool, device="meta")
    made = [S.ranked_source(present, [0, 1, 2]), S.pairwise_source(present, torch.eye(3)), S.mean_source(present)]
    assert all(t.is_meta for t in made)


def test_bad_arguments_are_named():
    present = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="permutation of 0 to 2"):
        S.ranked_source(present, [0, 1])
    with pytest.raises(ValueError, match=r"expected \[3, 3\]"):
        S.pairwise_source(present, torch.eye(2))
    for reference in (-1, 3):
        with pytest.raises(ValueError, match="allowed are 0 to 2"):
            S.rank_modalities(torch.eye(3), reference)
    with pytest.raises(ValueError, match="not finite"):
        S.latent_similarity(torch.full((2, 3, 4), float("inf")), torch.ones(3, 2, dtype=torch.bool))


def test_foreign_source_is_another_present_modality_drawn_evenly(generator):
    present = torch.rand(3000, 4, generator=generator) < 0.7
    source = S.foreign_source(present, 3000, 4, generator)
    for i in range(4):
        others = present.clone()
        others[:, i] = False
        assert torch.equal(source[:, i] >= 0, others.any(1))
        chosen = source[:, i].clamp(min=0)
        assert bool(others.gather(1, chosen[:, None])[source[:, i] >= 0].all())
    full = S.foreign_source(None, 3000, 4, generator)
    share = torch.bincount(full[:, 0], minlength=4) / 3000
    assert share[0] == 0
    assert bool(((share[1:] - 1 / 3).abs() < 0.06).all())
