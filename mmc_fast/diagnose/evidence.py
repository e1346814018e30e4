"""From measures to verdicts: the evidence of each modality, plain and in the resamples."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from .collect import Collector
from .options import DiagnoseOptions
from .predictions import ConditionScores
from .result import Measure, around
from .verdict import ModalityVerdict, judge

_SCORED = ("alone", "without", "only", "shuffled", "shapley", "resampled_shapley", "total_effect", "alignment")


def verdicts_of(
    collector: Collector, measures: dict[str, Measure], draws: Mapping[str, np.ndarray], scores: ConditionScores | None,
    absence: str, o: DiagnoseOptions,
) -> list[ModalityVerdict]:  # fmt: skip
    """The verdicts, and the measures that compare use with ability."""
    names = list(collector.widths)
    if scores is None:
        return [ModalityVerdict(name, "undecided", _kept(measures, name, ("use_share",))) for name in names]
    plain = {name: _kept(measures, name, _SCORED) for name in names}
    for name in names:
        error = measures[f"alone.{name}"].error if f"alone.{name}" in measures else None
        plain[name] |= {} if error is None else {"alone_error": error}
    whole = {key: float(measures[f"score.{key}"].value or 0.0) for key in ("all", "chance")}
    whole["chance_error"] = scores.chance_error()
    random, resamples = np.random.default_rng([o.seed, 11]), []
    for r in range(len(draws.get("score.all", ()))):
        row = {}
        for name in names:
            row[name] = {
                k: float(draws[f"{k}.{name}"][r]) if f"{k}.{name}" in draws else v for k, v in plain[name].items()
            }
            if "alone" in row[name] and f"alone.{name}" not in draws:
                row[name]["alone"] += plain[name].get("alone_error", 0.0) * random.standard_normal()
        resamples.append((row, whole | {k: float(draws[f"score.{k}"][r]) for k in ("all", "chance")}))
    verdicts = judge(plain, whole, resamples, o.thresholds)
    for verdict in verdicts:
        name, e = verdict.modality, verdict.evidence
        e |= _kept(measures, name, ("use_share", "retrained_without")) | _kept(measures, "", ("retrained_all",))
        if "index" in e:
            measures[f"use_index.{name}"] = Measure(e["index"], None, e.get("index_low"), e.get("index_high"))
        if absence == "model" and e["ability"] > 0:
            measures[f"robustness.{name}"] = Measure((e["only"] - e["chance"]) / e["ability"])
        if "retrained_without" in e:
            pair = measures["retrained_all"], measures[f"retrained_without.{name}"]
            gap, error = e["retrained_all"] - e["retrained_without"], math.hypot(*(m.error or 0.0 for m in pair))
            measures[f"need.{name}"] = around(gap, error, o.level)
    return verdicts


def _kept(measures: Mapping[str, Measure], modality: str, kinds: tuple[str, ...]) -> dict[str, float]:
    """The values of some measures of a modality that are defined."""
    names = {kind: f"{kind}.{modality}" if modality else kind for kind in kinds}
    found = {kind: measures[name].value for kind, name in names.items() if name in measures}
    return {kind: value for kind, value in found.items() if value is not None}
