"""Scores of one model as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from .terminal import print_table

__all__ = ["print_scores"]


def print_scores(console: Console, title: str, scores: Mapping[str, Any], modalities: Sequence[str]) -> None:
    """Complete data and missing rates, then the verdict on each modality and its scores."""
    columns = ["missing rate", "score", *(f"realised {m}" for m in modalities)]
    rows = [["complete", f"{scores['complete']:.3f}", *[""] * len(modalities)]]
    rows += [
        [f"{entry['rate']:g}", f"{entry['score']:.3f}", *(f"{share:.3f}" for share in entry["realised"])]
        for entry in scores["missing"]
    ]
    print_table(console, f"{title}: {scores['metric']} on {scores['part']} data", columns, rows)
    if scores.get("reliance"):
        kinds = ("alone", "shuffled", "without", "only")
        rows = [
            [modality, entry["verdict"], *("–" if entry.get(kind) is None else f"{entry[kind]:.3f}" for kind in kinds)]
            for modality, entry in scores["reliance"].items()
        ]
        print_table(
            console,
            "Each modality",
            ["modality", "verdict", "alone", "that of other samples", "all without it", "nothing else"],
            rows,
        )
