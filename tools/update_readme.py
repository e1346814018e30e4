"""Put the table and pictures of a finished demo into README.md.

    python tools/update_readme.py runs/demo

writes docs/demo.json (the comparison that the table is made of), copies pictures to docs/img/ and replaces what stands
between the two markers of README.md. A test checks that README.md agrees with docs/demo.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from mmc_fast.diagnose import ModalityVerdict
from mmc_fast.experiments.report.comparison import AVERAGE, COMPLETE, Comparison
from mmc_fast.experiments.report.runs import display_name
from mmc_fast.experiments.report.words import comparison_words

ROOT = Path(__file__).resolve().parents[1]
README, RECORD, IMAGES = ROOT / "README.md", ROOT / "docs" / "demo.json", ROOT / "docs" / "img"
START, END = "<!-- demo: start -->", "<!-- demo: end -->"
PICTURES = ("missing-rates", "reliance-vanilla")
NOT_RUN = "The numbers of the demo are put here by `tools/update_readme.py`."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="folder of a finished demo")
    folder = parser.parse_args().demo
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    if results["plan"]["quick"]:
        raise SystemExit(f"{folder} is a smoke run; its numbers mean nothing. Run the whole demo.")
    record = {key: results[key] for key in ("mmc_fast_version", "plan", "environment", "seconds")}
    record["titles"] = {f.name: f.title for f in _registry() if f.name in results["data_sets"]}
    record["data_sets"] = {
        name: {"comparison": entry["comparison"], "verdicts": entry["verdicts"]}
        for name, entry in results["data_sets"].items()
    }
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in results["data_sets"]:
        for picture in PICTURES:
            shutil.copyfile(folder / "figures" / f"{name}-{picture}.png", IMAGES / f"{name}-{picture}.png")
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    README.write_text(replace(README.read_text(encoding="utf-8"), render(record)), encoding="utf-8")


def render(record: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    blocks = []
    for name, entry in record["data_sets"].items():
        comparison = Comparison.from_dict(entry["comparison"])
        blocks.append(f"**{name}** ({record['titles'].get(name, name)}), test {comparison.metric}:")
        blocks.append(_table(comparison))
        for method in ("ebr", "robust"):
            if method in comparison.scores:
                blocks.append(" ".join(comparison_words(comparison, method)))
        for v in entry["verdicts"]["vanilla"]:
            if v["kind"] in ("collapsed", "misleading") and "shuffled" in v:
                evidence = {key: value for key, value in v.items() if key not in ("modality", "kind")}
                blocks.append("Vanilla model: " + ModalityVerdict(v["modality"], v["kind"], evidence).sentence())
        blocks.append(
            f"![{name}: score against missing rate](docs/img/{name}-missing-rates.png) "
            f"![{name}: reliance of the vanilla model on each modality](docs/img/{name}-reliance-vanilla.png)"
        )
    plan, environment = record["plan"], record["environment"]
    blocks.append(
        f"Mean ± s.d. over {len(plan['seeds'])} seeds, {plan['epochs']} epochs, torch {environment['torch']} on "
        f"{environment['machine']}. Bold: the paired 95 % intervals against every other method lie above 0."
    )
    return "\n\n".join(blocks)


def replace(readme: str, block: str) -> str:
    """``readme`` with ``block`` between its markers."""
    before, rest = readme.split(START)
    return f"{before}{START}\n{block}\n{END}{rest.split(END)[1]}"


def _table(comparison: Comparison) -> str:
    chosen = [c for c in (COMPLETE, "0.1 missing", "0.4 missing", "0.7 missing", AVERAGE) if c in comparison.conditions]
    lines = ["| method | " + " | ".join(chosen) + " |", "|---|" + "---:|" * len(chosen)]
    for method, scores in comparison.scores.items():
        cells = []
        for condition in chosen:
            score = scores[condition]
            text = f"{score.mean:.3f}" + ("" if score.sd is None else f" ± {score.sd:.3f}")
            cells.append(f"**{text}**" if score.best else text)
        lines.append(f"| {display_name(method)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _registry() -> list[Any]:
    from mmc_fast.experiments.data import available

    return available()


if __name__ == "__main__":
    main()
