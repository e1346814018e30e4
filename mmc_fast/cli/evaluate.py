"""``mmc-fast evaluate``: a finished run on its data, or on other data of the same shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmc_fast._util.names import choose
from mmc_fast._util.numbers import check_seed
from mmc_fast.errors import InputError
from mmc_fast.experiments.data import MultimodalDataset, load
from mmc_fast.experiments.data.dataset import PARTS
from mmc_fast.experiments.training import evaluate, load_run
from mmc_fast.experiments.training.parts import fingerprint

__all__ = ["dataset_of", "parse_rates", "run_evaluate"]


def run_evaluate(
    run: Path, data: str | None, *, part: str, rates: Sequence[float] | None, seed: int | None, options: dict[str, Any]
) -> dict[str, Any]:
    """Score the run. ``same_data`` says whether the data are those that it was trained on."""
    choose("part", part, PARTS)
    if seed is not None:
        check_seed(seed)
    loaded = load_run(run)
    dataset = dataset_of(loaded.results, data, options)
    known = loaded.results["data"]
    scores = evaluate(
        loaded.model,
        dataset,
        part=part,
        rates=loaded.config.rates if rates is None else tuple(rates),
        seed=loaded.results["seed"] if seed is None else seed,
        unimodal=loaded.unimodal,
        rates_modality=loaded.config.rates_modality,
    )
    return {
        "schema_version": loaded.results["schema_version"],
        "run": str(run),
        "label": loaded.results["label"],
        "data": {"name": dataset.name, "modalities": dataset.modalities},
        "same_data": fingerprint(dataset) == known["fingerprint"],
        "scores": scores,
    }


def parse_rates(text: str | None) -> list[float] | None:
    """``"0.1,0.4"`` as numbers. Raises ``InputError`` for anything else, and for numbers that are no missing rate."""
    if text is None:
        return None
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--rates {text!r}: give missing rates separated by commas, such as 0.1,0.4") from None
    if not all(0 <= rate < 1 for rate in rates):
        raise InputError(f"--rates {text!r}: missing rates are at least 0 and below 1")
    return rates


def dataset_of(results: dict[str, Any], data: str | None, options: dict[str, Any]) -> MultimodalDataset:
    """The named data, or those of the run, loaded as they were for the run unless an option says otherwise."""
    info = results["data"]["info"]
    before = info.get("loaded") or {
        "data": results["data"]["name"],
        "task": info.get("task"),
        "variant": info.get("variant"),
        "nan_policy": info.get("nan_policy"),
    }
    before = dict(before)
    source = before.pop("data")
    given = {key: value for key, value in options.items() if value is not None}
    return load(source if data is None else data, **(before | given))
