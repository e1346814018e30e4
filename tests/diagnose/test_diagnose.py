"""``diagnose`` end to end: numbers against plain computations."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from diagnose_models import WIDTHS, Attention, Toy, batches, chain, whole
from scipy import stats
from torch import Tensor, nn
from torch.func import jacrev, vmap

from mmc_fast.diagnose import diagnose
from mmc_fast.diagnose.measures import blocks, similarity, weights
from mmc_fast.testing import planted_head


def test_noise_of_another_modality_in_neurons(seed: int) -> None:
    values = []
    for sharing in (0.0, 1.0):
        planted = planted_head(seed, sharing=sharing)
        d = diagnose(planted, planted.batches(), resamples=0, probes=False)
        assert any(note.startswith("No initial weights were given") for note in d.notes)
        values.append(d.value("foreign_noise"))
        assert d.value("attribution_entropy") == pytest.approx(sharing, abs=0.1)
        if sharing:
            assert d.arrays["responses"][0]["entangled"]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[1] > 0.4


def test_numbers_of_a_chain(generator: torch.Generator) -> None:
    head, loader = chain(generator), batches(generator)
    start = torch.randn(12, 10, generator=generator)  # weights before training
    own = {"tolerance": 0.03, "tau": 0.3, "energy": 0.7, "ridge": 1e-2}  # none the default
    d = diagnose(Toy(head, head), loader, resamples=20, initial_weight=start, **own)
    assert not any("initial weights" in note for note in d.notes)
    image, audio, labels = whole(loader)
    x = torch.cat([image, audio], 1).double()
    double = chain(generator).double()
    double.load_state_dict(head.state_dict())
    inputs = [x, double[:2](x), double[:4](x)]
    for index, u in enumerate(inputs):
        tail = double[2 * index :]
        jacobian = vmap(jacrev(tail))(u).detach()
        gram = torch.einsum("nci,ncj->ij", jacobian, jacobian)
        sigma = torch.from_numpy(np.cov(u.detach().numpy().T, bias=True))
        split = WIDTHS if index == 0 else [u.shape[1]]
        values = blocks.spectrum(blocks.whitened(gram, sigma, split))
        assert d.value(f"agop.{index}.effective_rank") == pytest.approx(blocks.effective_rank(values), rel=1e-4)
        assert d.value(f"agop.{index}.stable_rank") == pytest.approx(blocks.stable_rank(values), rel=1e-4)
        assert d.value(f"agop.{index}.numerical_rank") == int((values > 0.03 * values[0]).sum())
        shown = np.pad(d.arrays[f"spectrum.{index}"], (0, len(values)))[: len(values)]
        np.testing.assert_allclose(shown, values / values.sum(), rtol=1e-4, atol=1e-6)
        w = double[2 * index].weight.detach() - (start.double() if index == 0 else 0)
        cosine = float((w.t() @ w).flatten() @ gram.flatten() / (w.t() @ w).norm() / gram.norm())
        assert d.value(f"agop.{index}.nfm_cosine") == pytest.approx(cosine, rel=1e-5)
        if index == 0:
            np.testing.assert_allclose(
                [d.value("use_share.image"), d.value("use_share.audio")],
                blocks.use_shares(gram, sigma, WIDTHS),
                rtol=1e-5,
            )
            assert d.value("entanglement") == pytest.approx(blocks.entanglement(gram, sigma, WIDTHS), rel=1e-4)
            expected = blocks.block_energies(gram, sigma, WIDTHS), blocks.top_directions(gram, sigma, WIDTHS, 5)[2]
            for name, values in zip(("block_energies", "top_directions"), expected, strict=True):
                np.testing.assert_allclose(d.arrays[name], values, rtol=1e-3, atol=1e-4)
    fused = inputs[-1].detach()
    assert d.value("cka.image") == pytest.approx(similarity.linear_cka(image, fused), rel=1e-4)
    assert d.value("cka.audio") == pytest.approx(similarity.linear_cka(audio, fused), rel=1e-4)
    inverse = np.diag(np.linalg.inv(np.corrcoef(fused.numpy().T) + 1e-2 * np.eye(9)))
    assert d.value("fused.vif") == pytest.approx(inverse.mean(), rel=1e-4)
    singular = torch.linalg.svdvals(fused - fused.mean(0))
    assert d.value("fused.effective_rank") == pytest.approx(blocks.effective_rank(singular), rel=1e-4)
    assert d.value("fused.stable_rank") == pytest.approx(blocks.stable_rank(singular), rel=1e-4)
    assert d.value("fused.numerical_rank") == int((singular > 0.03 * singular[0]).sum())
    np.testing.assert_allclose(d.arrays["spectrum.fused"], singular / singular.sum(), rtol=1e-4)
    dictionary = weights.pca_dictionary(torch.from_numpy(np.cov(x.numpy().T, bias=True)), dict(WIDTHS))[0]
    degree = weights.degree_of_polysemanticity(double[0].weight.detach(), dictionary, tau=0.3, energy=0.7).gamma
    assert d.value("polysemanticity_degree") == pytest.approx(degree)
    assert d["polysemanticity_degree"].error is not None
    w, sigma = double[0].weight.detach(), torch.from_numpy(np.cov(x.numpy().T, bias=True))
    shares = torch.stack(
        [torch.einsum("ni,ij,nj->n", w[:, s], sigma[s, s], w[:, s]) for s in (slice(6), slice(6, 10))], 1
    )
    shares = shares / shares.sum(1, keepdim=True)
    np.testing.assert_allclose(d.arrays["neuron_shares"], shares, rtol=1e-4, atol=1e-6)
    entropy = -(shares * shares.log()).sum(1) / np.log(2)
    assert d.value("neuron_entropy") == pytest.approx(float(entropy.mean()), rel=1e-4)
    assert d.value("mixed_neurons") == pytest.approx(float((entropy > 0.5).double().mean()), abs=1 / 12)
    signal, noise = weights.signal_noise_shares(w, x, labels, WIDTHS)
    foreign = [float(n.sum() - n[s.argmax()]) for s, n in zip(signal, noise, strict=True)]
    assert d.value("foreign_noise") == pytest.approx(np.mean(foreign), rel=1e-4)
    gradient = vmap(jacrev(double[1:]))(double[0](x).detach()).detach().square().sum(1)  # [N, h]
    passed = weights.modality_entropy(weights.attribution_shares(w, x, gradient, WIDTHS))
    assert d.value("attribution_entropy") == pytest.approx(float(passed.mean()), rel=1e-4)
    for name, m in (("feature_capacity", w.t()), ("neuron_overlap", w)):
        products = (m @ m.t()).square()
        capacity = products.diagonal() / products.sum(1)
        assert d.value(name) == pytest.approx(float(capacity.mean()))
    assert d.value("collision_exact") == pytest.approx(6 * 4 / 45)
    assert d.value("collision_bound") == pytest.approx(2 * 4**2 / 10**2)
    assert re.match(r"co-activation|row chain", d.settings["agop"])
    assert d.n_samples == 500


def test_intervals_reach_below_zero_where_measures_can(generator: torch.Generator) -> None:
    """Labels that the model finds least likely, so that modalities lower its score; shares lie between 0 and 1."""
    head = chain(generator)
    loader = [(a, b, head(torch.cat([a, b], 1)).argmin(1)) for a, b, _ in batches(generator)]
    d = diagnose(Toy(head, head), loader, resamples=20, probes=False)
    half, below = stats.t.ppf(0.975, 15), 0
    for name, m in d.measures.items():
        if m.error is None:
            continue
        shares = name.startswith(("use_share", "score", "only", "without", "shuffled", "cka", "entanglement"))
        low = m.value - half * m.error
        if name.startswith(("shapley", "resampled_shapley")):
            assert m.low == pytest.approx(max(-1.0, low))
            below += m.low < 0
        elif shares:
            assert m.low == pytest.approx(max(0.0, low))
            assert m.high <= 1
    assert below


def test_a_dead_neuron_is_not_counted(generator: torch.Generator) -> None:
    head, loader = chain(generator), batches(generator)
    head[0].weight.data[3] = 0
    d = diagnose(Toy(head, head), loader, resamples=0, probes=False)
    w, x = head[0].weight.detach().double(), torch.cat(whole(loader)[:2], 1).double()
    read = torch.stack([(x[:, s] @ w[:, s].t()).var(0, correction=0) for s in (slice(6), slice(6, 10))], 1)
    p = read[torch.arange(12) != 3]
    p = p / p.sum(1, keepdim=True)
    entropy = -(p * p.log()).sum(1) / np.log(2)
    assert d.value("neuron_entropy") == pytest.approx(float(entropy.mean()), rel=1e-4)
    assert d.value("mixed_neurons") == pytest.approx(float((entropy > 0.5).double().mean()), abs=1e-9)


def test_the_general_path_agrees_with_the_fast_one(generator: torch.Generator) -> None:
    head, loader = chain(generator), batches(generator)
    fast = diagnose(Toy(head, head), loader, resamples=0, probes=False)

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = head

        def forward(self, features: dict[str, Tensor]) -> Tensor:
            return self.inner(torch.cat(list(features.values()), 1))

    general = diagnose(Toy(Hidden()), loader, resamples=0, probes=False)
    assert general.settings["agop"] == "vector-Jacobian products"
    for name in ("use_share.image", "entanglement", "score.all", "only.audio"):
        assert general.value(name) == pytest.approx(fast.value(name), rel=1e-4), name
    assert general.value("agop.input.effective_rank") == pytest.approx(fast.value("agop.0.effective_rank"), rel=1e-4)
    np.testing.assert_allclose(general.arrays["block_energies"], fast.arrays["block_energies"], rtol=1e-3)
    assert "no chain" in general.notes[0]


def test_a_head_that_does_not_compute_the_logits_is_not_taken_for_the_fusion(generator: torch.Generator) -> None:
    head, other = chain(generator), chain(generator)

    class Wrong(Toy):
        def fuse(self, features: dict[str, Tensor]) -> Tensor:
            return other(torch.cat(list(features.values()), 1))

    assert (
        diagnose(Wrong(head, head), batches(generator), resamples=0, probes=False).settings["agop"].startswith("vector")
    )


def test_attention_fusion_and_its_neurons(generator: torch.Generator) -> None:
    fusion, loader = Attention(generator), batches(generator, 200)

    class Represented(Toy):
        def represent(self, features: dict[str, Tensor]) -> Tensor:
            tokens = torch.stack([fusion.image(features["image"]), fusion.audio(features["audio"])], 1)
            return fusion.mix(tokens, tokens, tokens, need_weights=False)[0].mean(1)

    seen = Represented(fusion)
    d = diagnose(seen, loader, resamples=20)
    image, audio, _ = whole(loader)

    def one(a: Tensor, b: Tensor) -> Tensor:
        return fusion({"image": a[None], "audio": b[None]})[0]

    ja, jb = vmap(jacrev(one, argnums=(0, 1)))(image, audio)
    use = [
        float(torch.einsum("ncd,de,nce->", j, torch.from_numpy(np.cov(x.numpy().T, bias=True)).float(), j))
        for j, x in ((ja.detach(), image), (jb.detach(), audio))
    ]
    assert d.value("use_share.image") == pytest.approx(use[0] / sum(use), rel=1e-3)
    shares = np.array(d.arrays["neuron_shares"])
    assert shares.shape == (8, 2)
    sigma = [torch.from_numpy(np.cov(t.numpy().T, bias=True)).float() for t in (image, audio)]
    represented = vmap(jacrev(lambda a, b: seen.represent({"image": a[None], "audio": b[None]})[0], argnums=(0, 1)))
    jacobians = represented(image[:64], audio[:64])  # of the first batch
    read = torch.stack([torch.einsum("nud,de,nue->u", j, s, j) for j, s in zip(jacobians, sigma, strict=True)], 1)
    np.testing.assert_allclose(shares, (read / read.sum(1, keepdim=True)).detach(), rtol=1e-3)
    silent = Represented(fusion)
    fusion.audio.weight.data.zero_()
    assert diagnose(silent, loader, resamples=0, probes=False).value("use_share.audio") == 0
