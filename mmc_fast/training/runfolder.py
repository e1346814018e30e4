"""The folder of a run: what identifies it, what it leaves behind, and how to open it again."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .. import __version__
from ..errors import InputError
from .atomic import write_json, write_npz, write_tensors
from .checkpoint import CheckpointStore, prefixed, stripped
from .config import TrainConfig
from .evaluate import Predictions
from .model import MultimodalModel
from .unimodal import UnimodalModel, UnimodalModels

__all__ = ["LoadedRun", "RunFolder", "load_predictions", "load_run"]

RUN_VERSION = 1
_RUN, _RESULTS, _MODEL, _UNIMODAL, _PREDICTIONS = (
    "run.json",
    "results.json",
    "model.safetensors",
    "unimodal.safetensors",
    "predictions.npz",
)


def _differences(old: Any, new: Any, where: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in [*old, *(k for k in new if k not in old)]:
            found += _differences(old.get(key), new.get(key), f"{where}.{key}" if where else str(key))
        return found
    return [] if old == new else [f"{where} was {old!r} and is now {new!r}"]


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); restore it or train again in another folder") from error


class RunFolder:
    """Files of one run below ``path``; every write is atomic, and results.json comes last."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: str | Path, identity: dict[str, Any], resume: bool) -> RunFolder:
        """Create the folder for a new run, or open the folder of the same run again.

        Raises:
            InputError: without ``resume`` a folder that is not empty; with it a folder without a run, or one whose
                configuration, seed, data or evaluated parts differ.
        """
        folder = cls(Path(path))
        try:
            return folder._open(identity, resume)
        except OSError as error:
            raise InputError(f"run_dir {path} cannot be used ({error}); name a folder that can be written") from error

    def _open(self, identity: dict[str, Any], resume: bool) -> RunFolder:
        path, record = self.path, self.path / _RUN
        if path.exists() and not path.is_dir():
            raise InputError(f"run_dir {path} is a file; name a folder")
        if resume:
            if not record.is_file():
                raise InputError(f"nothing to resume: {path} holds no run; start it without resume")
            found = _differences(self.read(_RUN)["identity"], identity, "")
            if found:
                raise InputError(f"{path} holds another run: {'; '.join(found[:3])}; choose another run_dir")
            return self
        if path.is_dir() and any(path.iterdir()):
            what = "a run already; resume it or choose" if record.is_file() else "other files; choose"
            raise InputError(f"run_dir {path} holds {what} another folder")
        path.mkdir(parents=True, exist_ok=True)
        self.write(_RUN, {"run_version": RUN_VERSION, "mmc_fast_version": __version__, "identity": identity})
        return self

    def read(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"{self.path / name} cannot be read ({error}); is this the folder of a run?") from error

    def write(self, name: str, value: Any) -> None:
        write_json(self.path / name, value)

    @property
    def finished(self) -> bool:
        return (self.path / _RESULTS).is_file()

    def results(self) -> dict[str, Any]:
        return self.read(_RESULTS)

    def checkpoints(self, stage: str, keep: int) -> CheckpointStore:
        return CheckpointStore(self.path / "checkpoints" / stage, keep)

    def save_unimodal(self, unimodal: UnimodalModels) -> None:
        tensors: dict[str, Tensor] = {}
        for name, model in unimodal.models.items():
            tensors |= prefixed(name, model.state_dict())
        about = {"scores": json.dumps(unimodal.scores), "key": json.dumps(unimodal.key)}
        write_tensors(self.path / _UNIMODAL, tensors, about)

    def load_unimodal(self, config: TrainConfig, dims: dict[str, int], num_classes: int) -> UnimodalModels | None:
        path = self.path / _UNIMODAL
        if not path.is_file():
            return None
        tensors = _tensors(path)
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
        models = {}
        for name, dim in dims.items():
            model = UnimodalModel(dim, num_classes, config)
            model.load_state_dict(stripped(name, tensors))
            models[name] = model.eval().requires_grad_(False)
        return UnimodalModels(models, json.loads(about["scores"]), json.loads(about["key"]))

    def save_model(self, model: MultimodalModel) -> None:
        write_tensors(self.path / _MODEL, model.state_dict())

    def load_model(self, model: MultimodalModel) -> None:
        model.load_state_dict(_tensors(self.path / _MODEL))
        model.eval()

    def save_predictions(self, found: list[Predictions]) -> None:
        write_npz(self.path / _PREDICTIONS, prediction_arrays(found))

    def save_results(self, results: dict[str, Any]) -> None:
        self.write(_RESULTS, results)


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
        with np.load(path, allow_pickle=False) as arrays:
            for key in arrays.files:
                part, name = key.split("/", 1)
                entry = found.setdefault(part, Predictions(part, torch.empty(0), torch.empty(0)))
                value = torch.from_numpy(arrays[key])
                if name in ("labels", "index"):
                    setattr(entry, name, value)
                else:
                    entry.probabilities[name] = value
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read ({error}); is this the folder of a finished run?") from error
    return found


@dataclass
class LoadedRun:
    """A finished run: its model, settings and results."""

    model: MultimodalModel
    config: TrainConfig
    results: dict[str, Any]
    unimodal: UnimodalModels | None


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
    run = folder.read(_RUN)
    if run.get("run_version") != RUN_VERSION:
        raise InputError(
            f"{run_dir} has run version {run.get('run_version')}; this version of mmc-fast reads {RUN_VERSION}"
        )
    identity = run["identity"]
    config = TrainConfig.from_dict(identity["config"])
    data = identity["data"]
    with torch.random.fork_rng(devices=[]):
        model = MultimodalModel(data["dims"], data["num_classes"], config)
        folder.load_model(model)
        unimodal = folder.load_unimodal(config, data["dims"], data["num_classes"])
    return LoadedRun(model, config, folder.results(), unimodal)
