"""Findings of the comparison: the threshold, paired tests, Holm's correction, every form of output."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

from mmc_fast import __version__
from mmc_fast.cli.compare import print_comparison
from mmc_fast.diagnose.document import Callout, Cell, Report, Text, signed
from mmc_fast.diagnose.statistics import holm
from mmc_fast.errors import InputError
from mmc_fast.experiments.compare import findings as findings_module
from mmc_fast.experiments.compare import output
from mmc_fast.experiments.compare.configs import MethodConfig
from mmc_fast.experiments.compare.findings import UNDER_PERFORMING, Findings, find
from mmc_fast.experiments.compare.grid import Finished, Run
from mmc_fast.experiments.compare.output import READING, footnotes, markdown, score_rows, write_outputs
from mmc_fast.experiments.compare.runs import score
from mmc_fast.experiments.jobs import Job, Result, own_folder
from mmc_fast.experiments.manifest import Manifest
from mmc_fast.experiments.report.comparison import AVERAGE, COMPLETE, Score
from mmc_fast.experiments.report.drawings import draw_rates, metric_name
from mmc_fast.experiments.tasks import Classification

METHODS = [MethodConfig.parse(n, {"method": n}) for n in ("vanilla", "dropout", "muse", "shaspec")]
QUALITY = {"vanilla": 1.5, "dropout": 2.5, "muse": 1.52, "shaspec": 0.4}


def fabricated(seed: int, seeds: int = 4, methods=METHODS, selected=None, data: str = "made") -> Finished:
    """Runs whose predictions are made, not trained: signal of the method's quality plus noise."""
    g = np.random.default_rng(seed)
    labels = np.arange(600) % 2
    runs = []
    for s in range(seeds):
        shared = g.normal(size=600)
        for method in methods:
            arrays, found = {"labels": labels, "index": labels}, {}
            for name, share in (("complete", 1.0), ("missing_0.3", 0.8), ("missing_0.6", 0.5)):
                logit = share * QUALITY[method.name] * (labels - 0.5) + shared + 0.1 * g.normal(size=600)
                p = 1 / (1 + np.exp(-logit))
                arrays[name] = np.stack([1 - p, p], 1).astype(np.float32)
                found[name] = Classification.of(2).scores(torch.tensor(arrays[name]), torch.tensor(labels))
            values = {"metric": "auroc", "batch_rows": None, "scores": found}
            values |= {"realised": {"missing_0.3": [0.3], "missing_0.6": [0.5]}}
            job = Job(f"runs/{data}/{method.name}-{s}", score, {})
            runs.append(Run(method.name, data, s, job, Result({}, values, arrays, None, 1.0 + s, 1)))
    return Finished({(m.name, data): selected or {} for m in methods}, runs)


def test_threshold_tests_and_family(seed):
    finished = fabricated(seed)
    (found,) = find(finished, METHODS, resamples=200)
    vanilla = found.main.scores["vanilla"][COMPLETE]
    for name in ("muse", "shaspec"):
        below = found.main.scores[name][COMPLETE].mean < vanilla.mean - vanilla.se
        assert found.methods[name].threshold == (UNDER_PERFORMING if below else "passed")
    assert found.methods["shaspec"].threshold == UNDER_PERFORMING
    assert "†" in found.methods["shaspec"].marked
    assert found.methods["dropout"].threshold == ""
    assert len(found.tests) == 2 * 2 * 3  # metrics x conditions x methods against vanilla
    assert {t.family for t in found.tests} == {12}
    assert [t.p_holm for t in found.tests] == pytest.approx(holm([t.p for t in found.tests]))
    test = next(t for t in found.tests if (t.method, t.metric, t.condition) == ("dropout", "auroc", AVERAGE))
    by_seed = {
        method: [
            np.mean([run.result.values["scores"][f"missing_{r}"]["score"] for r in ("0.3", "0.6")])
            for run in finished.runs
            if run.method == method
        ]
        for method in ("dropout", "vanilla")
    }
    difference = np.subtract(by_seed["dropout"], by_seed["vanilla"])
    assert test.difference == pytest.approx(difference.mean(), abs=1e-9)
    assert test.p_wilcoxon == pytest.approx(stats.wilcoxon(difference).pvalue)
    assert test.pairs == 4
    assert test.p_wilcoxon >= 2 / 2**4
    assert test.low < test.difference < test.high


def test_holm_is_over_all_tests_of_all_data_sets(seed):
    parts = [fabricated(seed + i, data=name) for i, name in enumerate(("one", "two"))]
    both = Finished(parts[0].selected | parts[1].selected, parts[0].runs + parts[1].runs)
    found = find(both, METHODS, resamples=50)
    alone = [find(part, METHODS, resamples=50)[0] for part in parts]
    assert [f.data for f in found] == ["one", "two"]
    tests = [t for f in found for t in f.tests]
    assert [t.p for t in tests] == [t.p for f in alone for t in f.tests]
    assert {t.family for t in tests} == {24}
    raw = np.array([t.p for t in tests])
    order = np.argsort(raw)
    adjusted = np.minimum(np.maximum.accumulate(raw[order] * np.arange(24, 0, -1)), 1)
    np.testing.assert_allclose(np.array([t.p_holm for t in tests])[order], adjusted)


def test_each_test_is_of_its_own_metric_and_condition(seed):
    finished = fabricated(seed, seeds=9)
    (found,) = find(finished, METHODS, reference="muse", resamples=20)
    assert {t.reference for t in found.tests} == {"muse"}
    for t in found.tests:
        names = ["complete"] if t.condition == COMPLETE else ["missing_0.3", "missing_0.6"]
        key = {"auroc": "score", "auprc": "auprc"}[t.metric]
        values = {
            m: [np.mean([r.result.values["scores"][n][key] for n in names]) for r in finished.runs if r.method == m]
            for m in (t.method, "muse")
        }
        difference = np.subtract(values[t.method], values["muse"])
        assert t.difference == pytest.approx(difference.mean(), abs=1e-9)
        assert t.p_wilcoxon == pytest.approx(stats.wilcoxon(difference).pvalue)


def test_a_seed_without_a_difference_and_another_order_of_rates_and_names(seed):
    """The method is what makes a config vanilla, not its name."""
    methods = [METHODS[1], MethodConfig.parse("plain", {"method": "vanilla"}), METHODS[2]]
    finished = fabricated(seed, seeds=3)
    names = {"vanilla": "plain"}
    runs = [r._replace(method=names.get(r.method, r.method)) for r in finished.runs if r.method != "shaspec"]
    selected = {(names.get(m, m), data): s for (m, data), s in finished.selected.items()}
    for run in runs:
        some = run.result.arrays
        ordered = {name: some.pop(name) for name in ("missing_0.6", "missing_0.3")}
        some.update(ordered)
    same = next(r.result for r in runs if (r.method, r.seed) == ("plain", 1))
    runs = [r._replace(result=same) if (r.method, r.seed) == ("dropout", 1) else r for r in runs]
    (found,) = find(Finished(selected, runs), methods, resamples=50)
    assert found.main.conditions == (COMPLETE, "0.3 missing", "0.6 missing", AVERAGE)
    assert {t.reference for t in found.tests} == {"plain"}
    assert found.methods["muse"].threshold in ("passed", UNDER_PERFORMING)
    test = next(t for t in found.tests if (t.method, t.metric, t.condition) == ("dropout", "auroc", COMPLETE))
    by_seed = {
        m: [r.result.values["scores"]["complete"]["score"] for r in runs if r.method == m] for m in ("dropout", "plain")
    }
    assert test.p_wilcoxon == stats.wilcoxon(np.subtract(by_seed["dropout"], by_seed["plain"])).pvalue


def test_the_threshold_is_one_standard_error(seed):
    """Of vanilla on complete data, its end included; the standard deviation is several times larger."""
    finished = fabricated(seed, seeds=1)
    bound = Score(0.8, 0.06, 0.7, 0.9, False, 0.02)
    runs = [run for run in finished.runs if run.method == "muse"]
    for mean, expected in ((0.79, "passed"), (0.8 - 0.02, "passed"), (0.7799, UNDER_PERFORMING)):
        scores = {COMPLETE: Score(mean, 0.06, 0.7, 0.9, False, 0.02), AVERAGE: Score(0.0, 0.0, 0.0, 0.0, False, 0.0)}
        assert findings_module._facts(METHODS[2], runs, finished, scores, bound).threshold == expected
    assert findings_module._facts(METHODS[2], runs, finished, None, bound).threshold == "not judged"


def test_the_threshold_is_judged_on_the_main_metric(seed, monkeypatch):
    def compare(data, metric, *given, **options):
        found = original(data, metric, *given, **options)
        upside_down = {
            name: found.scores[other] for name, other in zip(found.scores, reversed(found.scores), strict=True)
        }
        return found if metric == "auroc" else replace(found, scores=upside_down)

    original, finished = findings_module.compare, fabricated(seed, seeds=2)
    (plain,) = find(finished, METHODS, resamples=20)
    monkeypatch.setattr(findings_module, "compare", compare)
    (found,) = find(finished, METHODS, resamples=20)
    judged = [{name: m.threshold for name, m in f.methods.items()} for f in (plain, found)]
    assert judged[0] == judged[1]
    assert {judged[0]["muse"], judged[0]["shaspec"]} == {"passed", UNDER_PERFORMING}


def test_facts_of_the_runs(seed):
    """Mean time, the seeds that diverged or changed nothing, rows predicted together, and the settings that were used."""
    method = MethodConfig.parse("muse", {"method": "muse", "settings": {"lr": 0.2, "options": {"classes": 0.5}}})
    finished = fabricated(seed, methods=[METHODS[2]], selected={"lr": 0.1, "epochs": 7, "options": {"agreement": 0.2}})
    runs = [run._replace(seed=run.seed + 5) for run in finished.runs]
    runs[1] = runs[1]._replace(result=replace(runs[1].result, failed="diverged", values={}))
    runs[2].result.values.update(without_effect=True, batch_rows=64)
    runs[0].result.values["batch_rows"] = 64
    facts = findings_module._facts(method, runs, finished, None, None)
    assert (facts.diverged, facts.without_effect, facts.batch_rows, facts.seconds) == ((6,), (7,), 64, 2.5)
    assert (facts.name, facts.method, facts.title) == ("muse", "muse", method.title)
    assert facts.source == method.plugin.source != facts.title
    assert facts.settings == {"lr": 0.2, "epochs": 7, "options": {"agreement": 0.2, "classes": 0.5}}
    assert list(facts.notes) == ["†", "‡", "§", "¶"]


def test_vanilla_is_the_reference_wherever_it_stands_and_without_it_nothing_is_tested(seed):
    methods = [METHODS[1], METHODS[0], METHODS[2]]
    finished = fabricated(seed, methods=methods)
    assert {t.reference for t in find(finished, methods, resamples=20)[0].tests} == {"vanilla"}
    failed = [
        run._replace(result=replace(run.result, failed="diverged", values={})) if run.method == "vanilla" else run
        for run in finished.runs
    ]
    (found,) = find(finished._replace(runs=failed), methods, resamples=20)
    assert (list(found.tests), list(found.main.scores)) == ([], ["dropout", "muse"])
    assert found.methods["vanilla"].diverged == (0, 1, 2, 3)


def test_a_drawing_holds_at_most_eight_methods(seed, monkeypatch):
    (found,) = find(fabricated(seed, seeds=1), METHODS, resamples=20)
    monkeypatch.setattr(output, "draw_rates", lambda comparison, titles: list(titles))
    for count in (8, 9, 17):
        names = [f"m{n}" for n in range(count)]
        main = replace(found.main, scores=dict.fromkeys(names))
        methods = dict.fromkeys(names, found.methods["muse"])
        drawn = output._rate_drawings(replace(found, comparisons={"auroc": main}, methods=methods))
        assert [n for some in drawn.values() for n in some] == names
        assert max(map(len, drawn.values())) == 8
        numbered = [f"missing-rates-{n}" for n in range(1, len(drawn) + 1)]
        assert list(drawn) == (["missing-rates"] if count == 8 else numbered)


def test_tables_have_a_head_and_as_many_fields_in_every_line(seed):
    assert output.csv_text(["a", "b", "c"], [[1], [None, "x", 0]]) == "a,b,c\n1,,\n,x,0\n"
    assert output.markdown_table(["m", "x", "y"], [["*a*", Cell("1", strong=True), "2"]]).splitlines() == [
        "| m | x | y |", "| ---|---:|---: |", r"| \*a\* | **1** | 2 |"
    ]  # fmt: skip
    text = markdown(find(fabricated(seed, seeds=1), METHODS, resamples=20), "Some title")
    assert text.startswith("# Some title\n\n")
    assert "\n## made\n" in text


def test_bold_is_by_the_adjusted_p_value(seed):
    (found,) = find(fabricated(seed), METHODS, resamples=50)
    for p, p_holm, bold in ((0.001, 0.06, False), (0.001, 0.05, False), (0.001, 0.049, True)):
        tests = [replace(t, p=p, p_holm=p_holm, p_wilcoxon=0.2) for t in found.tests]
        rows = output.tests_table(replace(found, tests=tests))[1]
        assert {row[1].strong for row in rows} == {bold}
        assert {tuple(row[3:]) for row in rows} == {("0.001", f"{p_holm:.3f}", "0.200")}


def test_without_vanilla_the_first_method_is_the_reference(seed):
    methods = METHODS[1:]
    finished = fabricated(seed, seeds=2, methods=methods)
    (found,) = find(finished, methods, resamples=50)
    assert found.methods["muse"].threshold == "not judged"
    assert {t.reference for t in found.tests} == {"dropout"}
    with pytest.raises(InputError, match="none of the methods"):
        find(finished, methods, reference="vanilla")


def test_one_seed_gives_no_p_value_and_nothing_bold(tmp_path, seed, capsys):
    """The methods are so far apart that two seeds would make the best one bold."""
    for seeds in (1, 2):
        folder = tmp_path / str(seeds)
        folder.mkdir()
        findings = find(fabricated(seed, seeds=seeds), METHODS, resamples=200)
        write_outputs(findings, folder, {"machine": "made"}, {"kind": "comparison"})
        print_comparison(Console(width=200), findings, folder)
        printed, text = capsys.readouterr().out, markdown(findings)
        stored = json.loads((folder / "results.json").read_text())["data_sets"][0]
        with open(folder / "results.csv") as file:
            lines = list(csv.DictReader(file))
        tests = stored["tests"]
        assert len(tests) == 12
        p_values = [t[name] for t in tests for name in ("p", "p_holm", "p_wilcoxon")]
        p_values += [d["p"] for c in stored["comparisons"].values() for d in c["differences"]]
        p_values += [line[name] or None for line in lines for name in ("p", "p_holm", "p_wilcoxon")]
        bold = [s["best"] for c in stored["comparisons"].values() for row in c["scores"].values() for s in row.values()]
        page = (folder / "report.html").read_text()
        body = text.replace(READING, "")
        if seeds == 1:
            assert set(p_values) == {None}
            assert not any(bold)
            assert {t["family"] for t in tests} == {0}
            assert "**" not in body
            assert not re.search(r"\*\d|p \(|Holm", printed)
            assert "p (Holm)" not in page
            assert "one seed" in printed
        else:
            assert all(isinstance(t["p_holm"], float) for t in tests)
            assert "p (Holm)" in printed
            assert "p (Holm)" in page
            assert "Holm over 12 tests" in body


def test_all_outputs_say_the_same(tmp_path, seed):
    findings = find(fabricated(seed, selected={"lr": 0.1}), METHODS, resamples=100)
    write_outputs(findings, tmp_path, {"machine": "made"}, {"kind": "comparison"})
    stored = json.loads((tmp_path / "results.json").read_text())["data_sets"][0]
    with open(tmp_path / "results.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 * 2 * 4  # methods x metrics x conditions
    text, page = markdown(findings), (tmp_path / "report.html").read_text()
    for line in lines:
        score = stored["comparisons"][line["metric"]]["scores"][line["method"]][line["condition"]]
        for name in ("mean", "sd", "se", "low", "high"):
            assert float(line[name]) == score[name]
        assert line["best"] == ("1" if score["best"] else "")
        facts = stored["methods"][line["method"]]
        assert (line["plug_in"], line["threshold"], line["seeds"]) == (facts["method"], facts["threshold"], "4")
        same = ("metric", "condition", "method")
        for test in (t for t in stored["tests"] if [t[k] for k in same] == [line[k] for k in same]):
            for name in ("difference", "p", "p_holm", "p_wilcoxon"):
                assert float(line[name]) == test[name]
            interval = [float(line[f"difference_{end}"]) for end in ("low", "high")]
            assert interval == [test["low"], test["high"]]
            assert (line["reference"], line["pairs"]) == ("vanilla", "4")
        shown = f"{score['mean']:.3f} ± {score['sd']:.3f}"
        assert shown in text
        assert shown in page
        assert (f"**{shown}**" in text) == score["best"]
    low = [facts["title"] for facts in stored["methods"].values() if facts["threshold"] == UNDER_PERFORMING]
    assert f"† {UNDER_PERFORMING}: {', '.join(low)}." in text
    assert f"{UNDER_PERFORMING}</strong>: {', '.join(low)}." in page
    assert "Realised missing rates by modality: 0.3: 0.30; 0.6: 0.50." in text
    assert re.search(r"^Test .*, 4 seed\(s\):$", text, re.MULTILINE)
    assert (tmp_path / "figures" / "made-missing-rates.png").stat().st_size > 1000


class Kept(Report):
    """The page as blocks."""

    pages: ClassVar[list[Report]] = []

    def save(self, path):
        self.pages.append(self)
        return super().save(path)


def plain(rows) -> list[list[str]]:
    return [[c if isinstance(c, str) else c.text for c in row] for row in rows]


def two_sets(seed: int) -> list[Findings]:
    """Two data sets; of the first a method diverged with one seed, another predicts in batches and fell below vanilla."""
    parts = [fabricated(seed + i, seeds=3, data=name) for i, name in enumerate(("one", "two"))]
    runs = [r for part in parts for r in part.runs]
    for n, run in enumerate(runs):
        if (run.data, run.method, run.seed) == ("one", "dropout", 1):
            runs[n] = run._replace(result=replace(run.result, failed="diverged", values={}))
        if (run.data, run.method) == ("one", "shaspec"):
            run.result.values["batch_rows"] = 256
    return find(Finished(parts[0].selected | parts[1].selected, runs), METHODS, resamples=30)


def test_a_page_shows_each_data_set_with_its_tables_drawings_tests_and_settings(tmp_path, seed, monkeypatch):
    monkeypatch.setattr(output, "Report", Kept)
    Kept.pages.clear()
    findings = two_sets(seed)
    extra = draw_rates(findings[0].main, {"vanilla": "vanilla"})
    options = {"drawings": {"one": {"more": extra}}, "blocks": {"two": [Text("below")]}, "warning": "Look out."}
    write_outputs(findings, tmp_path, {"machine": "made"}, {"kind": "comparison"}, title="Some title", **options)
    (page,) = Kept.pages
    assert (page.title, page.lead) == (
        "Some title", "4 methods on 2 data set(s): the same encoders and budget for each."
    )  # fmt: skip
    assert __version__ in page.footer
    assert (tmp_path / "results.md").read_text() == markdown(findings, "Some title")
    assert [s.title for s in page.sections] == ["one", "two", "How to read this"]
    assert [type(b).__name__ for b in page.sections[2].blocks] == ["Text", "Facts"]
    assert (page.sections[2].blocks[0].text, page.sections[2].blocks[1].items) == (READING, {"machine": "made"})
    for f, section in zip(findings, page.sections, strict=False):
        blocks = list(section.blocks)
        if f.data == "one":
            assert blocks.pop(0) == Callout("Look out.", "warning"), "once, at the top"
        else:
            assert blocks.pop() == Text("below")
        low = [m.title for m in f.methods.values() if m.threshold == UNDER_PERFORMING]
        assert low
        assert blocks.pop(0) == Callout(f"**{UNDER_PERFORMING}**: {', '.join(low)}.", "warning")
        for metric in ("auroc", "auprc"):
            table = blocks.pop(0)
            assert list(table.columns) == ["method", *f.main.conditions]
            assert plain(table.rows) == plain(score_rows(f, metric))
            assert table.caption == f"Test {metric_name(metric)}, mean ± s.d. {footnotes(f)}"
        panels, tests, settings = blocks
        assert len(panels.figures) == (2 if f.data == "one" else 1)
        assert (tests.summary, settings.summary) == ("Tests against the reference", "Settings")
        assert plain(tests.blocks[0].rows) == plain(output.tests_table(f)[1])
        assert tests.blocks[0].caption == output.tests_title(f)
        assert list(settings.blocks[0].columns) == ["method", "selected", "source"]
        assert [list(row) for row in settings.blocks[0].rows] == [
            [m.title, "as declared", m.source] for m in f.methods.values()
        ]
    figures = {p.name for p in (tmp_path / "figures").iterdir()}
    assert figures == {"one-missing-rates.png", "one-more.png", "two-missing-rates.png"}
    story = ("A lead.", [Text("first")], extra)
    write_outputs(findings, tmp_path, {}, {}, opening=story, warning="Look out.")
    page = Kept.pages[1]
    assert (page.title, page.lead, page.sections[0].title) == ("Comparison of methods", "A lead.", "In one picture")
    assert list(page.sections[0].blocks) == [Callout("Look out.", "warning"), Text("first")]
    assert not isinstance(page.sections[1].blocks[0], Callout) or "Look out" not in page.sections[1].blocks[0].text
    assert (tmp_path / "figures" / "story.png").is_file()


def test_tables_of_a_data_set_on_which_a_method_diverged(seed):
    """A dash for each of its conditions, no test of it, and marks that say why."""
    one, two = two_sets(seed)
    lines = {line[0]: line[1:] for line in plain(score_rows(one, "auroc"))}
    assert list(lines) == [m.marked for m in one.methods.values()]
    assert lines["modality dropout §"] == ["–"] * 4
    assert {t.method for t in one.tests} == {"muse", "shaspec"}
    assert {t.method for t in two.tests} == {"dropout", "muse", "shaspec"}
    assert (
        output.tests_title(one)
        == f"Against the reference, 3 pairs of seeds, Holm over {len(one.tests) + len(two.tests)} tests"
    )
    assert "§ diverged with 1 seed(s): modality dropout" in footnotes(one)
    assert "‡ batch of 256: ShaSpec" in footnotes(one)
    headings, rows = output.tests_table(two)
    assert headings == ["difference", "estimate", "95 % interval", "p", "p (Holm)", "p (signed ranks)"]
    for t, row in zip(two.tests, plain(rows), strict=True):
        name = f"{two.methods[t.method].title} − vanilla, {metric_name(t.metric)}, {t.condition}"
        assert row[:3] == [name, signed(t.difference), f"{signed(t.low)} … {signed(t.high)}"]
        assert row[3:] == ["< .001" if p < 0.001 else f"{p:.3f}" for p in (t.p, t.p_holm, t.p_wilcoxon)]
    text = markdown([one, two])
    places = [text.index(part) for part in ("## one", "Test AUC (ROC), 3 seed(s):", "Realised missing rates", "## two")]
    assert places == sorted(places)
    assert f"{output.tests_title(one)}:" in text
    assert output._p(None) == "–"
    assert (output._p(0.001), output._p(0.00099)) == ("0.001", "< .001")


def test_text_that_somebody_chose_is_no_markup_and_stays_on_its_line():
    assert output._markdown("a|b *c* `d` [e](f) \\ <g>\nh") == r"a\|b \*c\* \`d\` [e\](f) \\ \<g> h"


def test_what_a_command_wrote_is_listed_in_the_manifest_above_it(tmp_path, seed):
    own_folder(tmp_path, "jobs")
    (tmp_path / "inner" / "figures").mkdir(parents=True)
    for name in ("results.json", "report.html", "other.txt", "figures/a.png", "figures/a.txt"):
        (tmp_path / "inner" / name).write_text(name)
    output.list_files(tmp_path / "inner")
    manifest = Manifest.read(tmp_path, advice="x")
    listed = [
        n
        for n in ("results.json", "report.html", "other.txt", "figures/a.png", "figures/a.txt")
        if f"inner/{n}" in manifest
    ]
    assert listed == ["results.json", "report.html", "figures/a.png"]
