"""The folder of a run: what identifies it, what it leaves behind, and how to open it again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import TypedDict

from mmc_fast._util.atomic import read_tensors, save_errors, write_json, write_npz, write_tensors
from mmc_fast._util.documents import Finite, parse_json, validated
from mmc_fast._util.files import user_path
from mmc_fast._util.lock import LOCK_NAME, FolderLock
from mmc_fast.errors import InputError
from mmc_fast.ops.ebr import products

from ..data.archive import Archive
from ..data.preprocessing import Preprocessing, PreprocessingDocument
from ..manifest import MANIFEST, Manifest
from ..tasks import Task, task_from_dict
from .adapter import RunAdapter
from .checkpoint import CheckpointStore, prefixed, stripped
from .config import TrainConfig
from .evaluate import Predictions
from .model import MultimodalModel
from .record import RunResults
from .rows import RowPredictions, predict_rows
from .size import check_size
from .unimodal import UnimodalModel, UnimodalModels

_RESULTS, _PREDICTIONS, _PREPROCESSING = "results.json", "predictions.npz", "preprocessing.json"
_PRODUCTS = "products.json"
_MODEL, _UNIMODAL = "model.safetensors", "unimodal.safetensors"
_ADVICE = "restore it, or train again in another folder"


class _Data(TypedDict):
    name: str
    fingerprint: str
    dims: dict[str, int]
    task: dict[str, Any]
    metric: str


class Identity(TypedDict):
    """What makes two runs the same run."""

    config: dict[str, Any]
    seed: int
    data: _Data
    evaluate_on: list[str]
    device: str


def _differences(old: Any, new: Any, where: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(k for k in new if k not in old)]:
            found += _differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
        return found
    return [] if old == new else [f"{where} was {old!r} and is now {new!r}"]


class RunFolder:
    """Files of one run below ``path``; every write is atomic, the manifest comes first and results.json last.

    What identifies the run stands in the manifest, and a file counts only where the manifest lists it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        self.manifest = Manifest(self.path, "run", {}, advice=_ADVICE)
        self._lock = FolderLock(self.path / LOCK_NAME, f"run_dir {self.path}")

    @classmethod
    def open(cls, path: str | Path, identity: dict[str, Any], resume: bool | str) -> RunFolder:
        """Create the folder for a new run, or open the folder of the same run again; :meth:`close` unlocks it.

        Raises:
            InputError: without ``resume`` a folder that is not empty; with it a folder without a run, or one whose
                configuration, seed, data or evaluated parts differ; a folder in which another run works, or that holds
                links, FIFOs or devices.
        """
        folder = cls(path)
        resume = folder.begun if resume == "auto" else bool(resume)
        try:
            folder._check(identity, resume)
            if not (resume and folder.finished):  # a finished run is only read
                folder.path.mkdir(parents=True, exist_ok=True)
                folder._lock.acquire()
            if not resume:
                folder._begin(identity)
            elif not folder.finished and _PRODUCTS in folder.manifest:  # a kill may have come before it was written
                products.restore(json.loads(folder.manifest.content(folder.path / _PRODUCTS)))
            return folder
        except OSError as error:
            folder.close()
            raise InputError(f"run_dir {path} cannot be used ({error}); name a folder that can be written") from error
        except BaseException:
            folder.close()
            raise

    def close(self) -> None:
        """Let others write into the folder."""
        self._lock.release()

    @property
    def begun(self) -> bool:
        """Whether the folder holds a run."""
        return os.path.lexists(self.path / MANIFEST)

    def read(self) -> None:
        """Take up the manifest. Raises InputError where it cannot be trusted."""
        self.manifest.refuse_special_files()
        self.manifest = Manifest.read(self.path, "run", advice=_ADVICE)
        validated(self.manifest.identity, Identity, str(self.path / MANIFEST), _ADVICE)

    def _check(self, identity: dict[str, Any], resume: bool) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise InputError(f"run_dir {path} is a file; name a folder")
        if not resume:
            self._check_empty()
            return
        if not self.begun:
            raise InputError(f"nothing to resume: {path} holds no run; start it without resume")
        self.read()
        found = _differences(self.manifest.identity, json.loads(json.dumps(identity)), "")
        if found:
            raise InputError(f"{path} holds another run: {'; '.join(found[:3])}; choose another run_dir")

    def _check_empty(self) -> None:
        if not self.path.is_dir():
            return
        # A kill during the very first write leaves its temporary file, and a killed run its lock.
        mine = (LOCK_NAME, f".{MANIFEST}.")
        if any(not p.name.startswith(mine) for p in self.path.iterdir()):
            what = "a run already; resume it or choose" if self.begun else "other files; choose"
            raise InputError(f"run_dir {self.path} holds {what} another folder")

    def _begin(self, identity: dict[str, Any]) -> None:
        self._check_empty()  # again, now that nobody else can write
        self.manifest = Manifest.begin(self.path, "run", identity, advice=_ADVICE)
        # how the native kernels multiply here: a resumed run does the same, whatever its machine measures
        self._write(_PRODUCTS, lambda path: write_json(path, products.stored()))

    def _write(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file and list it."""
        path = self.path / name
        with save_errors(path, lambda: "the checkpoints are still there"):
            self.manifest.alive()
            write(path)
        self.manifest.add([path])

    @property
    def finished(self) -> bool:
        return _RESULTS in self.manifest

    def results(self) -> dict[str, Any]:
        path = self.path / _RESULTS
        found: dict[str, Any] = parse_json(self.manifest.content(path), RunResults, str(path), _ADVICE)
        return found

    def checkpoints(self, stage: str, keep: int) -> CheckpointStore:
        return CheckpointStore(self.path / "checkpoints" / stage, keep, self.manifest)

    def save_unimodal(self, unimodal: UnimodalModels) -> None:
        tensors: dict[str, Tensor] = {}
        for i, model in enumerate(unimodal.models.values()):  # a name may hold dots
            tensors |= prefixed(str(i), model.state_dict())
        about = {"scores": json.dumps(unimodal.scores), "key": json.dumps(unimodal.key)}
        self._write(_UNIMODAL, lambda path: write_tensors(path, tensors, about))

    def load_unimodal(self, config: TrainConfig, dims: dict[str, int], task: Task) -> UnimodalModels | None:
        path = self.path / _UNIMODAL
        if _UNIMODAL not in self.manifest:
            return None
        tensors, about = self._tensors(path)
        scores = parse_json(about.get("scores", ""), dict[str, Finite], str(path), _ADVICE)
        key = parse_json(about.get("key", ""), dict[str, Any], str(path), _ADVICE)
        models = {}
        try:
            for i, (name, dim) in enumerate(dims.items()):
                model = UnimodalModel(dim, task.outputs, config)
                model.load_state_dict(stripped(str(i), tensors))
                models[name] = model.eval().requires_grad_(False)
            if scores.keys() != dims.keys():
                raise KeyError(f"scores of {list(scores)}")
        except (RuntimeError, KeyError) as error:
            raise _foreign(path, error) from error
        return UnimodalModels(models, scores, key, task)

    def save_model(self, model: MultimodalModel) -> None:
        self._write(_MODEL, lambda path: write_tensors(path, model.state_dict()))

    def load_model(self, model: MultimodalModel) -> None:
        path = self.path / _MODEL
        try:
            model.load_state_dict(self._tensors(path)[0])
        except RuntimeError as error:
            raise _foreign(path, error) from error
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            raise InputError(f"{path} holds weights that are not finite; {_ADVICE}")
        model.eval()

    def _tensors(self, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        try:
            return read_tensors(self.manifest.content(path))
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{path} cannot be read ({error}); {_ADVICE}") from error

    def save_preprocessing(self, preprocessing: Preprocessing | None) -> None:
        if preprocessing is not None:
            self._write(_PREPROCESSING, lambda path: write_json(path, preprocessing.to_dict()))

    def load_preprocessing(self) -> Preprocessing | None:
        """None for a run on a data set that was made directly from tensors."""
        if _PREPROCESSING not in self.manifest:
            return None
        path = self.path / _PREPROCESSING
        return Preprocessing.from_dict(
            parse_json(self.manifest.content(path), PreprocessingDocument, str(path), _ADVICE)
        )

    def save_predictions(self, found: list[Predictions]) -> None:
        self._write(_PREDICTIONS, lambda path: write_npz(path, prediction_arrays(found)))

    def save_results(self, results: dict[str, Any]) -> None:
        self._write(_RESULTS, lambda path: write_json(path, results))


def _foreign(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"{path} does not fit its run ({reason}); {_ADVICE}")


def prediction_arrays(found: list[Predictions]) -> dict[str, np.ndarray]:
    """Arrays ``{part}/labels``, ``{part}/index`` and ``{part}/{condition}`` (answers ``[N, A]``)."""
    arrays = {}
    for p in found:
        arrays[f"{p.part}/labels"] = p.labels.numpy()
        arrays[f"{p.part}/index"] = p.index.numpy()
        arrays |= {f"{p.part}/{name}": t.numpy() for name, t in p.answers.items()}
    return arrays


def load_predictions(run_dir: str | Path) -> dict[str, Predictions]:
    """Per-sample predictions of a finished run by part: what bootstrap and paired tests start from.

    Raises:
        InputError: no readable predictions there.
    """
    folder = _finished(run_dir)
    path = folder.manifest.check(folder.path / _PREDICTIONS)
    found: dict[str, Predictions] = {}
    arrays = Archive(path)
    for key in arrays:
        part, _, name = key.partition("/")
        entry = found.setdefault(part, Predictions(part, torch.empty(0), torch.empty(0)))
        value = torch.from_numpy(arrays.read(key))
        if name in ("labels", "index"):
            setattr(entry, name, value)
        else:
            entry.answers[name] = value
    for part, entry in found.items():
        if any(len(value) != len(entry.index) for value in (entry.labels, *entry.answers.values())):
            raise InputError(f"{path} holds arrays of {part} with different numbers of rows; {_ADVICE}")
    return found


@dataclass
class LoadedRun:
    """A finished run: its model, settings and results."""

    model: MultimodalModel
    config: TrainConfig
    results: dict[str, Any]
    unimodal: UnimodalModels | None
    preprocessing: Preprocessing | None = None

    def predict(self, data: Any, **options: Any) -> RowPredictions:
        """Predictions for rows whose label need not be known, with the scaling, columns and categories of the run.

        ``data``: a path or name as for :func:`mmc_fast.experiments.data.load` (``options`` are its options), a table, a
        mapping from modality to table or array, or a data set (every row of it). Modalities and columns may lack, be in
        another order or be new. Raises InputError.
        """
        return predict_rows(self.model, self.preprocessing, self.results["data"]["name"], data, options)

    def as_adapter(self) -> RunAdapter:
        """The run as :func:`mmc_fast.diagnose` takes it, with its unimodal models."""
        return RunAdapter(self.model, self.unimodal, self.results["data"]["metric"])


def load_run(run_dir: str | Path) -> LoadedRun:
    """Open a finished run for evaluation or further use; every file in it is checked against its manifest.

    Raises:
        InputError: no run there, a run that is not finished, or files that are missing, changed, exchanged or cannot be
            read.
    """
    folder = _finished(run_dir)
    identity = folder.manifest.identity
    for name in folder.manifest.files:
        if "/" not in name:  # checkpoints are not read any more
            folder.manifest.check(folder.path / name)
    try:
        config = TrainConfig.from_dict(identity["config"])
        data = identity["data"]
        task = task_from_dict(data["task"])
        check_size(config, data["dims"], task.outputs)
        with torch.random.fork_rng(devices=[]):
            model = MultimodalModel(data["dims"], task.outputs, config, task)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _foreign(folder.path / MANIFEST, error) from error
    results = folder.results()
    differing = [k for k in ("config", "seed") if results[k] != identity[k]]
    if differing or any(results["data"].get(k) != v for k, v in data.items()):
        raise InputError(f"{folder.path / _RESULTS} is of another run than {MANIFEST} says; {_ADVICE}")
    with torch.random.fork_rng(devices=[]):
        folder.load_model(model)
        unimodal = folder.load_unimodal(config, data["dims"], task)
    return LoadedRun(model, config, results, unimodal, folder.load_preprocessing())


def _finished(run_dir: str | Path) -> RunFolder:
    """The folder of a finished run, with its manifest."""
    folder = RunFolder(run_dir)
    if not folder.begun:
        raise InputError(f"{run_dir} holds no run; give the folder that train wrote")
    folder.read()
    if not folder.finished:
        raise InputError(f"the run in {run_dir} is not finished; resume it first")
    return folder
