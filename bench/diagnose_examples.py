"""The worked examples of docs/diagnose.md: avMNIST and SUPPORT2, vanilla and the robust variant, diagnosed and drawn.

Run: ``python bench/diagnose_examples.py [--out docs/img] [--pages folder]``. avMNIST is read from ``MMC_DATA``; SUPPORT2 is in the package.
Prints the tables of the document. Settings are those of the study (``configs/study/frozen.json``), one seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from mmc_fast.analysis.diagnosis import Diagnosis, diagnose
from mmc_fast.analysis.report.figures import PAGE, STYLE
from mmc_fast.data import load
from mmc_fast.training import TrainConfig, train

ROOT = Path(__file__).resolve().parent.parent
SETS = {
    "avmnist": ("avmnist_small", {"variant": "speaker"}, {"epochs": 12, "batch_size": 128}),
    "support2": ("support2", {}, {"epochs": 20, "batch_size": 64}),
}
SHOWN = ("use_shares", "reliance", "neurons")


def fit(name: str, method: str, seed: int) -> Diagnosis:
    """Train on the train part, diagnose on the test part, with the control."""
    known, options, budget = SETS[name]
    dataset = load(known, **options)
    settings = json.loads((ROOT / "configs" / "study" / "frozen.json").read_text())["test"][method]
    result = train(dataset, TrainConfig.from_dict(settings | budget), seed=seed, evaluate_on=("validation",))
    return diagnose(result.model, dataset, control=True)


def draw(found: dict[str, Diagnosis], path: Path) -> None:
    """Three plots for each model, side by side."""
    with mpl.rc_context(STYLE):
        canvas = Figure(figsize=(13, 4.2 * len(found)), layout="constrained")
        grid = canvas.subplots(len(found), len(SHOWN))
        for row, (method, d) in zip(grid, found.items(), strict=True):
            for axes, kind in zip(row, SHOWN, strict=True):
                getattr(d, f"plot_{kind}")(axes)
                axes.set_title(f"{method}: {axes.get_title('left').lower()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        canvas.savefig(path, dpi=80, facecolor=PAGE)


def table(found: dict[str, Diagnosis]) -> str:
    """Markdown: a row per modality and model."""
    lines = ["| model | modality | verdict | use share | alone | without it | only it | retrained without | Shapley |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for method, d in found.items():
        kinds = {v.modality: v.kind for v in d.verdicts}
        for name in d.modalities:
            cells = [
                d[f"{key}.{name}"].value
                for key in ("use_share", "alone", "without", "only", "retrained_without", "shapley")
            ]
            lines.append(f"| {method} | {name} | {kinds[name]} | " + " | ".join(f"{c:.3f}" for c in cells) + " |")
    for method, d in found.items():
        lines.append(
            f"\n{method}: all {d['score.all']}, neuron entropy {d['neuron_entropy']}, fused VIF {d['fused.vif']}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img")
    parser.add_argument("--pages", type=Path, help="also write the pages, the robust variant compared with vanilla")
    parser.add_argument("--only", choices=tuple(SETS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in [arguments.only] if arguments.only else SETS:
        found = {
            method: fit(name, key, arguments.seed) for key, method in (("vanilla", "vanilla"), ("EBR robust", "robust"))
        }
        draw(found, arguments.out / f"diagnose-{name}.png")
        print(f"\n{name}\n\n{table(found)}\n", flush=True)
        if arguments.pages:
            found["robust"].save_html(arguments.pages / f"{name}.html", found["vanilla"])
            found["vanilla"].to_json(arguments.pages / f"{name}-vanilla.json")


if __name__ == "__main__":
    main()
