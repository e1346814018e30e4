"""Put finished results into docs/ and README.md.

    python tools/render_results.py --demo runs/demo --comparison runs/compare --claims runs/claims… --experiments runs/reproduce

Demo, comparison and claims: copies results.csv to docs/results/ (and pictures to docs/img/), and replaces what stands between the markers of
README.md, docs/experiments/comparison.md, or docs/experiments/learner.md and docs/results/claims.md by a table made of the CSV file, which a
test checks. The comparison's tables, as `mmc-fast compare` wrote them, go to docs/results/comparison.md. Experiments: copies what
`mmc-fast reproduce` wrote to docs/results/NAME.md, and counts their verdicts in docs/experiments/comparison.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from mmc_fast.experiments.report.drawings import metric_name

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS, RECORDS = (
    ROOT / "README.md",
    ROOT / "docs" / "experiments" / "comparison.md",
    ROOT / "docs" / "results",
)
LEARNER = ROOT / "docs" / "experiments" / "learner.md"
IMAGES = ROOT / "docs" / "img"
README_CONDITIONS = ("complete", "mean missing")
DEMO_PICTURES = ("missing-rates", "reliance-vanilla")

Line = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, help="folder of a finished `mmc-fast demo`")
    parser.add_argument("--comparison", type=Path, help="folder of a finished `mmc-fast compare`")
    parser.add_argument(
        "--claims",
        type=Path,
        nargs="+",
        help="folders of finished `mmc-fast compare` of the claims, each with other data",
    )
    parser.add_argument("--experiments", type=Path, help="folder of finished `mmc-fast reproduce` runs")
    arguments = parser.parse_args()
    if arguments.demo is not None:
        if json.loads((arguments.demo / "results.json").read_text(encoding="utf-8"))["plan"]["quick"]:
            raise SystemExit(f"{arguments.demo} is a smoke run; its numbers mean nothing. Run the whole demo.")
        shutil.copyfile(arguments.demo / "results.csv", RECORDS / "demo.csv")
        for data in sorted({line["data"] for line in read("demo")}):
            for picture in DEMO_PICTURES:
                shutil.copyfile(arguments.demo / "figures" / f"{data}-{picture}.png", IMAGES / f"{data}-{picture}.png")
        shutil.copyfile(arguments.demo / "figures" / "story.png", IMAGES / "demo-story.png")
        _put(README, "demo", render_demo(read("demo")))
    if arguments.comparison is not None:
        _comparison(arguments.comparison)
    if arguments.claims is not None:
        parts = [(folder / "results.csv").read_text(encoding="utf-8").splitlines() for folder in arguments.claims]
        lines = parts[0] + [line for part in parts[1:] for line in part[1:]]
        (RECORDS / "claims.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
        _put(LEARNER, "claims", render_claims(read("claims"), ("mean missing",)))
        _put(RECORDS / "claims.md", "claims", render_claims(read("claims")))
    if arguments.experiments is not None:
        _experiments(arguments.experiments)


def _comparison(folder: Path) -> None:
    shutil.copyfile(folder / "results.csv", RECORDS / "comparison.csv")
    shutil.copyfile(folder / "results.md", RECORDS / "comparison.md")
    for old in IMAGES.glob("comparison-*.png"):
        old.unlink()
    pictures = sorted((folder / "figures").glob("*.png"))
    for picture in pictures:
        shutil.copyfile(picture, IMAGES / f"comparison-{picture.name}")
    shown = [f"![{p.stem.replace('-', ' ')}](../img/comparison-{p.name})" for p in pictures]
    _put(RESULTS, "comparison", "\n".join([render_comparison(read("comparison")), "", *shown]))


def _experiments(folder: Path) -> None:
    lines = ["| experiment | data | seeds | agree | disagree | undecided |", "|---|---|---:|---:|---:|---:|"]
    for path in sorted(folder.glob("*/result.json"), key=lambda p: (p.parent.name[:3] != "tab", p.parent.name)):
        found = json.loads(path.read_text(encoding="utf-8"))
        name = found["name"]
        shutil.copyfile(path.with_name("result.md"), RECORDS / f"{name}.md")
        verdicts = [d["verdict"] for d in found["directions"]]
        counts = [str(verdicts.count(v)) for v in ("agrees", "disagrees", "undecided")]
        lines.append(
            f"| [{name}](../results/{name}.md): {found['title']} | {', '.join(found['data'])} | {len(found['seeds'])} | "
            + " | ".join(counts)
            + " |"
        )
    _put(RESULTS, "experiments", "\n".join(lines))


def read(name: str) -> list[Line]:
    """The lines of docs/results/NAME.csv."""
    with (RECORDS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def render_demo(lines: Sequence[Line]) -> str:
    """One table: each data set on complete data, and on average over the missing rates."""
    main = [line for line in lines if line["metric"] != "auprc"]
    cells = {(line["data"], line["method"], line["condition"]): line for line in main}
    columns = [(data, condition) for data in dict.fromkeys(x["data"] for x in main) for condition in README_CONDITIONS]
    metrics = {line["data"]: line["metric"] for line in main}
    table = [f"| method | {' | '.join(f'{data} ({metrics[data]}), {c}' for data, c in columns)} |"]
    table.append("|---|" + "---:|" * len(columns))
    for method in dict.fromkeys(line["method"] for line in main):
        picked = [cells[data, method, c] for data, c in columns]
        table.append(f"| {method} | {' | '.join(_number(c, bold=bool(c['best'])) for c in picked)} |")
    note = (
        "Test scores, mean ± s.d. over 3 seeds. Bold: the paired 95 % intervals against every other method lie above 0."
    )
    return "\n".join([*table, "", note])


def render_comparison(lines: Sequence[Line]) -> str:
    """One line per method, the main metric of every data set, complete and averaged over the missing rates."""
    main_metric: dict[str, str] = {}
    for line in lines:
        main_metric.setdefault(line["data"], line["metric"])
    some = [line for line in lines if line["metric"] == main_metric[line["data"]]]
    cells = {(line["method"], line["data"], line["condition"]): line for line in some}
    columns = [(data, condition) for data in main_metric for condition in ("complete", "mean missing")]
    heads = " | ".join(f"{data}, {condition}" for data, condition in columns)
    table = [f"| method | {heads} |", "|---|" + "---:|" * len(columns)]
    for method in dict.fromkeys(line["method"] for line in some):
        found = [cells.get((method, *column)) for column in columns]
        table.append(f"| {method} | " + " | ".join(_number(line, bold=_better(line)) for line in found) + " |")
    metrics = ", ".join(f"{data}: {metric_name(metric)}" for data, metric in main_metric.items())
    seeds = " or ".join(sorted({line["seeds"] for line in lines}))
    explained = (
        f"Test scores ({metrics}), mean ± s.d. over {seeds} seeds. **Bold**: above vanilla, p (Holm) below .05. †: a "
        "re-implementation that scores below vanilla on complete data by more than one standard error."
    )
    return "\n".join(table) + "\n\n" + explained


def render_claims(lines: Sequence[Line], conditions: Sequence[str] = README_CONDITIONS) -> str:
    """The reference minus every other method, with its interval: a row for each set and condition. Bold: several seeds, and the interval excludes 0."""
    first: dict[str, str] = {}
    for line in lines:
        first.setdefault(line["data"], line["metric"])
    some = [line for line in lines if line["difference"] and line["metric"] == first[line["data"]]]
    cells = {(line["data"], line["condition"], line["method"]): line for line in some}
    methods = list(dict.fromkeys(line["method"] for line in some))
    table = [f"| {some[0]['reference']} minus | {' | '.join(methods)} |", "|---|" + "---|" * len(methods)]
    for data in first:
        for condition in conditions:
            found = [cells[data, condition, method] for method in methods]
            head = f"{data} ({found[0]['seeds']})" + (f", {condition}" if len(conditions) > 1 else "")
            table.append(f"| {head} | {' | '.join(map(_gain, found))} |")
    return "\n".join(table)


def _gain(line: Line) -> str:
    value, low, high = (-float(line[name]) for name in ("difference", "difference_high", "difference_low"))
    text = f"{value:+.4f} [{low:+.4f}, {high:+.4f}]".replace("-", "−")
    return f"**{text}**" if line["p"] and (low > 0 or high < 0) else text


def replace(page: str, name: str, block: str) -> str:
    """``page`` with ``block`` between the markers of ``name``."""
    start, end = (f"<!-- {name}: {side} -->" for side in ("start", "end"))
    before, rest = page.split(start)
    return f"{before}{start}\n{block}\n{end}{rest.split(end)[1]}"


def _put(path: Path, name: str, block: str) -> None:
    path.write_text(replace(path.read_text(encoding="utf-8"), name, block), encoding="utf-8")


def _better(line: Line | None) -> bool:
    return bool(line and line["p_holm"] and float(line["p_holm"]) < 0.05 and float(line["difference"]) > 0)


def _number(line: Line | None, *, bold: bool) -> str:
    if line is None or not line["mean"]:
        return "–"
    text = f"{float(line['mean']):.3f}" + (f" ± {float(line['sd']):.3f}" if line["sd"] else "")
    mark = "†" if line["threshold"].startswith("under-performing") else ""
    return (f"**{text}**" if bold else text) + mark


if __name__ == "__main__":
    main()
