"""The passes over the data: sums of features and layers, scores of coalitions, and rows for probes."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mmc_fast._util.files import replace_file
from mmc_fast.errors import InputError

from .adapter import Adapter, flat, labels_of
from .collect import Collector, Reservoir, checked_features
from .groups import stream
from .measures.reliance import coalition_outputs
from .predictions import CoalitionScores

__all__ = [
    "Batches", "HasBatches", "Progress", "Stored", "first_pass", "second_pass", "training_batches", "training_rows",
]  # fmt: skip

STATE_VERSION = 2
Progress = Callable[[str, int, int | None], None]


@runtime_checkable
class HasBatches(Protocol):
    """Data that know their batches, such as a data set. Optional: ``training_batches()``, those the model was trained on."""

    def batches(self) -> Iterable[Any]: ...


class Batches:
    """The loader as something that can be read twice."""

    def __init__(self, loader: Iterable[Any] | HasBatches) -> None:
        if isinstance(loader, HasBatches):
            loader = loader.batches()
        if isinstance(loader, Iterator):
            raise InputError(
                "diagnose: the loader is an iterator, which can be read once; give a list of batches or a DataLoader"
            )
        if not hasattr(loader, "__iter__"):
            raise TypeError(f"diagnose: loader is {type(loader).__name__}; give an iterable of batches")
        self.loader = loader
        self.total: int | None = len(loader) if isinstance(loader, Sized) else None

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return enumerate(self.loader)


def training_batches(loader: Any) -> Iterable[Any] | None:
    """The training rows that the data bring along, if they do."""
    bring = getattr(loader, "training_batches", None)
    return bring() if callable(bring) else None


class Stored:
    """Unfinished sums on disk, if asked for: one file, replaced as a whole."""

    def __init__(self, path: str | Path | None, every: float, meaning: list[Any]) -> None:
        self.path = None if path is None else Path(path)
        self.every, self.meaning, self.last = every, meaning, time.monotonic()
        self.found: dict[str, Any] = {}
        if self.path is not None and self.path.is_file():
            self.found = self._read(self.path)
            if self.found.get("version") != STATE_VERSION or self.found.get("meaning") != meaning:
                raise InputError(
                    f"{self.path} is the state of a diagnosis with other groups, seed, samples or metric, or of another "
                    "version; use the same settings or delete it"
                )

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            return dict(torch.load(path, weights_only=True))
        except Exception as error:  # whatever damage of a file makes the reader raise
            first = (str(error).strip().splitlines() or [""])[0]
            raise InputError(
                f"{path} cannot be read as the state of a diagnosis ({type(error).__name__}: {first}); delete it to start over"
            ) from error

    def due(self) -> bool:
        return self.path is not None and time.monotonic() - self.last >= self.every

    def write(self, parts: dict[str, Any]) -> None:
        if self.path is not None:
            content = io.BytesIO()
            torch.save({"version": STATE_VERSION, "meaning": self.meaning} | parts, content)
            replace_file(self.path, content.getvalue())
            self.last = time.monotonic()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def first_pass(
    adapter: Adapter, batches: Batches, groups: int, seed: int, rows: int, stored: Stored, report: Progress
) -> Collector:
    collector = Collector(adapter, groups, seed, rows)
    report("collect", 0, batches.total)
    for index, batch in batches:
        if index == 0:
            collector.start(batch)
            if "collector" in stored.found:
                collector.load_state(stored.found["collector"])
        if index < collector.batches:
            continue
        collector.add(batch)
        report("collect", index + 1, batches.total)
        if collector.settled and stored.due():
            stored.write({"collector": collector.to_state()})
    collector.flush()
    if collector.samples < 2:
        got = "no sample" if not collector.samples else "one sample"
        raise InputError(f"diagnose: the loader gave {got}; give at least two, better some hundred")
    return collector


@torch.no_grad()
def second_pass(
    adapter: Adapter, batches: Batches, collector: Collector, metric: str, means: Mapping[str, Tensor], stored: Stored,
    report: Progress,
) -> CoalitionScores:  # fmt: skip
    scores, done = CoalitionScores(metric, len(collector.widths), collector.groups), 0
    found = stored.found.get("scores")
    if found is not None:
        scores.load_state(found)
        done = stored.found["scored"]
    report("score", done, batches.total)
    for index, batch in batches:
        if index < done:
            continue
        features = checked_features(adapter, batch, collector.widths, index)
        labels = labels_of(adapter, batch)
        if labels is None:
            raise InputError(
                f"diagnose: batch {index} had labels in the first pass and has none now; use a fixed order"
            )
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= max(2, collector.outputs)):
            raise InputError(
                f"diagnose: batch {index} has labels {int(labels.min())} to {int(labels.max())} for {collector.outputs} "
                "outputs; number the classes 0, 1, 2, ..."
            )
        if metric == "auroc" and collector.outputs > 2:
            raise InputError(f"diagnose: metric 'auroc' is for 2 classes and there are {collector.outputs} outputs")
        shaped = {name: means[name].reshape(1, *x.shape[1:]) for name, x in features.items()}
        outputs = coalition_outputs(adapter.fuse, features, shaped)  # type: ignore[arg-type]
        random = stream(collector.seed, "scores", index)
        places = torch.randint(collector.groups, (len(labels),), generator=random)
        scores.add(outputs, labels, places)
        report("score", index + 1, batches.total)
        if stored.due():
            stored.write({"collector": collector.to_state(), "scores": scores.to_state(), "scored": index + 1})
    return scores


def training_rows(adapter: Adapter, batches: Batches, collector: Collector, report: Progress) -> Reservoir:
    """A sample of the rows that probes train on."""
    kept = Reservoir(collector.reservoir.size, collector.seed)
    report("probes", 0, batches.total)
    for index, batch in batches:
        x = flat(checked_features(adapter, batch, collector.widths, index)).float().cpu()
        labels = labels_of(adapter, batch)
        if labels is None or len(labels) != len(x):
            got = "no labels" if labels is None else f"{len(labels)} labels for {len(x)} rows"
            raise InputError(
                f"diagnose: batch {index} of probe_data has {got}; give labelled batches, or no probe_data"
            )
        kept.add(index, {"x": x, "labels": labels})
        report("probes", index + 1, batches.total)
    if not len(kept.keys):
        raise InputError("diagnose: probe_data gave no sample; give labelled batches, or no probe_data")
    return kept
