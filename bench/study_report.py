"""Write the result tables of docs/study.md and its figure from the run log: ``python bench/study_report.py``."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict

import numpy as np
import torch
from study import (
    EXPLORED,
    FROZEN,
    LOG,
    ON,
    PREDICTIONS,
    ROOT,
    STAGES,
    TESTED,
    dataset,
    jobs_of,
    key_of,
)
from study_figures import ablation, differences, noise

from mmc_fast.diagnose.statistics import ResampledScores, average, mean_sd, resample_counts, resampled_scores

PAGE = ROOT / "docs" / "study.md"
INTERVALS = ROOT / "docs" / "study" / "test_intervals.json"
ROBUST, COMPETITOR, VANILLA = "EBR robust", "transformer + dropout + consistency", "vanilla"
RESAMPLES = 2000


def lines() -> list[dict]:
    """The last line of every (stage, method, set, seed)."""
    found = {}
    for row in map(json.loads, LOG.read_text().splitlines()):
        found[row["stage"], row["name"], row["set"], row["seed"]] = row
    return list(found.values())


def rows_of(stage: str, rows: list[dict]) -> list[dict]:
    """The rows of a stage, and those of its runs that another stage had made before under another name."""
    found = [row for row in rows if row["stage"] == stage]
    known, by_key = {(r["name"], r["set"], r["seed"]) for r in found}, {r["key"]: r for r in rows}
    for job in jobs_of(stage):
        row = by_key.get(key_of(job))
        if row is not None and (job["name"], job["set"], job["seed"]) not in known:
            found.append(row | {"stage": stage, "name": job["name"]})
    return found


def validation_table(stage: str, rows: list[dict]) -> str:
    """Mean over seeds of (mean over missing rates / complete), best mean of all first."""
    sets = ON.get(stage, EXPLORED)
    cells: dict[str, dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in rows_of(stage, rows):
        cells[row["name"]][row["set"]].append(row)
    ranked = []
    for name, by_set in cells.items():
        entry, all_means, fresh = [], [], []
        for s in sets:
            if any("diverged" in r for r in by_set[s]):
                entry.append(f"diverged ({len(by_set[s])})")
            elif by_set[s]:
                masked, complete = (np.mean([r[k] for r in by_set[s]]) for k in ("mean_missing", "complete"))
                entry.append(f"{masked:.3f} / {complete:.3f} ({len(by_set[s])})")
                all_means.append((masked + complete) / 2)
                fresh += [r["fresh"][0] for r in by_set[s] if r.get("fresh")]
            else:
                entry.append("not run")
        whole = f"{np.mean(all_means):.4f}" if len(all_means) == len(sets) else "–"
        judged = f"{min(fresh):.2f}–{max(fresh):.2f}" if fresh else "–"
        ranked.append((whole, f"| {name} | {' | '.join(entry)} | {whole} | {judged} |"))
    head = f"| {stage} | {' | '.join(sets)} | mean | fresh ψ |\n|---|{'---|' * (len(sets) + 2)}\n"
    return head + "\n".join(text for _, text in sorted(ranked, reverse=True))


def planted_table(rows: list[dict]) -> str:
    """The planted-collapse set: mean ± s.d. over seeds, and the score from one modality with the other at its mean."""
    cells: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        if row["stage"] == "planted":
            cells[row["name"]].append(row)
    out = [
        "| planted collapse | missing rates | complete | only easy | only hard | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in sorted(cells.items(), key=lambda item: -np.mean([r["only"]["hard"] for r in item[1]])):
        columns = [
            [r["mean_missing"] for r in runs], [r["complete"] for r in runs],
            [r["only"]["easy"] for r in runs], [r["only"]["hard"] for r in runs],
        ]  # fmt: skip
        text = (f"{mean:.3f}" + (f" ± {sd:.3f}" if sd is not None else "") for mean, sd in map(mean_sd, columns))
        out.append(f"| {name} | {' | '.join(text)} | {len(runs)} |")
    return "\n".join(out)


def ablation_table(rows: list[dict]) -> str:
    """Differences from the frozen variant, paired by seed, with the standard error over seeds."""
    value: dict[tuple, float] = {}
    for row in rows:
        if row["stage"] == "ablation":
            value[row["name"], row["set"], row["seed"]] = (row["mean_missing"] + row["complete"]) / 2
    names = list(dict.fromkeys(name for name, _, _ in value))
    seeds = sorted({seed for _, _, seed in value})
    out = [f"| ablation (difference from robust, ±1 s.e.) | {' | '.join(EXPLORED)} | seeds |", "|---|---|---|---|---|"]
    for name in names:
        cells, used = [], 0
        for s in EXPLORED:
            common = [seed for seed in seeds if (name, s, seed) in value and ("robust", s, seed) in value]
            used = max(used, len(common))
            if not common:
                cells.append("not run")
            elif name == "robust":
                mean, sd = mean_sd([value[name, s, seed] for seed in common])
                cells.append(f"{mean:.4f}" + (f" ± {sd / len(common) ** 0.5:.4f}" if sd is not None else ""))
            else:
                mean, sd = mean_sd([value[name, s, seed] - value["robust", s, seed] for seed in common])
                cells.append(f"{mean:+.4f}" + (f" ± {sd / len(common) ** 0.5:.4f}" if sd is not None else ""))
        out.append(f"| {name} | {' | '.join(cells)} | {used} |")
    return "\n".join(out)


def resampled(rows: list[dict], name: str, seeds: list[int], counts) -> dict[str, ResampledScores]:
    """Scores of one method on one set at missing rates (mean) and on complete data, on shared bootstrap samples."""
    by_seed = {row["seed"]: row for row in rows if row["name"] == name}
    stored = [torch.load(PREDICTIONS / by_seed[s]["key"] / "predictions.pt")[0] for s in seeds]
    metric, labels = dataset(rows[0]["set"]).metric, stored[0]["labels"].numpy()

    def of(condition: str) -> ResampledScores:
        return resampled_scores(metric, labels, [p["probabilities"][condition].numpy() for p in stored], counts)

    rates = [c for c in stored[0]["probabilities"] if c.startswith("missing")]
    return {"missing": average([of(c) for c in rates]), "complete": of("complete")}


def intervals(rows: list[dict]) -> dict:
    """Paired intervals of robust against vanilla and the competitor, for every set whose predictions are here."""
    frozen, found = json.loads(FROZEN.read_text())["test"], {}
    for s in TESTED:
        here = [r for r in rows if r["stage"] == "test" and r["set"] == s and r["name"] in frozen]
        names = list(dict.fromkeys(row["name"] for row in here))
        seeds = sorted(set.intersection(*({r["seed"] for r in here if r["name"] == n} for n in names))) if names else []
        if not seeds or not {ROBUST, COMPETITOR, VANILLA} <= set(names):
            continue
        stored = torch.load(PREDICTIONS / here[0]["key"] / "predictions.pt")[0]
        counts = resample_counts(len(stored["labels"]), RESAMPLES, np.random.default_rng(0))
        scores = {name: resampled(here, name, seeds, counts) for name in names}
        found[s] = {
            "seeds": seeds,
            "methods": {n: {c: mean_sd(x.plain) for c, x in v.items()} for n, v in scores.items()},
        }
        for other in (VANILLA, COMPETITOR):
            found[s][f"robust - {other}"] = {
                c: [getattr((scores[ROBUST][c] - scores[other][c]).interval(), k) for k in ("estimate", "low", "high")]
                for c in ("missing", "complete")
            }
    return found


def test_tables(found: dict) -> str:
    out = []
    for condition, title in (("missing", "mean over missing rates"), ("complete", "complete data")):
        names = list(next(iter(found.values()))["methods"])
        out += [
            f"| {title} (mean ± s.d. over seeds) | {' | '.join(names)} | seeds |",
            "|---|" + "---|" * (len(names) + 1),
        ]
        for s, entry in found.items():
            cells = [
                f"{mean:.4f}" + (f" ± {sd:.4f}" if sd is not None else "")
                for mean, sd in (entry["methods"][n][condition] for n in names)
            ]
            out.append(f"| {s} | {' | '.join(cells)} | {len(entry['seeds'])} |")
        out.append("")
    out += ["| robust minus | condition | " + " | ".join(found) + " |", "|---|---|" + "---|" * len(found)]
    for other in (VANILLA, COMPETITOR):
        for condition in ("missing", "complete"):
            cells = ["{:+.4f} [{:+.4f}, {:+.4f}]".format(*e[f"robust - {other}"][condition]) for e in found.values()]
            out.append(f"| {other} | {condition} | {' | '.join(cells)} |")
    return "\n".join(out)


def main() -> int:
    rows = lines()
    if PREDICTIONS.exists():
        INTERVALS.write_text(json.dumps(intervals(rows), indent=1))
    found = json.loads(INTERVALS.read_text())
    blocks = {stage: validation_table(stage, rows) for stage in STAGES}
    blocks |= {"ablation": ablation_table(rows), "test": test_tables(found), "planted": planted_table(rows)}
    differences(found, {"vanilla": VANILLA, "the selected competitor": COMPETITOR})
    ablation(rows)
    noise(rows)
    page = PAGE.read_text()
    for name, text in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        page = pattern.sub(lambda m, text=text: m.group(1) + text + "\n" + m.group(2), page)
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
