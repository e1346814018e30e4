"""The report: what it shows follows from the numbers, the page stands alone, and blocks render safely."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex

from mmc_fast.diagnose.document import Callout, Cell, Details, Facts, Figure, Panels, Report, Section, Table, Text
from mmc_fast.diagnose.figures import INK, VARIABLES, Line, lines
from mmc_fast.errors import InputError
from mmc_fast.experiments.report.comparison import AVERAGE, COMPLETE, Comparison, compare
from mmc_fast.experiments.report.drawings import draw_adversary, draw_rates, draw_reliance, draw_repair
from mmc_fast.experiments.report.trained import (
    chance_score,
    history,
    probe_table,
    reliance,
    reliance_table,
    settings_table,
    verdicts,
    without_effect,
)

RATES = (0.0, 0.2, 0.5)
LABELS = np.random.default_rng(0).integers(0, 4, 600)


class Outline(HTMLParser):
    """Collects tags with attributes and checks that they nest."""

    VOID = ("meta", "path", "use", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def predictions(quality: dict[str, float], seeds: int = 3) -> dict[str, list[dict[float, np.ndarray]]]:
    """Predicted classes that are right with the given quality, less where more is missing."""
    generator = np.random.default_rng(5)
    wrong = (LABELS + 1) % 4
    return {
        method: [
            {rate: np.where(generator.random(600) < q - 0.3 * rate, LABELS, wrong) for rate in RATES}
            for _ in range(seeds)
        ]
        for method, q in quality.items()
    }


def comparison_of(quality: dict[str, float]) -> Comparison:
    return compare(
        "toy",
        "accuracy",
        LABELS,
        predictions(quality),
        seeds=[0, 1, 2],
        resamples=200,
        generator=np.random.default_rng(1),
    )


def entry(unimodal: float, without: float, only: float, shuffled: float, shapley: float, verdict: str) -> dict:
    """What `evaluate` stores of one modality."""
    scores = {"unimodal": unimodal, "leave_one_out": without, "single_modality": only}
    evidence = {
        "alone": unimodal,
        "without": without,
        "only": only,
        "shuffled": shuffled,
        "index": shapley,
        "agop": None,
    }
    return {**scores, "shuffled": shuffled, "shapley": shapley, "verdict": verdict, "evidence": evidence}


def run(
    method: str, seed: int, *, only: float = 0.3, fresh: float = 0.9, label: str | None = None, kind: str = "collapsed"
) -> dict:
    """A results object of the documented layout."""
    adversarial = {
        "modality_probe": {"balanced_accuracy": fresh, "chance": 0.5},
        "distance_to_lambda0": 0.125,
        "lambda": 0.1,
    }
    history = [
        {
            "epoch": e,
            "loss_sem": 1 / e,
            "val_score": 0.5 + 0.1 * e + 0.01 * seed,
            "loss_md_over_entropy": 0.2 if method == "ebr" else None,
            "psi_accuracy": 0.95 if method == "ebr" else None,
        }
        for e in (1, 2, 3)
    ]
    return {
        "schema_version": 1,
        "method": method,
        "label": label or method,
        "seed": seed,
        "data": {"name": "toy", "metric": "accuracy"},
        "config": {"method": method, "epochs": 3, "ebr": {"reversal": 0.1} if method == "ebr" else None},
        "history": history,
        "adversarial": adversarial if method == "ebr" else None,
        "scores": {
            "complete": 0.9 + 0.01 * seed,
            "missing": [{"rate": r, "realised": [r, r / 2], "score": 0.9 - r} for r in RATES[1:]],
            "reliance": {
                "strong": entry(0.88, 0.5, 0.85, 0.4, 0.6, "relied on"),
                "faint": entry(0.6, 0.9, only, 0.89, 0.01, kind),
            },
        },
    }


def toy_runs(method: str, **changes) -> list[dict]:
    return [run(method, seed, **changes) for seed in (0, 1, 2)]


# Comparison


def test_comparison_means_and_differences_are_those_of_the_predictions():
    made = predictions({"vanilla": 0.7, "ebr": 0.8})
    result = comparison_of({"vanilla": 0.7, "ebr": 0.8})
    assert (result.dataset, result.metric, result.seeds, result.resamples) == ("toy", "accuracy", (0, 1, 2), 200)
    assert result.conditions == (COMPLETE, "0.2 missing", "0.5 missing", AVERAGE)
    scores = {m: [[(run[r] == LABELS).mean() for r in RATES] for run in runs] for m, runs in made.items()}
    for method in made:
        table = np.array(scores[method])  # [seeds, rates]
        assert result.scores[method][COMPLETE].mean == pytest.approx(table[:, 0].mean())
        assert result.scores[method]["0.5 missing"].sd == pytest.approx(table[:, 2].std(ddof=1))
        assert result.scores[method][AVERAGE].mean == pytest.approx(table[:, 1:].mean())
    gap = np.mean(np.array(scores["ebr"]) - np.array(scores["vanilla"]), axis=0)
    assert result.difference("ebr", "vanilla", COMPLETE).estimate == pytest.approx(gap[0])
    with pytest.raises(InputError, match="no difference ebr − vanilla under"):
        result.difference("ebr", "vanilla", "0.9 missing")
    assert result.difference("vanilla", "ebr", COMPLETE).high == -result.difference("ebr", "vanilla", COMPLETE).low


def test_best_only_where_intervals_separate_from_every_other_method_and_seeds_are_several():
    clear = comparison_of({"vanilla": 0.6, "dropout": 0.6, "ebr": 0.9})
    best = {method: {s.best for s in by.values()} for method, by in clear.scores.items()}
    assert best == {"vanilla": {False}, "dropout": {False}, "ebr": {True}}
    tied = comparison_of({"vanilla": 0.3, "dropout": 0.8, "ebr": 0.8})
    assert not any(s.best for by in tied.scores.values() for s in by.values())
    one = {m: runs[:1] for m, runs in predictions({"vanilla": 0.6, "ebr": 0.9}).items()}
    alone = compare("toy", "accuracy", LABELS, one, seeds=[0], resamples=50, generator=np.random.default_rng(1))
    assert not any(s.best for by in alone.scores.values() for s in by.values())
    assert {d.p for d in alone.differences} == {None}
    two = {m: runs[:2] for m, runs in predictions({"vanilla": 0.3, "ebr": 0.95}).items()}
    pair = compare("toy", "accuracy", LABELS, two, seeds=[0, 1], generator=np.random.default_rng(1))
    assert (pair.resamples, pair.level) == (1000, 0.95)
    assert pair.scores["ebr"][COMPLETE].best
    assert all(d.p is not None for d in pair.differences)


def test_the_best_of_a_condition_is_the_best_under_it():
    made = predictions({"vanilla": 0.7, "ebr": 0.7})
    for runs, better in ((made["vanilla"], 0.0), (made["ebr"], 0.5)):
        for by_rate in runs:
            by_rate[better] = LABELS
    found = compare("toy", "accuracy", LABELS, made, seeds=[0, 1, 2], resamples=100, generator=np.random.default_rng(1))
    best = {m: [c for c, s in by.items() if s.best] for m, by in found.scores.items()}
    assert (best["vanilla"], best["ebr"][0]) == ([COMPLETE], "0.5 missing")


def test_the_level_of_a_comparison_reaches_every_interval_and_the_best():
    made = predictions({"vanilla": 0.7, "ebr": 0.75})
    made["ebr"] = made["ebr"][::-1]
    by_level = {
        level: compare(
            "toy",
            "accuracy",
            LABELS,
            made,
            seeds=[0, 1, 2],
            resamples=200,
            generator=np.random.default_rng(1),
            level=level,
        )
        for level in (0.1, 0.95, 0.99999)
    }
    assert [c.level for c in by_level.values()] == list(by_level)
    for kind in ("scores", "differences"):
        widths = []
        for found in by_level.values():
            intervals = (
                [s for by in found.scores.values() for s in by.values()] if kind == "scores" else found.differences
            )
            widths.append(np.array([i.high - i.low for i in intervals]))
        assert (widths[0] < widths[1]).all()
        assert (widths[1] < widths[2]).all()
    assert [c.scores["ebr"][COMPLETE].best for c in by_level.values()] == [
        True,
        by_level[0.95].scores["ebr"][COMPLETE].best,
        False,
    ]
    usual = compare("toy", "accuracy", LABELS, made, seeds=[0, 1, 2], resamples=200, generator=np.random.default_rng(1))
    assert usual == by_level[0.95]


def test_comparison_refuses_what_does_not_pair():
    made = predictions({"vanilla": 0.7, "ebr": 0.8})
    generator = np.random.default_rng(0)
    with pytest.raises(InputError, match="one run for each"):
        compare("toy", "accuracy", LABELS, made | {"ebr": made["ebr"][:2]}, seeds=[0, 1, 2], generator=generator)
    backwards = {m: [dict(reversed(run.items())) for run in some] for m, some in made.items()}
    with pytest.raises(InputError, match="with 0 first"):
        compare("toy", "accuracy", LABELS, backwards, seeds=[0, 1, 2], generator=generator)
    with pytest.raises(InputError, match="one run for each"):
        compare("toy", "accuracy", LABELS, made, seeds=[0, 1], generator=generator)
    del made["ebr"][0][0.5]
    with pytest.raises(InputError, match="same missing rates"):
        compare("toy", "accuracy", LABELS, made, seeds=[0, 1, 2], generator=generator)


# Trained runs


def test_reliance_and_curves_are_means_over_the_runs():
    runs = toy_runs("ebr")
    everything, scored = reliance(runs)
    assert everything == pytest.approx(0.91)
    assert scored["faint"] == pytest.approx(
        {"unimodal": 0.6, "leave_one_out": 0.9, "single_modality": 0.3, "shuffled": 0.89, "shapley": 0.01}
    )
    assert reliance_of_nothing() == {"unimodal": 0.0, "index": 0.0}, "a score and evidence like any other"
    epochs, means, spread = history(runs, "val_score")
    assert epochs == [1, 2, 3]
    assert means[2] == pytest.approx(0.81)
    assert spread[0] == pytest.approx(0.01)
    assert history(toy_runs("vanilla"), "psi_accuracy") == ([], [], [])
    runs[0]["history"][0]["val_score"] = 0.0  # a score like any other
    runs[1]["history"][1]["val_score"] = None  # not logged
    assert history(runs, "val_score")[:2] == ([1, 3], pytest.approx([(0.61 + 0.62) / 3, 0.81]))


def reliance_of_nothing() -> dict[str, float]:
    some = run("vanilla", 0)
    some["scores"]["reliance"]["faint"] = entry(0.0, 0.9, 0.0, 0.9, 0.0, "redundant")
    return {
        "unimodal": reliance([some])[1]["faint"]["unimodal"],
        "index": verdicts([some])[1].evidence["index"],
    }


def test_verdicts_are_those_of_most_runs():
    runs = [run("vanilla", 0), run("vanilla", 1, only=0.4), run("vanilla", 2, only=0.5, kind="under-used")]
    found = {v.modality: v for v in verdicts(runs)}
    assert {name: v.kind for name, v in found.items()} == {"strong": "relied on", "faint": "collapsed"}
    assert found["faint"].evidence == pytest.approx(
        {"alone": 0.6, "without": 0.9, "only": 0.4, "shuffled": 0.89, "index": 0.01, "runs": 3, "same": 2}
    )
    split = {v.modality: v.kind for v in verdicts(runs[1:])}
    assert split == {"strong": "relied on", "faint": "undecided"}


def test_tables_hold_the_numbers():
    by_method = {"vanilla": toy_runs("vanilla"), "EBR": toy_runs("ebr", fresh=0.7)}
    rows = [[c if isinstance(c, str) else c.text for c in row] for row in reliance_table(by_method).rows]
    assert rows[1] == ["faint", "0.600", *["0.890", "0.300", "0.010", "collapsed"] * 2]
    for kind, strong in (("collapsed", True), ("misleading", True), ("under-used", False)):
        line = reliance_table({"vanilla": toy_runs("vanilla", kind=kind)}).rows[1]
        assert line[-1] == Cell(kind, strong=strong)
    assert "the verdict of the diagnosis in most runs" in reliance_table(by_method).caption
    found = probe_table(by_method)
    assert found is not None
    assert "at chance" in found.caption
    assert [list(row) for row in found.rows] == [["EBR", "0.700 ± 0.000", "0.500"]]
    assert probe_table({"vanilla": toy_runs("vanilla")}) is None
    settings = settings_table({"vanilla": {"lr": 0, "ebr": None}, "EBR": {"lr": 0.1, "ebr": {"reversal": False}}})
    assert [[row[0].text, *row[1:]] for row in settings.rows] == [
        ["lr", "0", "0.1"], ["ebr", "–", "–"], ["ebr.reversal", "–", "False"]
    ]  # fmt: skip
    assert settings.caption.startswith("A dash stands where")


def test_a_run_says_whether_its_adversary_changed_anything():
    assert [without_effect(run("ebr", 0, label=label)) for label in ("without-effect", None)] == [True, False]


def test_chance_is_what_label_frequencies_give():
    assert chance_score("accuracy", [0, 0, 0, 1]) == 0.75
    assert chance_score("auroc", [0, 0, 0, 1]) == 0.5
    assert chance_score("auprc", [0, 0, 0, 1]) == 0.25
    assert [chance_score(metric, [0.0, 2.0]) for metric in ("concordance", "r2")] == [0.5, 0.0]


# The page


@pytest.fixture(scope="module")
def full_page() -> str:
    comparison = comparison_of({"vanilla": 0.7, "ebr": 0.8})
    runs = {"vanilla": toy_runs("vanilla"), "EBR": toy_runs("ebr")}
    drawings = [draw_rates(comparison, {"vanilla": "vanilla", "ebr": "EBR"})]
    drawings += [draw_reliance(some, title, 0.25) for title, some in runs.items()]
    drawings.append(draw_adversary(runs["EBR"], "EBR", 0.5))
    report = Report("Toy", "A **lead**.", "made by a test")
    blocks = [Panels([d.figure() for d in drawings]), reliance_table(runs), probe_table(runs)]
    return report.add_section(Section("What the runs show", blocks)).html()


def test_page_nests_and_asks_for_nothing(full_page):
    outline = Outline(full_page)
    assert outline.open == []
    for tag, attributes in outline.tags:
        assert tag not in ("script", "link", "img", "iframe", "object"), tag
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith("#"), (tag, target)
    assert not re.search(r"url\((?!#)", full_page)
    assert "@import" not in full_page
    policy = next(a["content"] for t, a in outline.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_every_identifier_is_unique_and_every_local_link_resolves(full_page):
    tags = Outline(full_page).tags
    identifiers = [a["id"] for _, a in tags if a.get("id")]
    assert len(identifiers) == len(set(identifiers))
    targets = {(a.get("href") or a.get("xlink:href") or "")[1:] for _, a in tags} - {""}
    targets |= set(re.findall(r"url\(#([^)]+)\)", full_page))
    assert targets
    assert targets <= set(identifiers)


def test_every_drawing_has_an_alternative_text_with_numbers(full_page):
    drawings = [a for tag, a in Outline(full_page).tags if tag == "svg"]
    assert len(drawings) == 4
    assert all(re.search(r"\d\.\d", a["aria-label"]) for a in drawings)
    assert all(a["role"] == "img" for a in drawings)


def test_text_is_escaped_but_keeps_its_two_marks():
    hostile = "<script>alert(1)</script> **b** `c<d`"
    blocks = [
        Text(hostile),
        Callout(hostile, "warning"),
        Table(["<i>", "n"], [[Cell(hostile, note=hostile), "1"]], hostile),
        Facts({hostile: hostile}),
        Details(hostile, [Text(hostile)]),
        Panels([Figure("<svg viewBox='0 0 1 1'></svg>", 'alt "quoted" <x>')], hostile),
    ]
    page = Report(hostile, hostile, hostile).add_section(Section(hostile, blocks)).html()
    assert "<script>" not in page
    assert "<strong>b</strong>" in page
    assert "<code>c&lt;d</code>" in page
    assert 'aria-label="alt &quot;quoted&quot; &lt;x&gt;"' in page
    assert Outline(page).open == []


def test_sections_of_one_name_get_anchors_of_their_own():
    report = Report("t")
    for _ in range(3):
        report.add_section(Section("Same", [Text("x")]))
    page = report.html()
    assert re.findall(r'<section id="([^"]+)"', page) == ["same", "same-2", "same-3"]
    assert re.findall(r'<a href="#([^"]+)"', page) == ["same", "same-2", "same-3"]


def test_a_table_row_of_wrong_length_is_refused():
    with pytest.raises(ValueError, match="2 cells for 1 columns"):
        Table(["a"], [["1", "2"]])


def test_saving_replaces_the_file_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "new" / "report.html"
    Report("first").save(target)
    assert "first" in target.read_text(encoding="utf-8")
    broken = Report("second").add_section(Section("s", [object()]))  # type: ignore[list-item]
    with pytest.raises(TypeError, match="got object"):
        broken.save(target)
    assert "first" in target.read_text(encoding="utf-8")
    assert [p.name for p in target.parent.iterdir()] == ["report.html"]


# Drawings


def test_drawing_follows_the_colours_of_the_page_and_is_reproducible():
    def make() -> Figure:
        line = Line([0, 1], [0.2, 0.4], [0.1, 0.1])
        return lines("t", {"a": line, "b": line}, x_label="x", y_label="y", alt="words").figure()

    figure = make()
    assert figure.svg == make().svg
    assert not [colour for colour in VARIABLES if colour in figure.svg]
    assert "var(--series-1)" in figure.svg
    assert "var(--series-2)" in figure.svg
    assert ">words<" not in figure.svg
    assert "<text" in figure.svg
    assert not re.search(r"<svg [^>]*\b(width|height)=", figure.svg)


def test_drawings_describe_themselves_with_the_plotted_numbers(tmp_path: Path):
    comparison = comparison_of({"vanilla": 0.7, "dropout": 0.72, "ebr": 0.8})
    rates = draw_rates(comparison, {"vanilla": "vanilla", "ebr": "EBR"})
    (axes,) = rates.canvas.axes
    assert words(rates) == (
        "toy: score against missing rate",
        "nominal missing rate",
        "accuracy",
        "Band: s.d. over seeds.",
    )
    assert {tuple(line.get_xdata()) for line in axes.get_lines()} == {RATES}
    plotted = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    expected = [comparison.scores["ebr"][c].mean for c in (COMPLETE, "0.2 missing", "0.5 missing")]
    assert plotted["EBR"] == expected
    assert f"{expected[0]:.3f} to {expected[-1]:.3f}" in rates.alt
    for method, band in zip(("vanilla", "ebr"), axes.collections, strict=True):  # mean ± s.d.
        shown = [comparison.scores[method][c] for c in (COMPLETE, "0.2 missing", "0.5 missing")]
        box = band.get_paths()[0].get_extents()
        ends = min(s.mean - s.sd for s in shown), max(s.mean + s.sd for s in shown)
        assert (box.y0, box.y1) == pytest.approx(ends)
    reliance_of = draw_reliance(toy_runs("vanilla"), "vanilla", 0.25)
    heights, levels = drawn(reliance_of)
    assert heights == {
        "unimodal": [0.88, 0.6], "this one shuffled": [0.4, 0.89], "only this one": [0.85, 0.3]
    }  # fmt: skip
    assert levels == {"all modalities": [0.91] * 2, "chance": [0.25] * 2}
    assert "faint unimodal 0.600, shuffled 0.890, only this one 0.300" in reliance_of.alt
    assert words(reliance_of) == ("toy, vanilla: reliance on each modality", "", "accuracy", "")
    reliance_of.save_png(tmp_path / "deep" / "r.png")
    assert (tmp_path / "deep" / "r.png").read_bytes().startswith(b"\x89PNG")


def drawn(drawing) -> tuple[dict, dict]:
    """Heights of bars and values of lines by their names in the legend."""
    (axes,) = drawing.canvas.axes
    bars = {c.get_label(): pytest.approx([bar.get_height() for bar in c]) for c in axes.containers}
    return bars, {line.get_label(): pytest.approx(list(line.get_ydata())) for line in axes.get_lines()}


def words(drawing) -> tuple[str, str, str, str]:
    """Title, names of both axes, caption."""
    (axes,) = drawing.canvas.axes
    return axes.get_title("left"), axes.get_xlabel(), axes.get_ylabel(), drawing.caption


def colours(drawing) -> list[str]:
    """Of the bars of each kind, or of the lines; not of the levels, which are black."""
    (axes,) = drawing.canvas.axes
    found = [c[0].get_facecolor() for c in axes.containers] or [line.get_color() for line in axes.get_lines()]
    return [c for c in map(to_hex, found) if c != INK]


def test_a_repair_shows_what_a_modality_alone_gave_before_and_after_it():
    before, after = toy_runs("vanilla"), toy_runs("ebr", only=0.55)
    for results in after:
        results["scores"]["reliance"]["strong"] = entry(0.7, 0.5, 0.8, 0.4, 0.6, "relied on")
    found = draw_repair(before, after, ("as it was", "repaired"), 0.25)
    alone = {"a model of this modality alone": [0.88, 0.6], "as it was": [0.85, 0.3], "repaired": [0.8, 0.55]}
    assert drawn(found) == (alone, {"chance": [0.25] * 2})
    assert "strong 0.880, 0.850, 0.800; faint 0.600, 0.300, 0.550" in found.alt
    assert words(found) == (
        "toy: what is left when one modality is all there is", "", "test accuracy", "Mean over 3 trainings each."
    )  # fmt: skip
    methods = colours(draw_rates(comparison_of(dict.fromkeys("abcde", 0.7)), {m: m for m in "abcde"}))
    assert len(methods) == 5
    assert [c in methods for c in colours(found)] == [False, True, True], "of the modality, and of two methods"
    assert len(set(colours(found))) == 3
    for other in (draw_adversary(toy_runs("ebr"), "EBR", 0.5), draw_reliance(before, "vanilla", 0.25)):
        assert not set(colours(other)) & set(methods), "kinds of scores are no methods"
        assert len(set(colours(other))) == len(colours(other))
    assert draw_repair(before[:1], after[:1], ("a", "b"), 0.25).caption == "One training each."


def test_an_adversary_is_drawn_between_chance_and_invariance():
    found = draw_adversary(toy_runs("ebr"), "EBR", 1 / 3)
    levels = {"ψ at chance": [1 / 3] * 2, "L_md at invariance": [1.0] * 2}
    assert drawn(found)[1] == {"L_md / H": [0.2] * 3, "accuracy of ψ": [0.95] * 3} | levels
    assert words(found)[:3] == ("toy, EBR: adversarial training", "epoch", "share")
    assert "hold L_md / H at 1 and the accuracy of ψ at chance" in found.caption
    assert found.canvas.axes[0].get_ylim() == (0.0, 2.0)
    assert len(found.canvas.axes[0].collections) == 2, "a band for each line"
    assert {line.get_marker() for line in found.canvas.axes[0].get_lines()} <= {"", "None"}
    assert "L_md / H ends at 0.20; accuracy of ψ ends at 0.95" in found.alt
