"""Fusion operators against computations that know nothing of masks: absent modalities are simply left out."""

from __future__ import annotations

import pytest
import torch

from mmc_fast.errors import InputError
from mmc_fast.nn.encoders import IdentityEncoder, MLPEncoder
from mmc_fast.nn.fusion import ConcatFusion, LateFusion, TransformerFusion

DIMS = (3, 5, 2)


@pytest.fixture
def batch(generator: torch.Generator) -> tuple[list[torch.Tensor], torch.Tensor]:
    features = [torch.randn(9, d, generator=generator) for d in DIMS]
    present = torch.rand(9, 3, generator=generator) < 0.6
    present[0], present[1] = True, torch.tensor([False, True, False])
    present[~present.any(1), 2] = True
    return features, present


def poisoned(features: list[torch.Tensor], present: torch.Tensor) -> list[torch.Tensor]:
    return [torch.where(present[:, i, None], f, float("nan")) for i, f in enumerate(features)]


def make(kind: str) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return {
            "concat": lambda: ConcatFusion(DIMS, 4, (7, 6)),
            "late": lambda: LateFusion(DIMS, 4, (6,)),
            "transformer": lambda: TransformerFusion(DIMS, 4, dim=8, heads=2, depth=2),
        }[kind]()


@pytest.mark.parametrize("kind", ["concat", "late", "transformer"])
def test_absent_values_are_never_read(kind, batch):
    features, present = batch
    fusion = make(kind)
    nan = [f.requires_grad_() for f in poisoned(features, present)]
    out = fusion(nan, present)
    assert torch.equal(out, fusion(features, present))
    out.sum().backward()
    for i, f in enumerate(nan):
        assert not f.grad[~present[:, i]].any()
    assert all(bool(torch.isfinite(p.grad).all()) for p in fusion.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["concat", "late", "transformer"])
def test_all_present_mask_changes_nothing(kind, batch):
    features, _ = batch
    fusion = make(kind)
    torch.testing.assert_close(fusion(features), fusion(features, torch.ones(9, 3, dtype=torch.bool)))


def test_concat_is_an_mlp_on_zero_filled_columns(batch):
    features, present = batch
    fusion = make("concat")
    x = torch.zeros(9, sum(DIMS))
    for row in range(9):
        column = 0
        for i, d in enumerate(DIMS):
            if present[row, i]:
                x[row, column : column + d] = features[i][row]
            column += d
    w = [layer for layer in fusion.layers if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in w] == [7, 6, 4]
    h = (x @ w[0].weight.T + w[0].bias).relu()
    h = (h @ w[1].weight.T + w[1].bias).relu()
    torch.testing.assert_close(fusion(features, present), h @ w[2].weight.T + w[2].bias)


def test_late_is_the_mean_over_present_classifiers(batch):
    features, present = batch
    fusion = make("late")
    for row in range(9):
        votes = [fusion.classifiers[i](features[i][row]) for i in range(3) if present[row, i]]
        torch.testing.assert_close(fusion(features, present)[row], sum(votes) / len(votes))
    assert not fusion(features, torch.zeros(9, 3, dtype=torch.bool)).any()


def test_transformer_is_that_of_torch_with_the_absent_tokens_left_out(batch):
    features, present = batch
    fusion = make("transformer")
    masked = fusion(features, present)
    layers = []
    for block in fusion.blocks:
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True, norm_first=True)
        mine = [block.qkv, block.out, block.mlp[0], block.mlp[2], block.norm_attention, block.norm_mlp]
        theirs = [p for part in mine for p in (part.weight, part.bias)]
        layer.load_state_dict(dict(zip(layer.state_dict(), theirs, strict=True)))
        layers.append(layer)
    for row in range(9):
        kept = [i for i in range(3) if present[row, i]]
        tokens = [fusion.class_token] + [fusion.projections[i](features[i][row]) + fusion.modality[i] for i in kept]
        x = torch.stack(tokens)[None]
        for layer in layers:
            x = layer(x)
        expected = fusion.classifier(fusion.norm(x[0, 0]))
        torch.testing.assert_close(masked[row], expected, rtol=1e-4, atol=1e-5)


def test_transformer_with_nothing_present_is_finite(batch):
    features, _ = batch
    assert torch.isfinite(make("transformer")(features, torch.zeros(9, 3, dtype=torch.bool))).all()


def test_defaults_are_one_hidden_layer_linear_votes_and_two_small_blocks():
    concat, late, transformer = ConcatFusion(DIMS, 4), LateFusion(DIMS, 4), TransformerFusion(DIMS, 4)
    assert [layer.out_features for layer in concat.layers[::2]] == [128, 4]
    assert [[layer.out_features for layer in part] for part in late.classifiers] == [[4]] * 3
    assert (transformer.class_token.shape, [b.heads for b in transformer.blocks]) == ((64,), [4, 4])
    for small in (transformer.modality, transformer.class_token):
        assert 0.01 < float(small.detach().std()) < 0.03


def test_encoders(generator):
    x = torch.randn(4, 1, generator=generator)
    assert MLPEncoder(1, 1, 1)(x).shape == (4, 1)
    assert IdentityEncoder(1)(x) is x
    x = torch.randn(4000, 3, generator=generator)
    normed = MLPEncoder(3, 8, 5, norm=True, dropout=0.25)
    first, inner, _, _, second, outer, _ = normed.layers
    for norm in (inner, outer):
        norm.weight.data.normal_(generator=generator)
        norm.bias.data.normal_(generator=generator)
    hidden = first(x)
    hidden = (hidden - hidden.mean(1, True)) / (hidden.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    y = second((hidden * inner.weight + inner.bias).relu())
    y = (y - y.mean(1, True)) / (y.var(1, correction=0, keepdim=True) + 1e-5).sqrt() * outer.weight + outer.bias
    torch.testing.assert_close(normed.eval()(x), y, rtol=1e-4, atol=1e-4)
    dropped = []
    normed.train().layers[3].register_forward_hook(lambda module, inputs, out: dropped.append((inputs[0], out)))
    zero = (normed(x) == 0).float().mean()
    ((before, after),) = dropped
    assert float(zero) == pytest.approx(0.25, abs=0.03)
    assert float((after == 0)[before > 0].float().mean()) == pytest.approx(0.25, abs=0.03)
    assert not any(isinstance(m, torch.nn.Dropout | torch.nn.LayerNorm) for m in MLPEncoder(3, 8, 5).modules())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConcatFusion((), 3), "dims is"),
        (lambda: ConcatFusion((3, 0), 3), "dims is"),
        (lambda: LateFusion((3,), 0), "num_classes is 0"),
        (lambda: ConcatFusion((3,), 3, (4, 0)), "hidden is"),
        (lambda: MLPEncoder(3, 0, 2), "width is 0"),
        (lambda: IdentityEncoder(0), "dim is 0"),
        (lambda: TransformerFusion((3,), 3, dim=6, heads=4), "multiple of heads"),
        (lambda: TransformerFusion((3,), 3, depth=0), "depth is 0"),
        (lambda: ConcatFusion((3, 2), 3)([torch.zeros(1, 3), torch.zeros(1, 3)]), "widths"),
        (lambda: LateFusion((3,), 3)([torch.zeros(1, 3)], torch.ones(1, 2, dtype=torch.bool)), "present is"),
        (lambda: LateFusion((3,), 3)([torch.zeros(1, 3)], torch.ones(1, 1)), "present is"),
    ],
)
def test_bad_input_is_one_clear_line(build, message):
    with pytest.raises(InputError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
