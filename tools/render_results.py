"""Put finished results into docs/results.md and README.md.

    python tools/render_results.py --comparison runs/compare --experiments runs/reproduce

The comparison: copies results.csv to docs/results/comparison.csv and pictures to docs/img/, and replaces what stands between the
markers: in docs/results.md all tables as `mmc-fast compare` wrote them, in README.md a short one made of the CSV file, which
a test checks. The experiments: copies what `mmc-fast reproduce` wrote to docs/results/NAME.md, and counts their verdicts.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS, RECORD = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "results" / "comparison.csv"
IMAGES = ROOT / "docs" / "img"
COMPARISON, EXPERIMENTS = "comparison", "experiments"  # names of the markers
SHOWN = ("complete", "mean missing")
# README's rows: those of the default grid.
ROWS = ["vanilla", "unimodal", "consistency", "late", "transformer", "kd", "ebr-paper", "ebr-robust", "shaspec", "muse"]

Line = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--comparison", type=Path, help="folder of a finished `mmc-fast compare`")
    parser.add_argument("--experiments", type=Path, help="folder of finished `mmc-fast reproduce` runs")
    arguments = parser.parse_args()
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    if arguments.comparison is not None:
        _comparison(arguments.comparison)
    if arguments.experiments is not None:
        _experiments(arguments.experiments)


def _comparison(folder: Path) -> None:
    shutil.copyfile(folder / "results.csv", RECORD)
    for old in IMAGES.glob("comparison-*.png"):
        old.unlink()
    pictures = []
    for picture in sorted((folder / "figures").glob("*.png")):
        shutil.copyfile(picture, IMAGES / f"comparison-{picture.name}")
        pictures.append(f"![{picture.stem.replace('-', ' ')}](img/comparison-{picture.name})")
    tables = (folder / "results.md").read_text(encoding="utf-8").split("\n\n", 1)[1].strip()  # without its title
    _put(RESULTS, COMPARISON, tables + "\n\n" + "\n".join(pictures))
    _put(README, COMPARISON, render(read(RECORD)))


def _experiments(folder: Path) -> None:
    lines = ["| experiment | data | seeds | agree | disagree | undecided |", "|---|---|---:|---:|---:|---:|"]
    for path in sorted(folder.glob("*/result.json"), key=lambda p: (p.parent.name[:3] != "tab", p.parent.name)):
        found = json.loads(path.read_text(encoding="utf-8"))
        name = found["name"]
        shutil.copyfile(path.with_name("result.md"), RECORD.parent / f"{name}.md")
        verdicts = [d["verdict"] for d in found["directions"]]
        counts = [str(verdicts.count(v)) for v in ("agrees", "disagrees", "undecided")]
        lines.append(
            f"| [{name}](results/{name}.md): {found['title']} | {', '.join(found['data'])} | {len(found['seeds'])} | "
            + " | ".join(counts)
            + " |"
        )
    _put(RESULTS, EXPERIMENTS, "\n".join(lines))


def read(path: Path) -> list[Line]:
    """The lines of a results.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def render(lines: Sequence[Line]) -> str:
    """README's table: one line per row, the main metric of every data set, complete and averaged over the missing rates."""
    main_metric: dict[str, str] = {}
    for line in lines:
        main_metric.setdefault(line["data"], line["metric"])
    cells = {
        (line["row"], line["data"], line["condition"]): line
        for line in lines
        if line["metric"] == main_metric[line["data"]]
    }
    heads = [f"{data}, {condition}" for data in main_metric for condition in SHOWN]
    table = ["| method | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for row in ROWS:
        numbers = [_number(cells.get((row, data, condition))) for data in main_metric for condition in SHOWN]
        table.append(f"| {row} | " + " | ".join(numbers) + " |")
    metrics = ", ".join(f"{data}: {metric}" for data, metric in main_metric.items())
    seeds = " or ".join(sorted({line["seeds"] for line in lines}))
    explained = (
        f"Test scores ({metrics}), mean ± s.d. over {seeds} seeds, settings chosen on validation data by searches of equal "
        "size. **Bold**: above vanilla, p (Holm) below .05. †: a re-implementation that scores below vanilla on complete data "
        "by more than one standard error. Names and sources: [docs/methods.md](docs/methods.md); every rate, all "
        "tests, what reproduces and what does not: [docs/results.md](docs/results.md)."
    )
    return "\n".join(table) + "\n\n" + explained


def replace(page: str, name: str, block: str) -> str:
    """``page`` with ``block`` between the markers of ``name``."""
    start, end = (f"<!-- {name}: {side} -->" for side in ("start", "end"))
    before, rest = page.split(start)
    return f"{before}{start}\n{block}\n{end}{rest.split(end)[1]}"


def _put(path: Path, name: str, block: str) -> None:
    path.write_text(replace(path.read_text(encoding="utf-8"), name, block), encoding="utf-8")


def _number(line: Line | None) -> str:
    if line is None or not line["mean"]:
        return "–"
    text = f"{float(line['mean']):.3f}" + (f" ± {float(line['sd']):.3f}" if line["sd"] else "")
    better = line["p_holm"] and float(line["p_holm"]) < 0.05 and float(line["difference"]) > 0
    mark = "†" if line["gate"].startswith("under-performing") else ""
    return (f"**{text}**" if better else text) + mark


if __name__ == "__main__":
    main()
