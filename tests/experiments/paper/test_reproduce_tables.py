"""Tables and directions of the experiments that look inside models, from measurements that are drawn instead of trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from scipy import stats

from mmc_fast.experiments.compare.configs import DataConfig, MethodConfig, load_data_configs, load_method_configs
from mmc_fast.experiments.compare.grid import Finished
from mmc_fast.experiments.jobs import Result
from mmc_fast.experiments.paper import Plan, clinical, fig4, fig5, fig6, fig7, table6, table7, table9
from mmc_fast.experiments.paper import scores as scores_module
from mmc_fast.experiments.paper.inside import METHODS, Bench, Found, resampled
from mmc_fast.experiments.paper.paper import TABLE6, TABLE7, TABLE9, TABLE11

STRENGTHS = {"c": 0.9, "a": 0.8, "d": 0.6, "b": 0.5}
KEYS = {"vanilla": "vanilla", "kd": "kd", "ebr-paper": "ebr", "ebr-robust": "ebr"}


class Asked(NamedTuple):
    """A training that was asked for."""

    method: str
    seed: int
    changes: dict
    modalities: list[str] | None = None

    @property
    def settings(self) -> dict:
        return {"config": {"lr": 0.125}}


class Made(Bench):
    """Three seeds of drawn measurements; keeps what they are and which trainings they need."""

    def __init__(self, draw, methods=METHODS) -> None:
        self.draw, self.titles = draw, {m: f"T-{m}" for m in methods}
        self.data, self.modalities, self.metric = SimpleNamespace(name="made"), list("abcd"), "accuracy"

    def strengths(self):
        return STRENGTHS

    def training(self, method, seed, changes=None, modalities=None):
        return Asked(method, seed, dict(changes or {}), modalities)

    def measure(self, function, trainings, *, methods=METHODS, variants=(None,), options=None):
        keys = [(m, v, s) for m in methods for v in variants for s in (0, 1, 2)]
        self.asked, self.options = {key: trainings(*key) for key in keys}, options
        self.results = {key: Result({}, *self.draw(), None, 1.0, 1) for key in keys}
        return Found(self.results, [0, 1, 2])

    def values(self, method, name, variant=None) -> np.ndarray:
        """Of the three seeds."""
        return np.array([self.results[method, variant, s].values[name] for s in (0, 1, 2)])


def numbers(seed: int, *names: str):
    g = np.random.default_rng(seed)
    return lambda: ({name: float(g.normal(3, 1)) for name in names}, {})


def means(table) -> dict[str, list[float]]:
    return {label: [v.mean for v in values] for label, values in table.rows}


def papers(table) -> dict[str, list[float | None]]:
    return {label: [v.paper for v in values] for label, values in table.rows}


def check_digits(tables) -> None:
    """The paper's numbers stand as it prints them."""
    for table in tables:
        printed = {v.paper for _, values in table.rows for v in values if v.paper is not None}
        assert all(float(f"{x:.{table.paper_digits}f}") == x for x in printed)
        if printed and table.paper_digits:
            assert any(round(x, table.paper_digits - 1) != x for x in printed)


def check(directions, wanted: dict[str, tuple[float, np.ndarray]]) -> None:
    """Claims, the paper's differences and ours, seed by seed."""
    assert [d.claim for d in directions] == list(wanted)
    for d in directions:
        paper, ours = wanted[d.claim]
        assert d.paper == pytest.approx(paper), d.claim
        assert d.ours.value == pytest.approx(ours.mean()), d.claim
        half = stats.t.ppf(0.975, 2) * stats.sem(ours)
        assert (d.ours.low, d.ours.high) == pytest.approx(
            (ours.mean() - half, ours.mean() + half), rel=1e-6, abs=1e-9
        ), d.claim


def test_table_7_adds_the_strongest_modalities_first(seed):
    bench = Made(numbers(seed, "units", "modalities"))
    outcome = table7._one(bench)
    check_digits(outcome.tables)
    for (method, m, s), jobs in bench.asked.items():
        assert jobs == {"model": Asked(method, s, {}, ["c", "a", "d", "b"][:m])}
    assert sorted({m for _, m, _ in bench.asked}) == [2, 3, 4]
    wanted = {}
    for table, (name, words) in zip(outcome.tables, table7._READINGS.items(), strict=True):
        assert means(table) == {
            f"T-{m}": [pytest.approx(bench.values(m, name, k).mean()) for k in (2, 3, 4)] for m in METHODS
        }
        where = f"VIF of {words}, made"
        below = [(m, "vanilla", k) for k in (2, 3, 4) for m in METHODS[1:]] + [("ebr-paper", "kd", 4)]
        for a, b, k in below:
            gap = TABLE7[KEYS[a]][k - 2] - TABLE7[KEYS[b]][k - 2]
            wanted[f"T-{a} below T-{b} at m = {k}: {where}"] = gap, bench.values(a, name, k) - bench.values(b, name, k)
        for m in METHODS:
            gap = TABLE7[KEYS[m]][2] - TABLE7[KEYS[m]][0]
            wanted[f"T-{m} grows from m = 2 to m = 4: {where}"] = (
                gap,
                bench.values(m, name, 4) - bench.values(m, name, 2),
            )
    check(outcome.directions, wanted)


def test_table_9_takes_the_unimodal_models_of_vanilla(seed):
    bench = Made(numbers(seed, "cross_entropy", "entropy", "mixing", "accuracy"))
    outcome = table9._one(bench)
    check_digits(outcome.tables)
    for (method, _, s), jobs in bench.asked.items():
        assert jobs == {"model": Asked(method, s, {}), "unimodal": Asked("vanilla", s, {})}
    (table,) = outcome.tables
    for m in METHODS:
        names = ("cross_entropy", "entropy", "mixing", "accuracy")
        assert means(table)[f"T-{m}"] == pytest.approx([bench.values(m, name).mean() for name in names])
    assert papers(table) == {
        f"T-{m}": [None if m == "ebr-robust" else TABLE9[KEYS[m]], None, None, None] for m in METHODS
    }
    wanted = {}
    for a, b in (("kd", "vanilla"), ("ebr-paper", "vanilla"), ("ebr-paper", "kd"), ("ebr-robust", "vanilla")):
        for name, words in (("cross_entropy", "cross-entropy"), ("mixing", "entropy of weight shares")):
            gap = TABLE9[KEYS[a]] - TABLE9[KEYS[b]]
            wanted[f"{words} of T-{a} below T-{b}, made"] = gap, bench.values(a, name) - bench.values(b, name)
    check(outcome.directions, wanted)
    assert [d.printed for d in outcome.directions] == [True, False] * 4


def test_figure_5_gives_the_weakest_modality_more_weight(seed):
    bench = Made(numbers(seed, *fig5._RANKS, *fig5._CKA))
    outcome = fig5._one(bench)
    check_digits(outcome.tables)
    assert bench.options == {"strongest": "c", "weakest": "b", "tolerance": 0.01}
    for (method, (form, beta), s), jobs in bench.asked.items():
        weight = {"reweight_modality": "b", "reweight": float(beta), "reweight_form": form}
        assert jobs == {"model": Asked(method, s, weight if beta else {}), "unimodal": Asked("vanilla", s, {})}
    tables, wanted = iter(outcome.tables), {}
    for form in ("features", "loss"):
        for name in (*fig5._RANKS, *fig5._CKA):
            table = next(tables)
            for m in METHODS:
                series = [bench.values(m, name, (form, beta)).mean() for beta in (0, 2, 4, 6, 8)]
                assert means(table)[f"T-{m}"] == pytest.approx(series)
                printed = name == "numerical" and m != "ebr-robust"
                assert papers(table)[f"T-{m}"] == (TABLE11["mmvae"][KEYS[m]] if printed else [None] * 5)
        rank, where = TABLE11["mmvae"], f"({form}), made"
        for name in ("numerical", "effective"):
            for m in METHODS:
                gap, high, low = (
                    rank[KEYS[m]][4] - rank[KEYS[m]][0],
                    *(bench.values(m, name, (form, b)) for b in (8, 0)),
                )
                wanted[f"{name} rank of T-{m} falls from β = 0 to 8 {where}"] = gap, high - low
            for a, b in (("kd", "vanilla"), ("ebr-paper", "vanilla"), ("ebr-paper", "kd"), ("ebr-robust", "vanilla")):
                ours = bench.values(a, name, (form, 8)) - bench.values(b, name, (form, 8))
                wanted[f"{name} rank of T-{a} above T-{b} at β = 8 {where}"] = rank[KEYS[a]][4] - rank[KEYS[b]][4], ours
    check(outcome.directions, wanted)
    assert [d.printed for d in outcome.directions] == ([True] * 8 + [False] * 8) * 2


def test_figure_4_is_about_the_encoder_of_the_weakest_modality(seed):
    bench = Made(lambda draw=numbers(seed, *fig4._COLUMNS, "chance"): draw())
    outcome = fig4._one(bench)
    assert bench.options == {"modality": "b"}
    own = {"reweight_modality": "b", "reweight": 1.0, "reweight_form": "loss"}
    for (method, _, s), jobs in bench.asked.items():
        assert jobs == {
            "fused": Asked(method, s, {}),
            "own": Asked(method, s, own),
            "unimodal": Asked("vanilla", s, {}),
        }
    for m in METHODS:
        series = [bench.values(m, name).mean() for name in ("fused", "own", "gap", "alone")]
        assert means(outcome.tables[0])[f"T-{m}"] == pytest.approx(series)
    (axes,) = outcome.drawings["prefix-gap"].canvas.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"T-{m}" for m in METHODS]
    for bars, name in zip([c for c in axes.containers if len(c) == 4], ("fused", "own", "alone"), strict=True):
        assert [b.get_height() for b in bars] == pytest.approx([bench.values(m, name).mean() for m in METHODS])
    (level,) = [line for line in axes.get_lines() if line.get_label() == "largest class"]
    assert level.get_ydata()[0] == bench.values("vanilla", "chance")[0]
    gap = {m: bench.values(m, "gap") for m in METHODS}
    wanted = {"fusion alone starves the encoder of b (gap above 0, vanilla), made": (1.0, gap["vanilla"])}
    for m in METHODS[1:]:
        wanted[f"T-{m} leaves a smaller gap than vanilla in the encoder of b, made"] = -1.0, gap[m] - gap["vanilla"]
    check(outcome.directions, wanted)


@pytest.mark.parametrize("epochs", [1, 4, 5])
def test_figure_6_sums_up_the_losses_of_all_methods_at_one_learning_rate(epochs, seed):
    g = np.random.default_rng(seed)
    bench = Made(lambda: ({"epochs": list(range(1, epochs + 1)), "loss_sem": g.uniform(0.1, 2, epochs).tolist()}, {}))
    outcome = fig6._one(bench)
    assert all(jobs == {"model": Asked(m, s, {"lr": 0.125})} for (m, _, s), jobs in bench.asked.items())
    losses = {m: bench.values(m, "loss_sem") for m in METHODS}
    half = {1: 0, 4: 1, 5: 2}[epochs]
    for m, some in losses.items():
        wanted = [some[:, 0].mean(), some[:, half].mean(), some[:, -1].mean(), np.log(some).mean()]
        assert means(outcome.tables[0])[f"T-{m}"] == pytest.approx(wanted)
    wanted = {}
    for m in METHODS[1:]:
        falls = np.log(losses[m]).mean(1) - np.log(losses["vanilla"]).mean(1)
        wanted[f"training loss of T-{m} falls faster than that of vanilla, made"] = -1.0, falls
        wanted[f"training loss of T-{m} ends below that of vanilla, made"] = (
            -1.0,
            losses[m][:, -1] - losses["vanilla"][:, -1],
        )
    check(outcome.directions, wanted)


def predictions(seed: int, *names: str):
    """Probabilities of three classes for 30 rows with the same labels in every result."""
    g = np.random.default_rng(seed)
    labels = g.integers(0, 3, 30)
    return lambda: ({}, {"labels": labels, **{name: g.random((30, 3)) for name in names}})


def hits(bench: Made, method: str, name: str, variant=None) -> np.ndarray:
    some = [bench.results[method, variant, s].arrays for s in (0, 1, 2)]
    return np.array([(a[name].argmax(1) == a["labels"]).mean() for a in some])


def check_scores(directions, wanted: dict[str, tuple[float, np.ndarray]]) -> None:
    """Claims, the paper's differences and ours."""
    assert [d.claim for d in directions] == list(wanted)
    for d in directions:
        assert (d.paper, d.ours.value) == pytest.approx((wanted[d.claim][0], wanted[d.claim][1].mean()), abs=1e-9), (
            d.claim
        )
        assert d.ours.low < d.ours.value < d.ours.high


def test_figure_7_puts_noise_on_the_weakest_modality(seed):
    bench = Made(predictions(seed, "probabilities"))
    outcome = fig7._one(bench)
    rates = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
    for (method, rate, s), jobs in bench.asked.items():
        noise = {"noise_modality": "b", "noise_rate": rate} if rate else {}
        assert jobs == {"model": Asked(method, s, noise)}
    scores = {m: np.stack([hits(bench, m, "probabilities", rate) for rate in rates], 1) for m in METHODS}
    slopes = {m: np.polyfit(rates, s.T, 1)[0] for m, s in scores.items()}
    for m in METHODS:
        assert means(outcome.tables[0])[f"T-{m}"] == pytest.approx([*scores[m].mean(0), slopes[m].mean()])
    wanted = {"vanilla falls with the noise, made": (-1.0, slopes["vanilla"])}
    for m in METHODS[1:]:
        above = scores[m][:, 1:].mean(1) - scores["vanilla"][:, 1:].mean(1)
        wanted[f"T-{m} is above vanilla under noise, made"] = 1.0, above
        wanted[f"T-{m} loses less to noise than vanilla, made"] = 1.0, slopes[m] - slopes["vanilla"]
    check_scores(outcome.directions, wanted)


def test_table_6_compares_with_models_that_never_saw_the_modality(seed):
    methods, rules = ("vanilla", *table6.MODELS), (*table6.FILLED, *table6.MODELS, "target")
    arrays = [f"{rule}/{name}" for rule in rules for name in "abcd"] + [f"complete/{m}" for m in methods]
    bench = Made(predictions(seed, *arrays), methods)
    outcome = table6._one(bench)
    check_digits(outcome.tables)
    for (_, _, s), jobs in bench.asked.items():
        assert {name: jobs[name] for name in methods} == {name: Asked(name, s, {}) for name in methods}
        for gone in "abcd":
            others = [name for name in "abcd" if name != gone]
            assert jobs[f"target/{gone}"] == Asked("vanilla", s, {"unimodal_share": 0.0}, others)
    scores = {rule: np.stack([hits(bench, "substitution", f"{rule}/{name}") for name in "abcd"]) for rule in rules}
    (table,) = outcome.tables
    for label, rule in zip(means(table), rules, strict=False):
        assert means(table)[label] == pytest.approx([*scores[rule].mean(1), scores[rule].mean()]), label
    for m in methods:
        assert means(table)[f"nothing missing: T-{m}"] == [None] * 4 + [
            pytest.approx(hits(bench, "substitution", f"complete/{m}").mean())
        ]
    (axes,) = outcome.drawings["substitution"].canvas.axes
    heights = [b.get_height() for b in axes.patches]
    assert axes.get_ylim()[0] == pytest.approx(0.95 * min(heights)), "the axis does not start at 0"
    assert len(heights) == 7 * 4
    printed = {rule: rule for rule in (*table6.FILLED, "target") if rule in TABLE6} | {"late": "late fusion"}
    column = {label: values[-1] for label, values in papers(table).items()}
    found = dict(zip(rules, column.values(), strict=False))
    assert found == {rule: TABLE6.get(printed.get(rule, "ebr" if rule == "ebr-paper" else "")) for rule in rules}
    wanted = {}
    for mine, title in (("ebr-paper", "EBR (paper)"), ("ebr-robust", "EBR robust")):
        for rule, key in printed.items():
            gap = TABLE6["ebr"] - TABLE6[key]
            claim = f"substitution by {title} {'above' if gap > 0 else 'below'} {table6._LABELS[rule]}, made"
            wanted[claim] = gap, scores[mine].mean(0) - scores[rule].mean(0)
    check_scores(outcome.directions, wanted)


def test_methods_meet_the_same_resamples_of_the_test_rows(seed):
    """Whatever else a result holds; so the same predictions differ by nothing."""
    (_, first), (_, other) = predictions(seed, "p")(), predictions(seed, "p", "q")()
    pair = [
        resampled("accuracy", [Result({}, {}, a | {"p": first["p"]}, None, 1.0, 1)] * 2, "p") for a in (first, other)
    ]
    assert not (pair[0] - pair[1]).resampled.any()
    assert pair[0].resampled.shape == (2, 400)
    assert len(set(pair[0].resampled[0].tolist())) > 5


def test_budgets_of_the_clinical_tables_win_over_the_data_and_a_plan_wins_over_both(tmp_path, monkeypatch):
    plan = Plan(tmp_path, ("support2", "mfeat"), epochs=5)
    found, given = clinical._data(plan), load_data_configs(plan.data)
    assert [d.budget_with({}).epochs for d in found] == [10, given[1].budget_with({}).epochs]
    assert found[0].budget_with({}).batch_size == 128
    assert [d.budget_with(plan.changes).epochs for d in found] == [5, 5]
    same = ("selection", "unimodal_share")
    assert all(
        getattr(a.budget_with({}), k) == getattr(b.budget_with({}), k)
        for a, b in zip(found, given, strict=True)
        for k in same
    )
    grids = []

    def run_grid(grid, folder, **options):
        grids.append((grid, folder, options))
        return Finished({}, [])

    monkeypatch.setattr(scores_module, "run_grid", run_grid)
    monkeypatch.setattr(scores_module, "find", lambda finished, methods, resamples: [])
    methods = load_method_configs(["vanilla"])
    scores_module.score_methods(plan, methods, found, {"epochs": 3, "lr": 0.5})
    ((grid, folder, options),) = grids
    assert (grid.changes, grid.tune, list(grid.seeds)) == ({"epochs": 5, "lr": 0.5}, "never", [0, 1, 2])
    assert (folder, options["workers"]) == (tmp_path / "grid", 2)


def test_an_extended_method_takes_the_stored_settings_of_its_base_unless_it_has_its_own(monkeypatch):
    stored = {
        "muse": MethodConfig.parse("muse", {"method": "muse", "selected": {"one": {"lr": 0.1}, "two": {"lr": 0.2}}}),
        "muse+ebr": MethodConfig.parse("muse+ebr", {"method": "muse+ebr", "selected": {"two": {"lr": 0.3}}}),
    }
    monkeypatch.setattr(scores_module, "load_method_configs", lambda names: [stored[name] for name in names])
    base, extended = scores_module.with_base_settings(["muse", "muse+ebr"])
    assert base.selected == {"one": {"lr": 0.1}, "two": {"lr": 0.2}}
    assert (extended.name, extended.selected) == ("muse+ebr", {"one": {"lr": 0.1}, "two": {"lr": 0.3}})


def test_numbers_of_the_paper_by_task_and_metric():
    numbers = (0.1, 0.2, 0.3, 0.4)
    mortality, readmission = DataConfig("a", "a"), DataConfig("b", "b", {"task": "readmission"})
    found = [
        clinical.paper_number(numbers, d, m) for d in (mortality, readmission) for m in ("auroc", "auprc", "accuracy")
    ]
    assert found == [0.1, 0.2, None, 0.3, 0.4, None]
    assert [clinical.paper_number(some, readmission, "auroc") for some in (None, (0.1, 0.2))] == [None, None]
