"""apply_ebr computes what EBRHead computes on the collected features, wherever the encoders run."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from apply_models import SMALL, Pair, draw_towers, randomise, sites, total
from torch import nn

import mmc_fast
from mmc_fast.errors import InputError
from mmc_fast.integrations import EBRHandle, find_handles
from mmc_fast.nn import EBRHead
from mmc_fast.nn.substitution import mean_source, ranked_source


def by_hand(model, head: EBRHead, x, **kw):
    """Logits and losses of the model with the heads between encoders and fusion, written out; needs no hooks."""
    z = [encoder(x[name]) for name, encoder in model.encoders.items()]
    out = head(z, **kw)
    return model.fusion(torch.cat(out.recovered, -1)), out


def plain_head(handle: EBRHandle, model, **kw) -> EBRHead:
    """An EBRHead of the model's widths with the handle's weights."""
    head = EBRHead([e[0].out_features for e in model.encoders.values()], **SMALL, **kw).double()
    head.load_state_dict(handle.head.state_dict())
    return head


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_equals_the_head_on_collected_features(generator, residual, normalize, training):
    model, x = draw_towers(generator)
    plain = copy.deepcopy(model).train(training)
    handle = mmc_fast.apply_ebr(
        model.train(training), sites(model), **SMALL, residual=residual, normalize=normalize, reversal=0.6
    )
    head = plain_head(handle, plain, residual=residual, normalize=normalize)

    logits = model(**x)
    losses = handle.losses()
    expected, out = by_hand(plain, head, x, reversal=0.6)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(losses.discrimination, out.discrimination_loss)
    torch.testing.assert_close(losses.reconstruction, out.reconstruction_loss)
    collected = handle.output
    torch.testing.assert_close(list(collected.recovered.values()), out.recovered)
    torch.testing.assert_close(torch.stack(list(collected.latents.values())), out.latents)

    total(logits, *losses).backward()
    total(expected, out.discrimination_loss, out.reconstruction_loss).backward()
    grads = [p.grad for p in (*plain.parameters(), *head.parameters())]
    for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, msg=lambda text, name=name: f"{name}: {text}")


def test_equals_the_registered_operator_in_float32(generator):
    model, x = draw_towers(generator, m=3)
    model, x = model.float(), {n: v.float() for n, v in x.items()}
    plain = copy.deepcopy(model)
    handle = mmc_fast.apply_ebr(model, sites(model), **SMALL, reversal=0.5)
    head = plain_head(handle, plain).float()
    logits, (expected, out) = model(**x), by_hand(plain, head, x, reversal=0.5)
    total(logits, *handle.losses()).backward()
    total(expected, out.discrimination_loss, out.reconstruction_loss).backward()
    torch.testing.assert_close(logits, expected)
    for encoder, other in zip(model.encoders.parameters(), plain.encoders.parameters(), strict=True):
        torch.testing.assert_close(encoder.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert handle.losses().discrimination.dtype == torch.float32


def test_absent_rows_are_masked_as_in_the_head(generator):
    model, x = draw_towers(generator, m=3)
    batch = len(x["mod0"])
    present = torch.rand(batch, 3, generator=generator) < 0.6
    present[0] = torch.tensor([True, False, True])
    plain = copy.deepcopy(model)
    handle = mmc_fast.apply_ebr(model, sites(model), **SMALL, residual=True)
    head = plain_head(handle, plain, residual=True)
    with handle.present(present):
        logits = model(**x)
    expected, out = by_hand(plain, head, x, present=present)
    torch.testing.assert_close(logits, expected)
    total(logits, *handle.losses()).backward()
    total(expected, out.discrimination_loss, out.reconstruction_loss).backward()
    for p, q in zip(model.encoders.parameters(), plain.encoders.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    torch.testing.assert_close(handle.head.discriminator[0].weight.grad, head.discriminator[0].weight.grad)

    # Features of absent rows are never read, and the mask ends with its context.
    raw = Pair(nn.Identity(), nn.Identity())
    tap = mmc_fast.apply_ebr(raw, {"image": "image", "text": "text"}, dims={"image": 4, "text": 2}, **SMALL)
    a, b = torch.randn(5, 4, generator=generator), torch.randn(5, 2, generator=generator)
    mask = torch.tensor([True, False, True, True, False])
    with tap.present({"image": mask}):
        clean = [*raw(a, b), *tap.losses()]
        a[~mask] = float("nan")
        dirty = [*raw(a, b), *tap.losses()]
    for c, d in zip(clean, dirty, strict=True):
        assert torch.equal(c, d)
    assert raw(a, b)[0].isnan().any()


def test_tokens_are_rows_and_samples_weigh_the_same(generator):
    """The definition sample by sample and token by token, in plain Python."""
    batch, tokens = 4, 5
    model = Pair(nn.Linear(3, 4), nn.Linear(2, 3)).double()
    randomise(model, generator)
    handle = mmc_fast.apply_ebr(model, {"image": "image", "text": "text"}, **SMALL, reversal=1.0)
    randomise(handle.head, generator)
    image = torch.randn(batch, 3, generator=generator, dtype=torch.float64)
    text = torch.randn(batch, tokens, 2, generator=generator, dtype=torch.float64)
    lengths = [5, 2, 0, 1]
    mask = torch.tensor([[t < n for t in range(tokens)] for n in lengths])
    with handle.present({"text": mask}):
        recovered = model(image, text)
    head, md, rec, samples = handle.head, 0.0, 0.0, 0
    for i, (encoder, inputs) in enumerate(((model.image, image[:, None]), (model.text, text))):
        for b in range(batch):
            rows = [inputs[b, t] for t in range(inputs.shape[1]) if i == 0 or bool(mask[b, t])]
            if not rows:
                continue
            samples += 1
            for row in rows:
                z = encoder.forward(row)  # not through the hook
                g = head.encoders[i](z)
                r = head.decoders[i](g)
                md += float(F.cross_entropy(head.discriminator(g)[None], torch.tensor([i])).detach()) / len(rows)
                rec += float((r - z).square().mean().detach()) / len(rows)
    losses = handle.losses()
    assert samples == 2 * batch - 1
    assert math.isclose(float(losses.discrimination.detach()), md / samples, rel_tol=1e-9)
    assert math.isclose(float(losses.reconstruction.detach()), rec / samples, rel_tol=1e-9)
    assert recovered[1].shape == (batch, tokens, 3)
    assert bool((recovered[1][~mask] == 0).all())
    assert bool((recovered[1][mask] != 0).any(-1).all())


def test_normalizer_makes_shards_add_up(generator):
    model, x = draw_towers(generator, m=2)
    handle = mmc_fast.apply_ebr(model, sites(model), **SMALL)
    present = torch.rand(len(x["mod0"]), 2, generator=generator) < 0.7
    present[0] = True
    with handle.present(present):
        model(**x)
    whole = [loss.detach() for loss in handle.losses()]
    parts = torch.zeros(2, dtype=torch.float64)
    for rows in (slice(0, 1), slice(1, None)):
        with handle.present(present[rows]):
            model(**{n: v[rows] for n, v in x.items()})
        parts += torch.stack([loss.detach() for loss in handle.losses(normalizer=present.sum().double())])
    torch.testing.assert_close(parts, torch.stack(whole))


def test_losses_speak_of_the_latest_forward_only(generator):
    model, x = draw_towers(generator, m=3)
    handle = mmc_fast.apply_ebr(model, sites(model), **SMALL)
    other = {n: v + 1 for n, v in x.items()}
    model(**x)
    first = handle.losses()
    assert handle.losses() is first
    model(**other)
    second = handle.losses()
    fresh = copy.deepcopy(model)
    fresh(**other)
    torch.testing.assert_close(second, find_handles(fresh)[0].losses())
    # every unit of a small discriminator may be dead for both inputs: then only the other loss can tell
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    handle.reset()
    with pytest.raises(RuntimeError, match="no site has run"):
        handle.losses()


def test_a_forward_that_raises_leaves_no_state(generator):
    model, x = draw_towers(generator, m=2)
    handle = mmc_fast.apply_ebr(model, sites(model), **SMALL)
    with pytest.raises(KeyError):
        model(**x, mod9=x["mod0"])  # the last one runs first
    model(**x)
    before = handle.losses().discrimination.detach()
    model.encoders["mod0"](x["mod0"])  # outside of a forward: begins a new pass, since the losses were taken
    with pytest.warns(UserWarning, match="mod1"):
        assert not torch.equal(handle.losses().discrimination.detach(), before)


def test_reversal_is_read_in_the_forward_and_may_be_a_tensor(generator):
    model, x = draw_towers(generator, m=2)
    strength = torch.zeros(())
    handle = mmc_fast.apply_ebr(model, sites(model), **SMALL, reversal=strength)

    def gradients(value: float) -> list[torch.Tensor]:
        strength.fill_(value)
        model(**x)
        return list(torch.autograd.grad(handle.losses().discrimination, list(model.encoders.parameters())))

    one, none, half = gradients(1.0), gradients(0.0), gradients(0.5)
    assert all(bool((g == 0).all()) for g in none)
    assert any(bool((g != 0).any()) for g in one)
    torch.testing.assert_close(one, [2 * g for g in half])
    with pytest.raises(InputError, match="λ is -1"):
        gradients(-1.0)


def test_repeated_calls_count_all_rows_or_raise(generator):
    class Twice(Pair):
        def forward(self, image, text):
            return self.image(image[0]), self.image(image[1]), self.text(text)

    model = Twice(nn.Linear(3, 4), nn.Linear(2, 3)).double()
    at = {"image": "image", "text": "text"}
    a, b = (torch.randn(4, d, generator=generator, dtype=torch.float64) for d in (3, 3))
    t = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    strict = mmc_fast.apply_ebr(model, at, **SMALL)
    with pytest.raises(RuntimeError, match="ran twice in one forward"):
        model((a, b), t)
    strict.restore()
    handle = mmc_fast.apply_ebr(model, at, **SMALL, repeats="all")
    model((a, b), t)
    z = [torch.cat([model.image.forward(a), model.image.forward(b)]), model.text.forward(t)]
    ce = [
        F.cross_entropy(handle.head.discriminator(handle.head.encoders[i](z[i])), torch.full((len(z[i]),), i))
        for i in (0, 1)
    ]
    torch.testing.assert_close(handle.losses().discrimination, (8 * ce[0] + 4 * ce[1]) / 12)
    assert handle.output.recovered["image"].shape == (8, 4)


def test_encoders_called_one_by_one(generator):
    """As in ``get_text_features`` followed by ``get_image_features``: no forward of the whole model."""
    model = Pair(nn.Linear(3, 4), nn.Linear(2, 3)).double()
    a, t = (torch.randn(4, d, generator=generator, dtype=torch.float64) for d in (3, 2))
    handle = mmc_fast.apply_ebr(model, {"image": "image", "text": "text"}, **SMALL)
    model(a, t)
    expected = handle.losses().discrimination
    for _ in range(2):  # asking for the losses ends a pass
        model.text(t), model.image(a)
        torch.testing.assert_close(handle.losses().discrimination, expected)
    model.text(t)
    with pytest.raises(RuntimeError, match="ran again before"):
        model.text(t)
    handle.reset()
    model.eval()
    with torch.no_grad():
        model.text(t + 1), model.text(t), model.image(a)
    torch.testing.assert_close(handle.losses().discrimination, expected.detach())


def test_a_modality_that_does_not_run_is_absent_with_a_warning(generator):
    class Optional(Pair):
        def forward(self, image, text):
            return self.image(image) if text is None else (self.image(image), self.text(text))

    model = Optional(nn.Linear(3, 4), nn.Linear(2, 3))
    handle = mmc_fast.apply_ebr(model, {"image": "image", "text": "text"}, **SMALL)
    model(torch.randn(4, 3, generator=generator), None)
    with pytest.warns(UserWarning, match=r"modality 'text' \(text\) did not run"):
        loss = handle.losses().discrimination
    g = handle.output.latents
    assert list(g) == ["image"]
    torch.testing.assert_close(loss, F.cross_entropy(handle.head.discriminator(g["image"]), torch.zeros(4).long()))


def test_game_against_gradients_and_counts_by_hand(generator):
    model, x = draw_towers(generator, m=3)
    handle = mmc_fast.apply_ebr(model, sites(model), **SMALL, reversal=0.25)
    present = torch.ones(len(x["mod0"]), 3, dtype=torch.bool)
    present[0, 1] = False
    plain = copy.deepcopy(model)
    find_handles(plain)[0].restore()
    head = plain_head(handle, plain)
    with handle.present(present):
        model(**x)
    game = handle.adversarial()
    _, out = by_hand(plain, head, x, present=present, reversal=0.25)
    share = present.sum(0) / present.sum()
    right = (head.discriminator(out.latents).argmax(-1) == torch.arange(3)[:, None])[present.t()]
    groups = {
        "grad_norm_psi": list(head.discriminator.parameters()),
        "grad_norm_encoders": [*plain.encoders.parameters(), *head.encoders.parameters()],
    }
    md = out.discrimination_loss
    assert math.isclose(game["loss_md"], float(md.detach()), rel_tol=1e-9)
    assert math.isclose(
        game["loss_md_over_entropy"], float(md.detach()) / -float((share * share.log()).sum()), rel_tol=1e-6
    )
    assert math.isclose(game["psi_accuracy"], float(right.double().mean()), rel_tol=1e-9)
    for name, group in groups.items():
        grads = torch.autograd.grad(md, group, retain_graph=True)
        assert math.isclose(game[name], float(torch.cat([g.flatten() for g in grads]).norm()), rel_tol=1e-9), name
    handle.losses().discrimination.backward()  # the graph is still there


@pytest.mark.parametrize("kind", ["ranked", "mean"])
@pytest.mark.parametrize("one_call", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_predict_substitutes_as_the_head_does(generator, kind, residual, one_call):
    model, x = draw_towers(generator, m=4)
    plain = copy.deepcopy(model).eval()
    options = {"residual": residual, "normalize": True, "one_call": one_call}
    handle = mmc_fast.apply_ebr(model.eval(), sites(model), **SMALL, **options)
    head = plain_head(handle, plain, residual=residual, normalize=True)
    present = torch.rand(len(x["mod0"]), 4, generator=generator) < 0.5
    present[0], present[1, 0] = False, True  # a row with nothing at all
    source = ranked_source(present, [2, 0, 3, 1]) if kind == "ranked" else mean_source(present, torch.float64)
    expected, _ = by_hand(plain, head, x, present=present, source=source)
    torch.testing.assert_close(handle.predict(**x, present=present, source=source), expected.detach())
    with pytest.raises(RuntimeError, match="no site has run"):
        handle.losses()  # those of a prediction are nobody's
    torch.testing.assert_close(model(**x), by_hand(plain, head, x)[0])  # nothing stays behind
    with pytest.raises(RuntimeError, match="training mode"):
        handle.predict(**x, present=present, source=source) if model.train() else None


def test_psi_descends_and_the_encoders_ascend(generator):
    """A small step of gradient descent on L_md lowers it for psi and raises it for the encoders."""
    model, x = draw_towers(generator, m=3)
    handle = mmc_fast.apply_ebr(model, sites(model), **SMALL)

    def md() -> torch.Tensor:
        model(**x)
        return handle.losses().discrimination

    psi, encoders = (
        list(handle.head.discriminator.parameters()),
        [*model.encoders.parameters(), *handle.head.encoders.parameters()],
    )
    for group, sign in ((psi, -1), (encoders, 1)):
        start = md()
        grads = torch.autograd.grad(start, group)
        with torch.no_grad():
            for p, g in zip(group, grads, strict=True):
                p -= 1e-4 * g
        assert sign * float((md() - start).detach()) > 0
