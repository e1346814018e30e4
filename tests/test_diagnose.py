"""``diagnose`` end to end: numbers against plain computations, uncertainty, errors, resume, JSON, comparison, plots, page."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.func import jacrev, vmap

import mmc_fast
from mmc_fast.analysis import blocks, reliance, similarity
from mmc_fast.analysis.diagnosis import Diagnosis, diagnose
from mmc_fast.analysis.diagnosis.predictions import CoalitionScores
from mmc_fast.errors import InputError
from mmc_fast.testing import planted_head

WIDTHS = {"image": 6, "audio": 4}


class Attention(nn.Module):
    """A fusion that is no chain: one token per modality, attention, mean, logits."""

    def __init__(self, generator: torch.Generator, classes: int = 3) -> None:
        super().__init__()
        self.image, self.audio = nn.Linear(6, 8), nn.Linear(4, 8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, classes)
        for p in self.parameters():
            p.data.normal_(generator=generator).mul_(0.6)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        tokens = torch.stack([self.image(features["image"]), self.audio(features["audio"])], 1)
        return self.out(self.mix(tokens, tokens, tokens, need_weights=False)[0].mean(1))


class Toy:
    """An adapter whose batches are ``(image, audio, labels)``."""

    def __init__(self, fusion: nn.Module, head: nn.Module | None = None) -> None:
        self.model, self.head = fusion.eval(), head

    def encode(self, batch: Any) -> dict[str, Tensor]:
        return {"image": batch[0], "audio": batch[1]}

    def fuse(self, features: dict[str, Tensor]) -> Tensor:
        return self.head(torch.cat(list(features.values()), 1)) if self.head is not None else self.model(features)


def batches(generator: torch.Generator, n: int = 500, size: int = 64, classes: int = 3) -> list[tuple[Tensor, ...]]:
    image, audio = torch.randn(n, 6, generator=generator), torch.randn(n, 4, generator=generator) * 3
    audio[:, 0] += image[:, 0]
    labels = torch.randint(classes, (n,), generator=generator)
    return list(zip(image.split(size), audio.split(size), labels.split(size), strict=True))


def whole(loader: list[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.cat(parts) for parts in zip(*loader, strict=True))


def chain(generator: torch.Generator, classes: int = 3) -> nn.Sequential:
    head = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 9), nn.GELU(), nn.Linear(9, classes))
    for p in head.parameters():
        p.data.normal_(generator=generator)
    return head.eval()


# Numbers


def test_noise_of_another_modality_in_neurons(seed: int) -> None:
    values = []
    for sharing in (0.0, 1.0):
        planted = planted_head(seed, sharing=sharing)
        d = diagnose(planted, planted.batches(), resamples=0, probes=False)
        values.append(d.value("foreign_noise"))
        assert d.value("attribution_entropy") == pytest.approx(sharing, abs=0.1)
        if sharing:
            assert d.arrays["responses"][0]["entangled"]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[1] > 0.4


def test_numbers_of_a_chain(generator: torch.Generator) -> None:
    head, loader = chain(generator), batches(generator)
    d = diagnose(Toy(head, head), loader, resamples=20)
    image, audio, _ = whole(loader)
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
        w = double[2 * index].weight.detach()
        cosine = float((w.t() @ w).flatten() @ gram.flatten() / (w.t() @ w).norm() / gram.norm())
        assert d.value(f"agop.{index}.nfm_cosine") == pytest.approx(cosine, rel=1e-5)
        if index == 0:
            np.testing.assert_allclose(
                [d.value("use_share.image"), d.value("use_share.audio")],
                blocks.use_shares(gram, sigma, WIDTHS),
                rtol=1e-5,
            )
            assert d.value("entanglement") == pytest.approx(blocks.entanglement(gram, sigma, WIDTHS), rel=1e-4)
    fused = inputs[-1].detach()
    assert d.value("cka.image") == pytest.approx(similarity.linear_cka(image, fused), rel=1e-4)
    assert d.value("cka.audio") == pytest.approx(similarity.linear_cka(audio, fused), rel=1e-4)
    inverse = np.diag(np.linalg.inv(np.corrcoef(fused.numpy().T) + 1e-6 * np.eye(9)))
    assert d.value("fused.vif") == pytest.approx(inverse.mean(), rel=1e-4)
    singular = torch.linalg.svdvals(fused - fused.mean(0))
    assert d.value("fused.effective_rank") == pytest.approx(blocks.effective_rank(singular), rel=1e-4)
    assert re.match(r"co-activation|row chain", d.settings["agop"])
    assert d.samples == 500


def plain_scores(fuse: Any, image: Tensor, audio: Tensor, score: Any) -> list[float]:
    """none, only image, only audio, all."""
    means = [image.mean(0).expand_as(image), audio.mean(0).expand_as(audio)]
    pairs = [(means[0], means[1]), (image, means[1]), (means[0], audio), (image, audio)]
    with torch.no_grad():
        return [score(fuse({"image": a, "audio": b})) for a, b in pairs]


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_of_coalitions(classes: int, generator: torch.Generator) -> None:
    head = chain(generator, classes)
    loader = batches(generator, classes=classes)
    image, audio, labels = whole(loader)
    toy = Toy(head, head)
    d = diagnose(toy, loader, resamples=20, probes=False)

    def score(y: Tensor) -> float:
        if classes == 2:
            return float(roc_auc_score(labels, (y[:, 1] - y[:, 0]).numpy()))
        return float((y.argmax(1) == labels).double().mean())

    expected = plain_scores(toy.fuse, image, audio, score)
    if classes == 2:
        expected[0] = 0.5  # all rows alike; the last digits of a product may still tell them apart
    assert d.metric == ("auroc" if classes == 2 else "accuracy")
    assert [d.value(k) for k in ("score.none", "only.image", "only.audio", "score.all")] == pytest.approx(
        expected, abs=5e-3
    )
    assert d.arrays["coalition_scores"] == pytest.approx(expected, abs=5e-3)
    assert (d.value("without.audio"), d.value("without.image")) == (d.value("only.image"), d.value("only.audio"))
    assert d.value("shapley.image") == pytest.approx(reliance.shapley_values(d.arrays["coalition_scores"])[0])
    total = d.value("shapley.image") + d.value("shapley.audio")
    assert total == pytest.approx(d.value("score.all") - d.value("score.none"))


def test_weighted_auroc_of_groups_is_that_of_the_repeated_rows(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = torch.from_numpy(random.integers(2, size=300))
    logits = torch.from_numpy(random.integers(-5, 5, size=(2, 300, 2)).astype(np.float32))  # ties
    places = torch.from_numpy(random.integers(4, size=300))
    scores = CoalitionScores("auroc", 1, 4)
    for rows in torch.arange(300).split(70):
        scores.add(logits[:, rows], labels[rows], places[rows])
    weights = np.array([[2.0, 0, 1, 1], [1, 1, 1, 1]])
    found = scores.scores(weights)
    for r, w in enumerate(weights):
        rows = np.concatenate([np.flatnonzero(places.numpy() == k).repeat(int(w[k])) for k in range(4)])
        for c in range(2):
            margin = (logits[c, :, 1] - logits[c, :, 0]).numpy()[rows]
            assert found[c, r] == pytest.approx(roc_auc_score(labels.numpy()[rows], margin))


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

    d = diagnose(Represented(fusion), loader, resamples=20)
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
    np.testing.assert_allclose(shares.sum(1), 1)
    silent = Represented(fusion)
    fusion.audio.weight.data.zero_()
    assert diagnose(silent, loader, resamples=0, probes=False).value("use_share.audio") == 0


# Uncertainty, comparison, JSON


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    planted = planted_head(4, sharing=0.5, jitter=0.1)
    return diagnose(
        planted, planted.batches(), control=True, unimodal_weights={"a": torch.randn(20, 8), "b": torch.randn(20, 8)}
    )


def test_every_measure_of_data_has_its_uncertainty(found: Diagnosis) -> None:
    fixed = {"collision_bound", "collision_exact", "feature_capacity", "neuron_overlap", "score.chance"}
    fixed |= {"attribution_entropy", "foreign_noise"}  # of the sampled rows
    for name, m in found.measures.items():
        if name in fixed or name.startswith("weight_classifier"):
            assert m.low is None, name
        else:
            assert m.low <= m.value <= m.high, name
            assert m.error >= 0, name
    # The standard error of an accuracy is the binomial one.
    accuracy = found["score.all"]
    assert accuracy.error == pytest.approx(math.sqrt(accuracy.value * (1 - accuracy.value) / 2000), rel=0.6)


def test_json_round_trip(found: Diagnosis, tmp_path) -> None:
    text = found.to_json(tmp_path / "d.json")
    assert Diagnosis.from_json(text) == found
    assert Diagnosis.from_json(tmp_path / "d.json") == found
    values = json.loads(text)
    assert values["schema_version"] == 1
    assert values["settings"]["thresholds"]["use"] > 0
    for bad, message in (
        ('{"kind": "demo"}', "is no diagnosis"),
        ("{", "cannot be read"),
        (text.replace('"schema_version": 1', '"schema_version": 99'), "reads 1"),
        (tmp_path / "absent.json", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            Diagnosis.from_json(bad)
        assert "\n" not in str(caught.value)


def test_comparison(found: Diagnosis) -> None:
    planted = planted_head(4, ignored=1, jitter=0.1)
    other = diagnose(planted, planted.batches())
    compared = found.compare(other)
    a, b, gap = compared.rows["use_share.b"]
    assert gap.value == pytest.approx(a.value - b.value)
    assert gap.low > 0
    assert (gap.high - gap.low) / 2 == pytest.approx(math.hypot((a.high - a.low) / 2, (b.high - b.low) / 2))
    assert compared.changed_verdicts["b"][1] == "collapsed"
    assert re.search(r"use_share\.b .* \*$", str(compared), re.MULTILINE)
    assert not found.compare(found).changed_verdicts
    assert all(gap.value == 0 for _, _, gap in found.compare(found).rows.values())
    three = planted_head(4, modalities=3)
    with pytest.raises(InputError, match="same modalities"):
        found.compare(diagnose(three, three.batches(), resamples=0, probes=False))
    with pytest.raises(KeyError, match="use_share"):
        found["nonsense"]


def test_measures_of_a_second_model(found: Diagnosis, tmp_path) -> None:
    more = found.with_measures({"prefix_gap.b": mmc_fast.analysis.diagnosis.Measure(0.12, 0.02, 0.08, 0.16)})
    assert more.value("prefix_gap.b") == 0.12
    assert "prefix_gap.b" not in found.measures
    assert Diagnosis.from_json(more.to_json()) == more
    assert "prefix_gap.b 0.12" in more.save_html(tmp_path / "m.html").read_text(encoding="utf-8")


def test_summary_and_plots(found: Diagnosis) -> None:
    text = found.summary()
    for name in found.modalities:
        assert f"Use share {found.value(f'use_share.{name}'):.1%}" in text
    assert f"mean entropy {found.value('neuron_entropy'):.2f}" in text
    for kind in (
        "use_shares",
        "blocks",
        "spectra",
        "reliance",
        "shapley",
        "neurons",
        "responses",
        "similarity",
        "ranks",
    ):
        axes = getattr(found, f"plot_{kind}")()
        assert isinstance(axes, Axes)
        axes.figure.canvas.draw()
        assert getattr(found, f"plot_{kind}")(axes) is axes
    heights = [bar.get_height() for bar in found.plot_use_shares().patches]
    assert heights == pytest.approx([found.value("use_share.a"), found.value("use_share.b")])


def test_page(found: Diagnosis, tmp_path) -> None:
    planted = planted_head(4, ignored=1)
    other = diagnose(planted, planted.batches(), resamples=20)
    page = found.save_html(tmp_path / "d.html", other).read_text(encoding="utf-8")
    for heading in (
        "Verdict",
        "Compared",
        "What the head responds to",
        "What the model loses",
        "Which neurons",
        "The fused",
    ):
        assert f"<h2>{heading}" in page
    assert page.count("<svg ") == 9
    assert page.count("Cannot show.") >= 5
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL).lower().split()
    bare = diagnose(planted, planted.batches(), reliance=False, resamples=0)
    assert "What the model loses" not in bare.save_html(tmp_path / "b.html").read_text(encoding="utf-8")
    with pytest.raises(InputError, match="no scores"):
        bare.plot_reliance()


@pytest.mark.slow
def test_the_page_in_a_browser(found: Diagnosis, tmp_path) -> None:
    """It draws, without a message in the console and without a name to resolve."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    page, picture = found.save_html(tmp_path / "d.html"), tmp_path / "d.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1100,3000"]
    quiet = ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--disable-component-update"]
    done = subprocess.run(
        [browser, *options, *quiet, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", page.as_uri()],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert picture.stat().st_size > 20_000, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "ERR_NAME_NOT_RESOLVED" not in done.stderr, done.stderr


def test_scores_of_unimodal_models_take_the_place_of_probes() -> None:
    planted = planted_head(4, ignored=1)
    lost = diagnose(planted, planted.batches(), resamples=0, probes=False, alone={"a": 0.9, "b": 0.8})
    assert (lost.value("alone.a"), lost.value("alone.b")) == (0.9, 0.8)
    assert [v.kind for v in lost.verdicts] == ["relied on", "collapsed"]
    nothing = diagnose(planted, planted.batches(), resamples=0, alone={"b": lost.value("score.chance")})
    assert nothing.verdicts[1].kind == "ignored"
    assert nothing.value("alone.a") != 0.9
    for bad in ({"c": 0.5}, {"a": 0.5}):
        with pytest.raises(InputError, match="alone has scores"):
            diagnose(planted, planted.batches(), resamples=0, probes=False, alone=bad)


# What cannot be diagnosed, and what can only be in part


def test_no_labels_one_class_and_constant_modality(generator: torch.Generator) -> None:
    head = chain(generator)
    loader = batches(generator)
    toy = Toy(head, head)

    class Silent(Toy):
        def labels(self, batch: Any) -> None:
            return None

    d = diagnose(Silent(head, head), loader, resamples=20)
    assert d.metric is None
    assert {v.kind for v in d.verdicts} <= {"used", "ignored"}
    assert "There are no labels" in d.summary()
    one = diagnose(toy, [(a, b, torch.zeros_like(y)) for a, b, y in loader], resamples=20)
    assert "single class" in one.summary()
    assert "score.all" not in one.measures
    constant = diagnose(toy, [(a, torch.full_like(b, 2.5), y) for a, b, y in loader], resamples=20)
    assert constant.value("use_share.audio") == pytest.approx(0, abs=1e-9)
    assert constant["cka.audio"].value is None
    assert json.loads(constant.to_json())["measures"]["cka.audio"]["value"] is None
    few = diagnose(toy, [tuple(t[:5] for t in loader[0])], resamples=20)
    assert few.samples == 5
    assert "No network was trained" in few.summary() or "alone.image" in few.measures


def once(loader: list[Any]) -> Iterator[Any]:
    yield from loader


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda l: [(a * math.nan, b, y) for a, b, y in l], "'image' hold NaN or infinite values in row 0 of batch 0"),
        (lambda l: [*l[:-1], (l[-1][0][:, :5], *l[-1][1:])], "widths must not change"),
        (lambda l: [(a, b[:-1], y) for a, b, y in l], "must be paired"),
        (lambda l: [(a.long(), b, y) for a, b, y in l], "floating point"),
        (lambda l: [(a, b, y.float()) for a, b, y in l], "class numbers"),
        (lambda l: [(a, b, y + 7) for a, b, y in l], "number the classes"),
        (lambda l: [], "no sample"),
        (lambda l: [(a[:0], b[:0], y[:0]) for a, b, y in l], "no rows"),
        (lambda l: [*l[:-1], (l[-1][0], l[-1][1], None)], "all or none"),
        (once, "iterator"),
    ],
)
def test_bad_data(change, message: str, generator: torch.Generator) -> None:
    head = chain(generator)
    with pytest.raises(InputError, match=message) as caught:
        diagnose(Toy(head, head), change(batches(generator)), resamples=0, probes=False)
    assert "\n" not in str(caught.value)


def test_bad_models(generator: torch.Generator) -> None:
    loader = batches(generator)
    norm = nn.Sequential(nn.Linear(10, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    class Norm(Toy):
        def __init__(self) -> None:
            self.model = norm

        def fuse(self, features: dict[str, Tensor]) -> Tensor:
            return norm(torch.cat(list(features.values()), 1))

    with pytest.raises(InputError, match=r"model\.eval\(\)"):
        diagnose(Norm(), loader)
    norm.eval()
    assert diagnose(Norm(), loader, resamples=0, probes=False).samples == 500

    class Hidden(Toy):
        def __init__(self) -> None:
            pass

        def fuse(self, features: dict[str, Tensor]) -> Tensor:
            x = torch.cat(list(features.values()), 1)
            return (x - x.mean(0))[:, :3]

    with pytest.raises(InputError, match="logits of other rows moved"):
        diagnose(Hidden(), loader)

    class Detached(Hidden):
        def fuse(self, features: dict[str, Tensor]) -> Tensor:
            return torch.cat(list(features.values()), 1)[:, :3].detach()

    with pytest.raises(InputError, match="do not depend"):
        diagnose(Detached(), loader)
    head = chain(generator)
    head[0].weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match="logits hold NaN"):
        diagnose(Toy(head, head), loader)
    with pytest.raises(InputError, match="ModelAdapter"):
        mmc_fast.diagnose(head, loader)
    with pytest.raises(TypeError, match="adapter"):
        mmc_fast.diagnose(3, loader)
    with pytest.raises(InputError, match="groups"):
        diagnose(Toy(norm), loader, groups=0)
    with pytest.raises(InputError, match="metric"):
        diagnose(Toy(norm), loader, metric="f1")


def test_seven_modalities_are_not_scored(generator: torch.Generator) -> None:
    planted = planted_head(1, modalities=7, num_samples=300)
    d = diagnose(planted, planted.batches(), resamples=0)
    assert "more than 6" in d.summary()
    assert len(d.verdicts) == 7


def test_empty_batches_and_one_logit(generator: torch.Generator) -> None:
    head = chain(generator, 1)
    loader = batches(generator, classes=2)
    toy = Toy(head, head)
    d = diagnose(toy, loader, resamples=0, probes=False)
    more = [loader[0], tuple(t[:0] for t in loader[0]), *loader[1:]]
    assert diagnose(toy, more, resamples=0, probes=False).value("score.all") == pytest.approx(d.value("score.all"))
    image, audio, labels = whole(loader)
    with torch.no_grad():
        y = toy.fuse({"image": image, "audio": audio})[:, 0]
    assert d.value("score.all") == pytest.approx(roc_auc_score(labels, y), abs=1e-6)
    right = diagnose(toy, loader, resamples=0, probes=False, metric="accuracy").value("score.all")
    assert right == pytest.approx(float(((y > 0) == labels).double().mean()))


# Killed and resumed


class Killed(Exception):
    pass


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("at", ["collect 3", "collect 9", "score 2", "score 7"])
def test_killed_and_resumed_gives_the_same_numbers(
    general: bool, at: str, generator: torch.Generator, tmp_path
) -> None:
    head = chain(generator, 2)
    loader = batches(generator, 700, 70, classes=2)
    toy = Toy(nn.ModuleList([head]), None if general else head)
    toy.fuse = lambda f: head(torch.cat(list(f.values()), 1))
    options = {"resamples": 20, "probes": True, "seed": 3}
    expected = diagnose(toy, loader, **options)
    state = tmp_path / "s.state"
    encoded: list[int] = []

    def kill(phase: str, done: int, total: int | None) -> None:
        if f"{phase} {done}" == at:
            raise Killed

    with pytest.raises(Killed):
        diagnose(toy, loader, state=state, save_every=0, progress=kill, **options)
    buffered = not general and at.startswith("collect")  # less than one flush: nothing is settled yet
    assert state.is_file() != buffered
    original = Toy.encode

    def counted(self: Toy, batch: Any) -> dict[str, Tensor]:
        encoded.append(1)
        return original(self, batch)

    toy.encode = counted.__get__(toy)
    got = diagnose(toy, loader, state=state, **options)
    assert got == expected
    assert not state.exists()
    if not buffered:
        assert len(encoded) < 24, "what was done is not done again"


def test_a_state_of_something_else_is_refused(generator: torch.Generator, tmp_path) -> None:
    head, other = chain(generator), chain(generator)
    loader = batches(generator)
    state = tmp_path / "s.state"

    def kill(phase: str, done: int, total: int | None) -> None:
        if phase == "score" and done == 3:
            raise Killed

    with pytest.raises(Killed):
        diagnose(Toy(head, head), loader, state=state, save_every=0, progress=kill)
    for call, message in (
        (lambda: diagnose(Toy(head, head), batches(generator), state=state), "same data in the same order"),
        (lambda: diagnose(Toy(other, other), loader, state=state), "same data in the same order|another head"),
        (lambda: diagnose(Toy(head, head), loader, state=state, seed=9), "other groups, seed"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    state.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="delete it to start over"):
        diagnose(Toy(head, head), loader, state=state)


# The document


def test_the_document_runs_and_names_what_there_is(tmp_path, monkeypatch, found: Diagnosis) -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "diagnose.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/diagnose.md", "exec"), {})
    assert Diagnosis.from_json(tmp_path / "before.json").modalities == {"image": 16, "audio": 16}
    assert (tmp_path / "before.html").is_file()
    named = set(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))
    listed = {part.strip("`., …") for row in named for part in re.findall(r"`[^`]+`", row)}
    for measure in found.measures:
        general = re.sub(r"\.[ab]$", ".M", re.sub(r"^agop\.\d+", "agop.L", measure))
        ending = "." + measure.split(".")[-1]
        assert general in listed or any(ending == "." + name.lstrip(".") for name in listed), measure
    thresholds = found.settings["thresholds"]
    for name in ("use", "kept", "entropy", "signal", "loss"):
        assert f"{thresholds[name]:g}" in text, name
