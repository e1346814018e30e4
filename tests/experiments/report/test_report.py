"""The report: what it says follows from the numbers, the page stands alone, and blocks render safely."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mmc_fast.diagnose.figures import VARIABLES, Line, lines
from mmc_fast.errors import InputError
from mmc_fast.experiments.report import Callout, Cell, Details, Facts, Figure, Panels, Report, Section, Table, Text
from mmc_fast.experiments.report.comparison import AVERAGE, COMPLETE, Comparison, compare, table_rows
from mmc_fast.experiments.report.drawings import draw_missing_rates, draw_reliance
from mmc_fast.experiments.report.runs import group_runs
from mmc_fast.experiments.report.sections import (
    chance_score,
    game_section,
    results_section,
    settings_section,
    summary_section,
)
from mmc_fast.experiments.report.words import (
    collapse_summary,
    collapse_words,
    comparison_words,
    game_words,
    reliance_verdicts,
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


def run(
    method: str, seed: int, *, only: float = 0.3, fresh: float = 0.9, label: str | None = None, faint: str = "collapsed"
) -> dict:
    """A results object of the documented layout."""
    game = {
        "fresh_discriminator": {"balanced_accuracy": fresh, "chance": 0.5},
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
        "game": game if method == "ebr" else None,
        "scores": {
            "complete": 0.9 + 0.01 * seed,
            "missing": [{"rate": r, "realised": [r, r / 2], "score": 0.9 - r} for r in RATES[1:]],
            "reliance": {
                "strong": modality("relied on", alone=0.88, without=0.5, only=0.85, shuffled=0.45, index=1.4),
                "faint": modality(faint, alone=0.6, without=0.9, only=only, shuffled=0.91, index=0.02),
            },
        },
    }


def toy_runs(**changes) -> list[dict]:
    return [run(method, seed, **changes) for method in ("vanilla", "dropout", "ebr") for seed in (2, 0, 1)]


def modality(kind: str, **scores: float) -> dict:
    evidence = scores | {"all": 0.91, "chance": 0.25, "ability": scores["alone"] - 0.25, "total_effect": 0.2}
    return scores | {"verdict": kind, "evidence": evidence}


# What is said


def test_a_model_at_chance_gives_no_verdict():
    runs = [run("vanilla", 0, faint="undecided")]
    runs[0]["scores"]["reliance"]["strong"]["verdict"] = "undecided"
    assert "cannot be judged" in collapse_summary(group_runs(runs)[0], "vanilla")


def test_collapse_is_named_with_its_numbers_and_only_when_it_is_there():
    (collapsed,) = group_runs(toy_runs())
    text = collapse_summary(collapsed, "vanilla")
    assert "faint has collapsed" in text
    assert "strong" not in text
    for number in (
        "reaches 0.600",
        "chance 0.250",
        "scores 0.910",
        "0.910 with the faint of other samples",
        "3 of 3 runs",
    ):
        assert number in text
    (healthy,) = group_runs(toy_runs(faint="relied on"))
    assert "no modality collapsed" in collapse_summary(healthy, "vanilla")


def test_the_verdict_of_a_method_is_that_of_most_runs():
    runs = toy_runs()
    for kind, expected, same in (("under-used", "collapsed", 2), ("uninformative", "undecided", 1)):
        runs[0 if same == 2 else 1]["scores"]["reliance"]["faint"]["verdict"] = kind
        verdict = {v.modality: v for v in reliance_verdicts(group_runs(runs)[0], "vanilla")}["faint"]
        assert (verdict.kind, verdict.evidence["same"], verdict.evidence["runs"]) == (expected, same, 3)
    (grouped,) = group_runs(toy_runs())
    for entry in toy_runs(faint="relied on")[3:6]:
        grouped.methods["dropout"][entry["seed"]]["scores"]["reliance"] = entry["scores"]["reliance"]
    (words,) = collapse_words(grouped, "vanilla", "dropout")
    assert words.endswith("Trained with modality dropout it is relied on.")


def test_words_on_ebr_follow_the_sign_of_the_difference():
    better = comparison_words(comparison_of({"vanilla": 0.6, "ebr": 0.9}), "ebr")
    worse = comparison_words(comparison_of({"vanilla": 0.9, "ebr": 0.6}), "ebr")
    same = comparison_words(comparison_of({"vanilla": 0.8, "ebr": 0.8}), "ebr")
    assert all("better than vanilla (+0." in t and "worse" not in t for t in better)
    assert all("worse than vanilla (−0." in t and "better" not in t for t in worse)
    assert all("no difference that the data can show from vanilla" in t for t in same)
    assert "on average over the missing rates" in better[0]
    assert "on complete data" in better[1]


def test_words_on_the_game_follow_the_fresh_discriminator():
    def words(fresh: float, label: str | None = None) -> str:
        return game_words(group_runs([run("ebr", s, fresh=fresh, label=label) for s in (0, 1)])[0], "ebr")

    assert "close to modality-invariant" in words(0.52)
    assert "partly" in words(0.65)
    assert "still tell their modality" in words(0.97)
    assert "relative distance of 0.125" in words(0.97)
    assert "inactive" not in words(0.97)
    assert "In 2 of 2 runs λ changed nothing" in words(0.97, label="inactive")


# Comparison and its table


def test_comparison_means_and_differences_are_those_of_the_predictions():
    made = predictions({"vanilla": 0.7, "ebr": 0.8})
    result = comparison_of({"vanilla": 0.7, "ebr": 0.8})
    scores = {m: [[(run[r] == LABELS).mean() for r in RATES] for run in runs] for m, runs in made.items()}
    for method in made:
        table = np.array(scores[method])  # [seeds, rates]
        assert result.scores[method][COMPLETE].mean == pytest.approx(table[:, 0].mean())
        assert result.scores[method]["0.5 missing"].sd == pytest.approx(table[:, 2].std(ddof=1))
        assert result.scores[method][AVERAGE].mean == pytest.approx(table[:, 1:].mean())
    gap = np.mean(np.array(scores["ebr"]) - np.array(scores["vanilla"]), axis=0)
    assert result.difference("ebr", "vanilla", COMPLETE).estimate == pytest.approx(gap[0])
    assert result.difference("vanilla", "ebr", COMPLETE).high == -result.difference("ebr", "vanilla", COMPLETE).low


def test_bold_only_where_intervals_separate_from_every_other_method():
    clear = comparison_of({"vanilla": 0.6, "dropout": 0.6, "ebr": 0.9})
    assert [[c.strong for c in row] for row in table_rows(clear, {})] == [
        [False] * 5,
        [False] * 5,
        [False] + [True] * 4,
    ]
    tied = comparison_of({"vanilla": 0.3, "dropout": 0.8, "ebr": 0.8})
    assert not any(cell.strong for row in table_rows(tied, {}) for cell in row)


def test_comparison_survives_json():
    result = comparison_of({"vanilla": 0.7, "ebr": 0.8})
    assert Comparison.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_comparison_refuses_what_does_not_pair():
    made = predictions({"vanilla": 0.7, "ebr": 0.8})
    generator = np.random.default_rng(0)
    with pytest.raises(InputError, match="one run for each"):
        compare("toy", "accuracy", LABELS, made | {"ebr": made["ebr"][:2]}, seeds=[0, 1, 2], generator=generator)
    del made["ebr"][0][0.5]
    with pytest.raises(InputError, match="same missing rates"):
        compare("toy", "accuracy", LABELS, made, seeds=[0, 1, 2], generator=generator)
    with pytest.raises(InputError, match="different seeds"):
        group_runs([run("vanilla", 0), run("ebr", 1)])
    with pytest.raises(InputError, match="no finished runs"):
        group_runs([])


def test_runs_are_grouped_in_seed_order_and_name_inactive_ones():
    runs = toy_runs()
    runs[-1]["label"] = "inactive"
    (grouped,) = group_runs(runs)
    assert grouped.seeds == [0, 1, 2]
    assert grouped.name("vanilla") == "vanilla"
    assert grouped.name("ebr") == "EBR (inactive in 1 of 3)"
    assert grouped.complete("ebr") == pytest.approx(0.91)
    epochs, means, spread = grouped.history("ebr", "val_score")
    assert epochs == [1, 2, 3]
    assert means[2] == pytest.approx(0.81)
    assert spread[0] == pytest.approx(0.01)
    assert grouped.history("vanilla", "psi_accuracy") == ([], [], [])


def test_chance_is_what_label_frequencies_give():
    assert chance_score("accuracy", [0, 0, 0, 1]) == 0.75
    assert chance_score("auroc", [0, 0, 0, 1]) == 0.5
    assert chance_score("auprc", [0, 0, 0, 1]) == 0.25


# The page


@pytest.fixture(scope="module")
def full_page() -> str:
    (runs,) = group_runs(toy_runs())
    comparison = comparison_of({"vanilla": 0.7, "dropout": 0.72, "ebr": 0.8})
    report = Report("Toy", "A **lead**.", "made by a test")
    report.add_section(summary_section([runs], [comparison], base="vanilla", focus=["ebr"]))
    report.add_section(results_section(runs, comparison, 0.25, base="vanilla", focus=["ebr"], masked="dropout"))
    report.add_section(game_section([runs], focus=["ebr"]))
    configs = {m: runs.methods[m][0]["config"] for m in runs.methods}
    return report.add_section(settings_section({"seeds": "0, 1, 2"}, configs)).html()


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
    assert len(drawings) == 7
    assert all(re.search(r"\d\.\d", a["aria-label"]) for a in drawings)
    assert all(a["role"] == "img" for a in drawings)


def test_page_holds_the_numbers_and_the_settings(full_page):
    for part in ("0.910", "realised", "ebr.reversal", "Bold: the paired", "faint", "relative distance"):
        assert part.lower() in full_page.lower(), part


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
    (runs,) = group_runs(toy_runs())
    comparison = comparison_of({"vanilla": 0.7, "dropout": 0.72, "ebr": 0.8})
    rates = draw_missing_rates(runs, comparison)
    (axes,) = rates.canvas.axes
    plotted = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    expected = [comparison.scores["ebr"][c].mean for c in (COMPLETE, "0.2 missing", "0.5 missing")]
    assert plotted["EBR"] == expected
    assert f"{expected[0]:.3f} to {expected[-1]:.3f}" in rates.alt
    reliance = draw_reliance(runs, "vanilla", 0.25)
    heights = [round(bar.get_height(), 3) for bar in reliance.canvas.axes[0].patches]
    assert heights == [0.88, 0.6, 0.45, 0.91, 0.85, 0.3]
    assert "faint alone 0.600, shuffled 0.910, only 0.300" in reliance.alt
    reliance.save_png(tmp_path / "deep" / "r.png")
    assert (tmp_path / "deep" / "r.png").read_bytes().startswith(b"\x89PNG")
