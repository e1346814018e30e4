"""apply_ebr computes what EBRHead computes on the collected features, wherever the encoders run."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from apply_models import SMALL, Pair, assert_same, draw_towers, randomise, sites, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import mmc_fast
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


def total(logits, md, rec):
    return logits.square().sum() + 1.3 * md + 0.7 * rec


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
    assert [n for n, _ in model.ebr.named_parameters()] == [n for n, _ in head.named_parameters()]

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
    grads = {n: p.grad for n, p in plain.named_parameters()} | {f"ebr.{n}": p.grad for n, p in head.named_parameters()}
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], msg=lambda text, name=name: f"{name}: {text}")


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
    assert not torch.equal(first.discrimination, second.discrimination)
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


def test_reversal_is_read_at_the_losses_and_may_be_a_tensor(generator):
    model, x = draw_towers(generator, m=2)
    strength = torch.zeros(())
    handle = mmc_fast.apply_ebr(model, sites(model), **SMALL, reversal=strength)

    def gradients(value: float) -> list[torch.Tensor]:
        strength.fill_(value)
        model(**x)
        return list(torch.autograd.grad(handle.losses().discrimination, list(model.encoders.parameters())))

    one, none, minus = gradients(1.0), gradients(0.0), gradients(-1.0)
    assert all(bool((g == 0).all()) for g in none)
    assert any(bool((g != 0).any()) for g in one)
    torch.testing.assert_close(one, [-g for g in minus])


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
    game = handle.game()
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
@pytest.mark.parametrize("residual", [False, True])
def test_predict_substitutes_as_the_head_does(generator, kind, residual):
    model, x = draw_towers(generator, m=4)
    plain = copy.deepcopy(model).eval()
    handle = mmc_fast.apply_ebr(model.eval(), sites(model), **SMALL, residual=residual, normalize=True)
    head = plain_head(handle, plain, residual=residual, normalize=True)
    present = torch.rand(len(x["mod0"]), 4, generator=generator) < 0.5
    present[0], present[1, 0] = False, True  # a row with nothing at all
    source = ranked_source(present, [2, 0, 3, 1]) if kind == "ranked" else mean_source(present, torch.float64)
    expected, _ = by_hand(plain, head, x, present=present, source=source)
    torch.testing.assert_close(handle.predict(**x, present=present, source=source), expected.detach())
    torch.testing.assert_close(model(**x), by_hand(plain, head, x)[0])  # nothing stays behind
    with pytest.raises(RuntimeError, match="training mode"):
        handle.predict(**x, present=present, source=source) if model.train() else None


def test_restore_is_exact(generator):
    model, x = draw_towers(generator, m=3, dropout=0.5)
    model.encoders["mod1"].eval()
    before, expected = snapshot(model), copy.deepcopy(model).eval()(**x)
    handle = mmc_fast.apply_ebr(model, sites(model), **SMALL, seed=3)
    assert list(model.state_dict())[: len(before["keys"])] == before["keys"]
    assert len(model.state_dict()) > len(before["keys"])
    model(**x)
    torch.set_rng_state(before["random"])  # dropout has drawn
    head = handle.head
    model.ebr = nn.Identity()
    with pytest.raises(RuntimeError, match="no longer the head"):
        handle.restore()
    model.ebr = head
    handle.restore()
    handle.restore()
    assert_same(before, snapshot(model))
    assert torch.equal(copy.deepcopy(model).eval()(**x), expected)
    assert find_handles(model) == []
    assert "as before" in str(handle)
    with pytest.raises(RuntimeError, match="restored"):
        handle.losses()
    mmc_fast.apply_ebr(model, sites(model), **SMALL)  # the name is free again


def test_seed_makes_heads_repeatable_and_leaves_the_generator_alone(generator):
    model, _ = draw_towers(generator, m=2)
    other = copy.deepcopy(model)
    state = torch.get_rng_state()
    mmc_fast.apply_ebr(model, sites(model), **SMALL, seed=11)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    mmc_fast.apply_ebr(other, sites(other), **SMALL, seed=11)
    for a, b in zip(model.ebr.parameters(), other.ebr.parameters(), strict=True):
        assert torch.equal(a, b)


def test_copies_pickles_and_state_dicts(generator):
    model, x = draw_towers(generator, m=2)
    handle = mmc_fast.apply_ebr(model, sites(model), **SMALL)
    expected = model(**x)
    loss = handle.losses().discrimination  # graph tensors are held: a copy must not trip over them
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        (its,) = find_handles(other)
        assert its.head is other.ebr
        assert its.head is not handle.head
        torch.testing.assert_close(other(**x), expected)
        torch.testing.assert_close(its.losses().discrimination, loss)
        its.restore()
        assert "ebr" not in dict(other.named_children())
    assert torch.equal(model(**x), expected)  # restoring the copies left the original alone
    fresh, _ = draw_towers(torch.Generator().manual_seed(0), m=2)
    fresh = copy.deepcopy(twin)
    randomise(fresh, generator)
    mmc_fast.apply_ebr(fresh, sites(fresh), **SMALL)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(**x), expected)


@pytest.mark.parametrize("early_stop", [False, True])
def test_activation_checkpointing(generator, early_stop):
    class Checkpointed(Pair):
        reentrant = False

        def forward(self, image, text):
            return checkpoint(self.image, image, use_reentrant=self.reentrant), self.text(text)

    model = Checkpointed(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(2, 3)).double()
    plain = Pair(copy.deepcopy(model.image), copy.deepcopy(model.text))
    a, t = (torch.randn(4, d, generator=generator, dtype=torch.float64) for d in (3, 2))
    at = {"image": "image", "text": "text"}
    grads = []
    for each in (model, plain):
        handle = mmc_fast.apply_ebr(each, at, **SMALL, seed=1)
        with set_checkpoint_early_stop(early_stop):
            out = each(a, t)
        (out[0].sum() + out[1].sum() + sum(handle.losses())).backward()
        grads.append([p.grad for p in each.parameters()])
        # The call inside of backward was not counted, nor did it begin a pass of its own.
        assert [len(r) for r in handle.output.recovered.values()] == [4, 4]
    torch.testing.assert_close(grads[0], grads[1])
    model.reentrant = True
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(a.requires_grad_(), t)
    with torch.no_grad():
        model(a, t)  # without gradients nothing is lost


def test_compile_without_graph_breaks(generator):
    model, x = draw_towers(generator, m=2)
    strength = torch.full((), 0.5)
    handle = mmc_fast.apply_ebr(model, sites(model), **SMALL, residual=True, normalize=True, reversal=strength)
    parameters = [p for n, p in model.named_parameters() if not n.startswith("unused")]

    def step(x):
        return total(model(**x), *handle.losses())

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for value, rows in ((0.5, 9), (0.25, 5)):  # another strength and another batch size
        strength.fill_(value)
        x = {n: torch.randn(rows, v.shape[1], generator=generator, dtype=v.dtype) for n, v in x.items()}
        expected = step(x)
        grads = torch.autograd.grad(expected, parameters)
        loss = compiled(x)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, parameters), grads)
    compiled_model = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(total(compiled_model(**x), *handle.losses()), expected)


def test_export_in_evaluation(generator):
    model, x = draw_towers(generator, m=2)
    mmc_fast.apply_ebr(model.eval(), sites(model), **SMALL)
    program = torch.export.export(model, (), x)
    torch.testing.assert_close(program.module()(**x), model(**x))


def test_autocast_and_low_precision(generator):
    model, x = draw_towers(generator, m=2)
    model, x = model.float(), {n: v.float() for n, v in x.items()}
    handle = mmc_fast.apply_ebr(model, sites(model), **SMALL)
    exact = model(**x), *handle.losses()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**x)
    losses = handle.losses()  # asked for outside of autocast
    assert logits.dtype == torch.bfloat16
    assert losses.discrimination.dtype == torch.float32
    for got, expected in zip((logits, *losses), exact, strict=True):
        torch.testing.assert_close(got.float(), expected, rtol=0.05, atol=0.05)
    sum(losses).backward()
    assert model.ebr.encoders[0][0].weight.grad.dtype == torch.float32
    handle.restore()
    handle = mmc_fast.apply_ebr(model.bfloat16(), sites(model), **SMALL)
    out = model(**{n: v.bfloat16() for n, v in x.items()})
    assert out.dtype == handle.head.encoders[0][0].weight.dtype == torch.bfloat16
    assert handle.losses().discrimination.dtype == torch.float32


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


@pytest.mark.parametrize("unused", [False, True])
def test_distributed_data_parallel(generator, tmp_path, unused):
    """Two steps in one process: the reducer sees every gradient once, the losses being inside or outside."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    class Step(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x):
            return total(self.model(**x), *find_handles(self.model)[0].losses())

    model, x = draw_towers(generator, m=3)
    model.unused.requires_grad_(False)
    mmc_fast.apply_ebr(model, sites(model), **SMALL)
    plain = copy.deepcopy(model)
    expected = total(plain(**x), *find_handles(plain)[0].losses())
    expected.backward()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        if unused:
            wrapped = DistributedDataParallel(Step(model), find_unused_parameters=True)
        else:
            wrapped = DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            loss = wrapped(x) if unused else total(wrapped(**x), *find_handles(model)[0].losses())
            loss.backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(loss, expected)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
