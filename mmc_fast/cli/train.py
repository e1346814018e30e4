"""``mmc-fast train``: one run on one data set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from mmc_fast.experiments.data import load
from mmc_fast.experiments.training import TrainConfig, train

from .scores import print_scores
from .terminal import RunDisplay, error_console

__all__ = ["run_train"]


def run_train(
    data: str,
    config: TrainConfig,
    *,
    seed: int,
    run_dir: Path | None,
    resume: bool | Literal["auto"],
    device: str,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Load, train, score; returns the results. ``options``: keyword arguments of ``mmc_fast.experiments.data.load``."""
    dataset = load(data, **options)
    # Kept with the results, so that `evaluate` finds the data again.
    source = {"data": data} | {key: value for key, value in options.items() if value is not None}
    dataset = replace(dataset, info={**dataset.info, "loaded": source})
    folder = run_dir or Path("runs") / f"{dataset.name}-{config.method}-{seed}"
    with RunDisplay(error_console()) as display:
        result = train(dataset, config, seed=seed, run_dir=folder, resume=resume, progress=display, device=device)
    return result.results | {"run_dir": str(folder)}


def print_results(console: Console, results: dict[str, Any]) -> None:
    """Scores, the modality probe of EBR, and the folder."""
    data = results["data"]
    title = f"{results['label']} on {data['name']}, seed {results['seed']}"
    if results["label"] == "without-effect":
        title = f"{results['method']} (without effect: λ changed nothing) on {data['name']}, seed {results['seed']}"
    print_scores(console, title, results["scores"], data["modalities"])
    figures = results["adversarial"]
    if figures and figures["modality_probe"]:
        fresh = figures["modality_probe"]
        console.print(
            f"A post-hoc probe names the modality of a latent with balanced accuracy "
            f"{fresh['balanced_accuracy']:.3f} (chance {fresh['chance']:.3f})."
        )
    console.print(f"Results, model and predictions: {results['run_dir']}")
