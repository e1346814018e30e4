"""Standard training loop: one function for vanilla training, modality dropout, KD and EBR, by configuration."""

from mmc_fast._util.atomic import SaveFailed

from .config import METHODS, PRESETS, KDConfig, TrainConfig
from .evaluate import Predictions, evaluate, predict
from .loop import TrainResult, train
from .model import MultimodalModel
from .progress import Interrupted, ProcessLost, Progress, TrainingDiverged
from .record import SCHEMA_VERSION
from .runfolder import LoadedRun, load_predictions, load_run
from .unimodal import UnimodalModels

__all__ = [
    "METHODS",
    "PRESETS",
    "SCHEMA_VERSION",
    "Interrupted",
    "KDConfig",
    "LoadedRun",
    "MultimodalModel",
    "Predictions",
    "ProcessLost",
    "Progress",
    "SaveFailed",
    "TrainConfig",
    "TrainResult",
    "TrainingDiverged",
    "UnimodalModels",
    "evaluate",
    "load_predictions",
    "load_run",
    "predict",
    "train",
]
