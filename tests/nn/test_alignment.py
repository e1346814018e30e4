"""Contrastive alignment written out, and the draw of sources for cross-modal reconstruction."""

from __future__ import annotations

import itertools

import pytest
import torch

from mmc_fast.nn.alignment import contrastive_alignment
from mmc_fast.nn.substitution import foreign_source


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}])
@pytest.mark.parametrize("masked", [False, True])
def test_contrastive_alignment_is_the_mean_over_pairs_of_the_rows_that_have_both(masked, options, generator):
    latents = torch.randn(4, 9, 5, generator=generator)
    present = torch.rand(9, 4, generator=generator) < 0.7
    present[0] = True
    present[:, 3] &= ~present[:, 2]  # these two never meet
    if not masked:
        present[:] = True
    pairs = []
    for i, j in itertools.combinations(range(4), 2):
        both = present[:, i] & present[:, j]
        cosine = torch.cosine_similarity(latents[i, both][:, None], latents[j, both][None], dim=-1)
        right = cosine / options.get("temperature", 0.1)
        told = [right.log_softmax(dim).diagonal().mean() for dim in (0, 1)] if both.any() else [0.0]
        pairs.append(-float(sum(told)) / 2)
    found = contrastive_alignment(latents, present if masked else None, **options)
    assert float(found) == pytest.approx(sum(pairs) / 6, rel=1e-4)
    assert contrastive_alignment(latents[:1]) == 0


def test_foreign_source_is_another_present_modality_drawn_evenly(generator):
    present = torch.rand(3000, 4, generator=generator) < 0.7
    source = foreign_source(present, 3000, 4, generator)
    for i in range(4):
        others = present.clone()
        others[:, i] = False
        assert torch.equal(source[:, i] >= 0, others.any(1))
        chosen = source[:, i].clamp(min=0)
        assert bool(others.gather(1, chosen[:, None])[source[:, i] >= 0].all())
    full = foreign_source(None, 3000, 4, generator)
    share = torch.bincount(full[:, 0], minlength=4) / 3000
    assert share[0] == 0
    assert bool(((share[1:] - 1 / 3).abs() < 0.06).all())
