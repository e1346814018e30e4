"""The folder of a run: what identifies it, what it leaves behind, and how to open it again."""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmc_fast import __version__
from mmc_fast._util.atomic import read_tensors, save_errors, write_json, write_npz, write_tensors
from mmc_fast.errors import InputError

from ..data.archive import Archive
from ..data.preprocessing import Preprocessing
from .adapter import RunAdapter
from .checkpoint import CheckpointStore, prefixed, stripped
from .config import TrainConfig
from .evaluate import Predictions
from .lock import LOCK_NAME, FolderLock
from .model import MultimodalModel
from .rows import RowPredictions, predict_rows
from .unimodal import UnimodalModel, UnimodalModels

__all__ = ["LoadedRun", "RunFolder", "load_predictions", "load_run"]

_RUN, _RESULTS, _PREDICTIONS = "run.json", "results.json", "predictions.npz"
_MODEL, _UNIMODAL = "model.safetensors", "unimodal.safetensors"
_PREPROCESSING = "preprocessing.json"


def _differences(old: Any, new: Any, where: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(k for k in new if k not in old)]:
            found += _differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
        return found
    return [] if old == new else [f"{where} was {old!r} and is now {new!r}"]


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        return read_tensors(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); restore it or train again in another folder") from error


class RunFolder:
    """Files of one run below ``path``; every write is atomic, and results.json comes last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = ""  # identifies the run in its checkpoints
        self._lock = FolderLock(path / LOCK_NAME, f"run_dir {path}")

    @classmethod
    def open(cls, path: str | Path, identity: dict[str, Any], resume: bool | str) -> RunFolder:
        """Create the folder for a new run, or open the folder of the same run again; :meth:`close` unlocks it.

        Raises:
            InputError: without ``resume`` a folder that is not empty; with it a folder without a run, or one whose
                configuration, seed, data or evaluated parts differ; a folder in which another run works.
        """
        folder = cls(Path(path))
        resume = (folder.path / _RUN).is_file() if resume == "auto" else bool(resume)
        folder.run = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        try:
            folder._check(identity, resume)
            if not (resume and folder.finished):  # a finished run is only read
                folder.path.mkdir(parents=True, exist_ok=True)
                folder._lock.acquire()
            if not resume:
                folder._begin(identity)
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

    def _check(self, identity: dict[str, Any], resume: bool) -> None:
        path, record = self.path, self.path / _RUN
        if path.exists() and not path.is_dir():
            raise InputError(f"run_dir {path} is a file; name a folder")
        if not resume:
            self._check_empty()
            return
        if not record.is_file():
            raise InputError(f"nothing to resume: {path} holds no run; start it without resume")
        found = _differences(self.record()["identity"], identity, "")
        if found:
            raise InputError(f"{path} holds another run: {'; '.join(found[:3])}; choose another run_dir")

    def _check_empty(self) -> None:
        if not self.path.is_dir():
            return
        # A kill during the very first write leaves its temporary file, and a killed run its lock.
        mine = (LOCK_NAME, f".{_RUN}.")
        if any(not p.name.startswith(mine) for p in self.path.iterdir()):
            what = "a run already; resume it or choose" if (self.path / _RUN).is_file() else "other files; choose"
            raise InputError(f"run_dir {self.path} holds {what} another folder")

    def _begin(self, identity: dict[str, Any]) -> None:
        self._check_empty()  # again, now that nobody else can write
        self.write(_RUN, {"mmc_fast_version": __version__, "identity": identity})

    def record(self) -> dict[str, Any]:
        """run.json."""
        run = self.read(_RUN)
        if not isinstance(run.get("identity"), dict):
            raise InputError(f"{self.path / _RUN} cannot be read (it names no run); restore it or train again")
        return run

    def read(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
            if not isinstance(value, dict):
                raise ValueError(f"it holds a {type(value).__name__}")
            return value
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{self.path / name} cannot be read ({error}); is this the folder of a run?") from error

    def write(self, name: str, value: Any) -> None:
        with self._saving(name):
            write_json(self.path / name, value)

    def _saving(self, name: str) -> AbstractContextManager[None]:
        return save_errors(self.path / name, lambda: "the checkpoints are still there")

    @property
    def finished(self) -> bool:
        return (self.path / _RESULTS).is_file()

    def results(self) -> dict[str, Any]:
        return self.read(_RESULTS)

    def checkpoints(self, stage: str, keep: int) -> CheckpointStore:
        return CheckpointStore(self.path / "checkpoints" / stage, keep, self.run)

    def save_unimodal(self, unimodal: UnimodalModels) -> None:
        tensors: dict[str, Tensor] = {}
        for name, model in unimodal.models.items():
            tensors |= prefixed(name, model.state_dict())
        about = {"scores": json.dumps(unimodal.scores), "key": json.dumps(unimodal.key)}
        with self._saving(_UNIMODAL):
            write_tensors(self.path / _UNIMODAL, tensors, about)

    def load_unimodal(self, config: TrainConfig, dims: dict[str, int], num_classes: int) -> UnimodalModels | None:
        path = self.path / _UNIMODAL
        if not path.is_file():
            return None
        tensors, about = _tensors(path)
        models = {}
        try:
            for name, dim in dims.items():
                model = UnimodalModel(dim, num_classes, config)
                model.load_state_dict(stripped(name, tensors))
                models[name] = model.eval().requires_grad_(False)
            return UnimodalModels(models, json.loads(about["scores"]), json.loads(about["key"]))
        except (RuntimeError, KeyError, ValueError) as error:
            raise _foreign(path, error) from error

    def save_model(self, model: MultimodalModel) -> None:
        with self._saving(_MODEL):
            write_tensors(self.path / _MODEL, model.state_dict())

    def load_model(self, model: MultimodalModel) -> None:
        try:
            model.load_state_dict(_tensors(self.path / _MODEL)[0])
        except RuntimeError as error:
            raise _foreign(self.path / _MODEL, error) from error
        model.eval()

    def save_preprocessing(self, preprocessing: Preprocessing | None) -> None:
        if preprocessing is not None:
            self.write(_PREPROCESSING, preprocessing.to_dict())

    def load_preprocessing(self) -> Preprocessing | None:
        """None for a run on a data set that was made directly from tensors."""
        if not (self.path / _PREPROCESSING).is_file():
            return None
        try:
            return Preprocessing.from_dict(self.read(_PREPROCESSING))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _foreign(self.path / _PREPROCESSING, error) from error

    def save_predictions(self, found: list[Predictions]) -> None:
        with self._saving(_PREDICTIONS):
            write_npz(self.path / _PREDICTIONS, prediction_arrays(found))

    def save_results(self, results: dict[str, Any]) -> None:
        self.write(_RESULTS, results)


def _foreign(path: Path, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(f"{path} does not fit its run ({reason}); restore it or train again in another folder")


def prediction_arrays(found: list[Predictions]) -> dict[str, np.ndarray]:
    """Arrays ``{part}/labels``, ``{part}/index`` and ``{part}/{condition}`` (class probabilities ``[N, C]``)."""
    arrays = {}
    for p in found:
        arrays[f"{p.part}/labels"] = p.labels.numpy()
        arrays[f"{p.part}/index"] = p.index.numpy()
        arrays |= {f"{p.part}/{name}": t.numpy() for name, t in p.probabilities.items()}
    return arrays


def load_predictions(run_dir: str | Path) -> dict[str, Predictions]:
    """Per-sample predictions of a finished run by part: what bootstrap and paired tests start from.

    Raises:
        InputError: no readable predictions there.
    """
    path = Path(run_dir) / _PREDICTIONS
    found: dict[str, Predictions] = {}
    try:
        arrays = Archive(path)
        for key in arrays:
            part, name = key.split("/", 1)
            entry = found.setdefault(part, Predictions(part, torch.empty(0), torch.empty(0)))
            value = torch.from_numpy(arrays.read(key))
            if name in ("labels", "index"):
                setattr(entry, name, value)
            else:
                entry.probabilities[name] = value
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({error}); is this the folder of a finished run?") from error
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
    """Open a finished run for evaluation or further use.

    Raises:
        InputError: no run there, a run that is not finished, or files that cannot be read.
    """
    folder = RunFolder(Path(run_dir))
    if not (folder.path / _RUN).is_file():
        raise InputError(f"{run_dir} holds no run; give the folder that train wrote")
    if not folder.finished:
        raise InputError(f"the run in {run_dir} is not finished; resume it first")
    identity = folder.record()["identity"]
    try:
        config = TrainConfig.from_dict(identity["config"])
        data = identity["data"]
        with torch.random.fork_rng(devices=[]):
            model = MultimodalModel(data["dims"], data["num_classes"], config)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise _foreign(folder.path / _RUN, error) from error
    with torch.random.fork_rng(devices=[]):
        folder.load_model(model)
        unimodal = folder.load_unimodal(config, data["dims"], data["num_classes"])
    return LoadedRun(model, config, folder.results(), unimodal, folder.load_preprocessing())
