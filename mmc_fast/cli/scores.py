"""Scores of one model as tables, and missing rates as an option."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from mmc_fast.errors import InputError

from .terminal import print_table

_TITLES = {
    "auprc": "AUPRC", "macro_f1": "macro-F1", "macro_auroc": "macro-AUROC", "rmse": "RMSE", "mae": "MAE",
    "macro_auprc": "macro-AUPRC", "micro_auprc": "micro-AUPRC", "f1": "F1", "brier": "Brier score",
}  # fmt: skip


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


def print_scores(console: Console, title: str, scores: Mapping[str, Any], modalities: Sequence[str]) -> None:
    """Complete data and missing rates, then the reliance on each modality."""
    columns = ["missing rate", "score", *(f"realised {m}" for m in modalities)]
    rows = [["complete", f"{scores['complete']:.3f}", *[""] * len(modalities)]]
    rows += [
        [f"{entry['rate']:g}", f"{entry['score']:.3f}", *(f"{share:.3f}" for share in entry["realised"])]
        for entry in scores["missing"]
    ]
    shown = [name.removeprefix("complete_") for name in scores if name.startswith("complete_")]
    columns[2:2] = [_TITLES.get(name, name) for name in shown]
    for row, entry in zip(rows, [{n: scores[f"complete_{n}"] for n in shown}, *scores["missing"]], strict=True):
        row[2:2] = ["–" if entry.get(name) is None else f"{entry[name]:.3f}" for name in shown]
    print_table(console, f"{title}: {scores['metric']} on {scores['part']} data", columns, rows)
    if scores.get("reliance"):
        kinds = {
            "unimodal": "unimodal",
            "shuffled": "shuffled",
            "leave_one_out": "leave-one-out",
            "single_modality": "only this one",
        }
        rows = [
            [modality, entry["verdict"], *("–" if entry.get(kind) is None else f"{entry[kind]:.3f}" for kind in kinds)]
            for modality, entry in scores["reliance"].items()
        ]
        print_table(console, "Each modality", ["modality", "verdict", *kinds.values()], rows)
