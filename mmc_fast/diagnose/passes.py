"""The passes over the data: sums of features and layers, scores of coalitions, and rows for probes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mmc_fast import __version__
from mmc_fast._util.atomic import SaveFailed, save_errors
from mmc_fast._util.files import command_line, open_regular, replace_file, user_path
from mmc_fast.errors import InputError

from .absence import Condition, Remover, conditions_of, draws_for
from .adapter import Adapter, flat
from .alignment import EffectRows
from .collect import Collector
from .features import checked_features
from .groups import stream
from .measures.reliance import MAX_MODALITIES
from .options import DiagnoseOptions
from .predictions import ConditionScores
from .reservoir import Reservoir
from .subsets import SubsetRows

STATE_VERSION = 5
Progress = Callable[[str, int, int | None], None]


@runtime_checkable
class HasBatches(Protocol):
    """Data that know their batches, such as a data set. Optional: ``training_batches()``, those the model was trained on."""

    def batches(self) -> Iterable[Any]: ...


class Batches:
    """The loader as something that can be read twice."""

    def __init__(self, loader: Iterable[Any] | HasBatches) -> None:
        if isinstance(loader, HasBatches) and callable(loader.batches):
            loader = loader.batches()
        if isinstance(loader, Iterator):
            raise InputError(
                "diagnose: the loader is an iterator, which can be read once; give a list of batches or a DataLoader"
            )
        if not hasattr(loader, "__iter__"):
            raise TypeError(f"diagnose: loader is {type(loader).__name__}; give an iterable of batches")
        self.loader = loader
        self.total: int | None = None
        with contextlib.suppress(TypeError):  # a DataLoader has a length, and that of a stream raises
            self.total = len(loader) if isinstance(loader, Sized) else None
        self.given: int | None = None

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        count = 0
        for batch in self.loader:
            yield count, batch
            count += 1
        if self.given not in (None, count):
            raise InputError(
                f"diagnose: the loader gave {self.given} batches, and {count} when it was read again; give what can be read "
                "twice, such as a list of batches or a DataLoader"
            )
        self.given = count


def training_batches(loader: Any) -> Iterable[Any] | None:
    """The training rows that the data bring along, if they do."""
    bring = getattr(loader, "training_batches", None)
    return bring() if callable(bring) else None


_BLAMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError, RuntimeError, EOFError)
_BLAMED += (pickle.UnpicklingError,)  # type: ignore[assignment]


class Stored:
    """Unfinished sums on disk, if asked for: one file, replaced as a whole."""

    def __init__(self, path: str | Path | None, every: float, meaning: list[Any]) -> None:
        self.path = None if path is None else user_path(path)
        self.every, self.meaning, self.last = every, meaning, time.monotonic()
        self.found: dict[str, Any] = {}
        if self.path is not None and os.path.lexists(self.path):
            self.found = self._read(self.path)
        self.beside = self.path is not None and self.path.parent.is_dir()

    def _read(self, path: Path) -> dict[str, Any]:
        from mmc_fast._util.documents import parse_json

        from .schema import StateHeader

        advice = "delete it to start over"
        try:
            with open_regular(path, follow=False) as file:
                head, content = file.readline(), file.read()
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); {advice}") from error
        header = parse_json(head, StateHeader, f"the state {path} of an unfinished diagnosis", advice)
        if (header["version"], header["meaning"]) != (STATE_VERSION, json.loads(json.dumps(self.meaning))):
            raise InputError(
                f"{path} is the state of a diagnosis with other groups, seed, samples or metric, or of another "
                "version; use the same settings or delete it"
            )
        if (header["sha256"], header["size"]) != (hashlib.sha256(content).hexdigest(), len(content)):
            raise InputError(f"{path} was changed after it was written (its checksum does not match); {advice}")
        self.found = {"header": header}
        with self.blamed():
            return dict(torch.load(io.BytesIO(content), weights_only=True))

    @contextlib.contextmanager
    def blamed(self) -> Iterator[None]:
        """Where a diagnosis fails after it took up a state, say so: that state may not be one."""
        try:
            yield
        except (InputError, SaveFailed):
            raise
        except _BLAMED as error:
            if not self.found:
                raise
            first = (str(error).strip().splitlines() or [""])[0]
            raise InputError(
                f"{self.path} cannot be taken up as the state of this diagnosis ({type(error).__name__}: {first}); delete "
                "it to start over"
            ) from error

    def due(self) -> bool:
        return self.path is not None and time.monotonic() - self.last >= self.every

    def write(self, parts: dict[str, Any]) -> None:
        if self.path is None:
            return
        if self.beside and not self.path.parent.is_dir():
            raise SaveFailed(
                f"the folder {self.path.parent} was removed while a diagnosis kept its state there; start again"
            )
        buffer = io.BytesIO()
        torch.save(parts, buffer)
        content = buffer.getvalue()
        header = {"kind": "diagnosis state", "version": STATE_VERSION, "meaning": self.meaning, "mmc_fast": __version__}
        header |= {"command": command_line(), "sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
        with save_errors(self.path, lambda: "the model and the data are as they were"):
            replace_file(self.path, json.dumps(header).encode() + b"\n" + content)
        self.last = time.monotonic()

    def remove(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def first_pass(adapter: Adapter, batches: Batches, o: DiagnoseOptions, stored: Stored, report: Progress) -> Collector:
    collector = Collector(adapter, o.groups, o.seed, o.sample_rows, o.metric, o.agop)
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
    adapter: Adapter, batches: Batches, collector: Collector, absence: str, o: DiagnoseOptions, stored: Stored,
    report: Progress,
) -> tuple[ConditionScores, SubsetRows, EffectRows]:  # fmt: skip
    """Scores of the coalitions, of each modality resampled, and of the adapter's unimodal models; answers on a sample of rows."""
    assert collector.task is not None
    draws = draws_for(collector.samples, o.draws)
    conditions = conditions_of(len(collector.widths), absence, draws)
    unimodal = getattr(adapter, "unimodal", None)
    counts = {name: len(found) for name, found in conditions.items()}
    counts |= {f"alone.{name}": 1 for name in collector.widths if unimodal is not None}
    remover = Remover(adapter.fuse, collector.widths, collector.reservoir.columns, collector.groups)
    scores, done = ConditionScores(collector.task, counts, collector.groups, o.sample_rows, o.seed), 0
    answers = SubsetRows(collector.task, list(collector.widths), o.sample_rows, o.seed)
    effects = EffectRows(collector.task, list(collector.widths), o.sample_rows, o.seed)
    found = stored.found.get("scores")
    if found is not None:
        scores.load_state(found)
        answers.load_state(stored.found["answers"])
        effects.load_state(stored.found["effects"])
        done = stored.found["scored"]
    report("score", done, batches.total)
    for index, batch in batches:
        if index == 0:
            collector.check_again(batch)
        if index < done:
            continue
        features = checked_features(adapter, batch, collector.widths, index)
        labels = collector.labels(batch)
        if labels is None:
            raise InputError(
                f"diagnose: batch {index} had labels in the first pass and has none now; use a fixed order"
            )
        first = int(scores.rows.sum())
        rows, places = torch.arange(first, first + len(labels)), collector.places(index, len(labels))
        random = stream(collector.seed, "donors", index)
        drawn = [remover.drawn(rows, places, random) for _ in range(draws)]
        if collector.task.kind == "pairs":  # two towers of one other sample would match again
            others = [remover.drawn(rows, places, random) for _ in range(draws * (len(collector.widths) - 1))]
            drawn = [torch.stack([one, *others[k::draws]], 1) for k, one in enumerate(drawn)]
        known: dict[Condition, Tensor] = {}
        outputs = {}
        for name, wanted in conditions.items():
            for draw, condition in enumerate(wanted):
                if condition not in known:
                    known[condition] = y = remover.outputs(features, condition, drawn[condition.draw]).detach().cpu()
                    if not bool(torch.isfinite(y).all()):
                        whole = bool(torch.isfinite(adapter.fuse(features)).all())
                        raise InputError(
                            f"diagnose: the outputs of batch {index} hold NaN or infinite values"
                            + (f" with modalities taken away by {condition.absence!r}; check what the model does then"
                               if whole else "; drop or repair such samples")
                        )  # fmt: skip
                outputs[name, draw] = known[condition]
        if unimodal is not None:
            outputs |= {(f"alone.{name}", 0): y.detach().cpu() for name, y in unimodal(batch).items()}
        scores.add(index, outputs, labels, places)
        effects.add(index, outputs)
        if o.agop and len(collector.widths) <= MAX_MODALITIES:
            answers.add(
                index,
                {int(n[10:]): y for (n, draw), y in outputs.items() if n[:10] == "coalition." and not draw},
                labels,
            )
        report("score", index + 1, batches.total)
        if stored.due():
            parts: dict[str, Any] = {"scores": scores, "answers": answers, "effects": effects, "collector": collector}
            stored.write({name: part.to_state() for name, part in parts.items()} | {"scored": index + 1})
    return scores, answers, effects


def training_rows(adapter: Adapter, batches: Batches, collector: Collector, report: Progress) -> Reservoir:
    """A sample of the rows that probes train on."""
    kept = Reservoir(collector.reservoir.size, collector.seed)
    report("probes", 0, batches.total)
    for index, batch in batches:
        x = flat(checked_features(adapter, batch, collector.widths, index)).float().cpu()
        labels = collector.labels(batch)
        if labels is None or len(labels) != len(x):
            got = "no labels" if labels is None else f"{len(labels)} labels for {len(x)} rows"
            raise InputError(
                f"diagnose: batch {index} of probe_data has {got}; give labelled batches, or no probe_data"
            )
        kept.add(index, {"x": x, "labels": labels} | {f"input.{n}": v for n, v in collector.inputs(batch).items()})
        report("probes", index + 1, batches.total)
    if not len(kept.keys):
        raise InputError("diagnose: probe_data gave no sample; give labelled batches, or no probe_data")
    return kept
