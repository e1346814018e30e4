"""The worked examples of docs/diagnose.md: avMNIST and SUPPORT2, vanilla and the robust variant, diagnosed and drawn.

Run: ``python bench/diagnose_examples.py [--seeds 3] [--out docs/img] [--pages folder]``. avMNIST is read from ``MMC_DATA``; SUPPORT2 is in
the package. Prints the tables of the document. Settings are those of the study (``configs/study/frozen.json``); pictures and
tables are of the first seed, a line below says what the others found. "planted" is vanilla fusion on avMNIST whose sounds
were shuffled among the training rows, so that it could learn nothing from them: a full collapse of a modality that is there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from mmc_fast.diagnose import Diagnosis, diagnose
from mmc_fast.diagnose.figures import PAGE, STYLE
from mmc_fast.experiments.data import MultimodalDataset, load
from mmc_fast.experiments.training import TrainConfig, train
from mmc_fast.experiments.training.adapter import RunAdapter

ROOT = Path(__file__).resolve().parent.parent
SETS = {
    "avmnist": ("avmnist_small", {"variant": "speaker"}, {"epochs": 12, "batch_size": 128}),
    "support2": ("support2", {}, {"epochs": 20, "batch_size": 64}),
}
PLANTED = "planted"
METHODS = {"vanilla": "vanilla", "robust": "EBR robust"}
SHOWN = ("use_shares", "reliance", "neurons")


def fit(name: str, method: str, seed: int) -> Diagnosis:
    """Train on the train part, diagnose on the test part, with the control."""
    known, options, budget = SETS[name]
    dataset = load(known, **options)
    shown = shuffled(dataset, "audio", seed) if method == PLANTED else dataset
    methods = json.loads((ROOT / "configs" / "study" / "frozen.json").read_text())["test"]
    settings = methods["vanilla" if method == PLANTED else method] | budget
    result = train(shown, TrainConfig.from_dict(settings), seed=seed, evaluate_on=("validation",))
    return diagnose(RunAdapter(result.model), dataset, control=True)


def shuffled(dataset: MultimodalDataset, modality: str, seed: int) -> MultimodalDataset:
    """One modality dealt out anew among the training and among the validation rows: all of its signal is gone there."""
    x, generator = dataset.features[modality].clone(), torch.Generator().manual_seed(seed)
    for part in (0, 1):
        rows = torch.nonzero(dataset.split == part).flatten()
        x[rows] = x[rows[torch.randperm(len(rows), generator=generator)]]
    return replace(dataset, features=dataset.features | {modality: x})


def draw(found: dict[str, Diagnosis], path: Path) -> None:
    """Three plots for each model, side by side."""
    with mpl.rc_context(STYLE):
        canvas = Figure(figsize=(13, 4.2 * len(found)), layout="constrained")
        grid = canvas.subplots(len(found), len(SHOWN))
        for row, (method, d) in zip(grid, found.items(), strict=True):
            for axes, kind in zip(row, SHOWN, strict=True):
                d.plot(kind, axes)
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


def across(runs: dict[str, list[Diagnosis]]) -> str:
    """One line per model and modality: verdicts, and the range of the main numbers over seeds."""
    lines = ["| model | modality | verdicts | use share | without it | only it |", "|---|---|---|---|---|---|"]
    for method, diagnoses in runs.items():
        for i, name in enumerate(diagnoses[0].modalities):
            kinds = ", ".join(d.verdicts[i].kind for d in diagnoses)
            cells = []
            for key in ("use_share", "without", "only"):
                values = [d[f"{key}.{name}"].value or 0.0 for d in diagnoses]
                cells.append(f"{min(values):.3f} to {max(values):.3f}")
            lines.append(f"| {method} | {name} | {kinds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img")
    parser.add_argument("--pages", type=Path, help="also write the pages, the robust variant compared with vanilla")
    parser.add_argument("--only", choices=tuple(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in [arguments.only] if arguments.only else SETS:
        methods = METHODS | ({PLANTED: PLANTED} if name == "avmnist" else {})
        runs = {method: [fit(name, key, seed) for seed in range(arguments.seeds)] for method, key in methods.items()}
        found = {method: diagnoses[0] for method, diagnoses in runs.items()}
        draw(found, arguments.out / f"diagnose-{name}.png")
        print(f"\n{name}\n\n{table(found)}\n\n{across(runs)}\n", flush=True)
        if arguments.pages:
            found["robust"].save_html(arguments.pages / f"{name}.html", found["vanilla"])
            found["vanilla"].to_json(arguments.pages / f"{name}-vanilla.json")
            if PLANTED in found:
                found[PLANTED].save_html(arguments.pages / f"{name}-planted.html")


if __name__ == "__main__":
    main()
