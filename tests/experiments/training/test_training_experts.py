"""A run with experts answers with the product of its fused and unimodal models, also after it was loaded again."""

from __future__ import annotations

import pytest
import torch
from training_data import small, tiny

from mmc_fast.errors import InputError
from mmc_fast.experiments.tasks import MultiLabel, Regression
from mmc_fast.experiments.training import load_run, predict, train
from mmc_fast.experiments.training.expert_weights import PENALTY, masked_rows
from mmc_fast.experiments.training.experts import ExpertProduct
from mmc_fast.experiments.training.model import MultimodalModel


@pytest.mark.parametrize("method", ["dropout", "ebr"])
def test_the_answer_is_the_product_by_hand(method, seed, tmp_path):
    """log p = log pi + sum_i w_i s (log p_i - log pi) + f (log p - log pi), normalised; weights as fitted."""
    dataset = tiny(seed, absent=0.1)
    dataset.labels[:20] = 0  # so that the class shares of the train part are unequal
    settings = {"modality_dropout": 0.5, "control": False, "experts": True}
    result = train(dataset, small(method, **settings), seed=seed, run_dir=tmp_path / "run")
    plain = train(dataset, small(method, **settings | {"experts": False}), seed=seed, evaluate_on=()).model
    part = dataset.part("test")
    present = part.present & (torch.rand(part.present.shape, generator=torch.Generator().manual_seed(seed)) < 0.7)
    present[~present.any(1)] = part.present[~present.any(1)]
    fused = predict(plain, part.features, present).double().log()
    prior = plain.prior.double().log_softmax(-1)
    product = result.model.experts.product
    expected = torch.empty_like(fused)
    for n in range(len(fused)):
        here = present[n].nonzero().flatten().tolist()
        total = prior + product.fused[len(here) - 1].exp() * (fused[n] - prior)
        for i in here:
            own = result.unimodal.predict("abc"[i], part.features[i][n : n + 1])[0].double().log()
            total = total + product.weight[i].exp() * product.size[len(here) - 1].exp() * (own - prior)
        expected[n] = total.softmax(-1)
    found = predict(result.model, part.features, present)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found, fused.exp().float(), atol=1e-3)
    # The weights have the least loss on validation rows as they are and at the missing rates.
    rows = masked_rows(dataset.part("validation"), result.model.config.rates, seed)
    own = ExpertProduct(3, plain.prior.softmax(-1), True)
    votes = [result.unimodal.predict("abc"[i], x).double().log() for i, x in enumerate(rows.features)]
    whole = predict(plain, rows.features, rows.present).double().log()
    own.fit(torch.stack(votes), whole, rows.present, rows.labels, PENALTY)
    for name in ("weight", "size", "fused"):
        torch.testing.assert_close(getattr(product, name).detach(), getattr(own, name).detach(), rtol=1e-2, atol=1e-3)
    again = load_run(tmp_path / "run").model
    torch.testing.assert_close(predict(again, part.features, present), found, rtol=0, atol=0)


def test_experts_are_pooled_as_the_task_says():
    for task in (Regression(("y", "z")), MultiLabel(("u", "v"))):
        model = MultimodalModel({"a": 4, "b": 3}, 2, small("vanilla", experts=True), task)
        assert model.experts.product.task == task


def test_experts_need_unimodal_models():
    with pytest.raises(InputError, match="experts needs unimodal models"):
        small("vanilla", experts=True, unimodal_share=0)
