"""Contrastive alignment written out, and the draw of sources for cross-modal reconstruction."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmc_fast.nn.alignment import contrastive_alignment
from mmc_fast.nn.substitution import foreign_source


def test_contrastive_alignment_sees_only_rows_that_have_both(generator):
    latents = torch.randn(2, 9, 5, generator=generator)
    present = torch.rand(9, 2, generator=generator) < 0.7
    present[0] = True
    both = present.all(1)
    unit = F.normalize(latents[:, both], dim=-1)
    logits = unit[0] @ unit[1].t() / 0.1
    truth = torch.arange(len(logits))
    want = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.t(), truth)) / 2
    assert float(contrastive_alignment(latents, present)) == pytest.approx(float(want), rel=1e-4)


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
