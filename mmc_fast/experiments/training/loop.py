"""``train``: the stages of a run in order, from data and settings to a finished results record."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mmc_fast._util.names import unknown
from mmc_fast._util.numbers import check_seed
from mmc_fast._util.seeds import seeded_init
from mmc_fast.errors import InputError
from mmc_fast.ops.dispatch import ran

from ..data import MultimodalDataset
from ..data.dataset import PARTS
from .checkpoint import Checkpoint, CheckpointStore
from .config import TrainConfig
from .distillation import DistillationMeta, distil
from .evaluate import Predictions, measure
from .expert_weights import fit_experts
from .interrupt import InterruptGuard, Stage
from .model import MultimodalModel, select_modalities
from .parts import fingerprint, task_of
from .processes import Processes, join
from .progress import ProcessesDiffer, Progress, Silent
from .record import adversarial_figures, results_of
from .runfolder import RunFolder, load_run
from .size import check_size
from .trainer import Trainer, TrainerMeta
from .unimodal import UnimodalMeta, UnimodalModels, train_unimodal, unimodal_key


@dataclass
class TrainResult:
    """What a run leaves.

    ``model``: the selected one. ``results``: the content of results.json. ``unimodal``: to hand to the next method.
    ``predictions``: per sample, one entry for each evaluated part (empty for a finished run that was opened again).
    """

    model: MultimodalModel
    results: dict[str, Any]
    unimodal: UnimodalModels | None = None
    run_dir: Path | None = None
    predictions: list[Predictions] = field(default_factory=list)


def train(
    dataset: MultimodalDataset,
    config: TrainConfig,
    *,
    seed: int,
    run_dir: str | Path | None = None,
    resume: bool | Literal["auto"] = False,
    progress: Progress | None = None,
    unimodal: UnimodalModels | None = None,
    evaluate_on: Sequence[str] = ("test",),
    device: str = "cpu",
    distributed: bool | None = None,
) -> TrainResult:
    """Train, select and score one model; the same function for every method.

    Stages: unimodal models, distillation (KD), the run, its λ = 0 control (EBR), evaluation.

    Args:
        seed: everything random is derived from it; the same seed and number of threads give the same numbers on
            the CPU.
        run_dir: folder for checkpoints and results (new or empty); None keeps everything in memory.
        resume: continue the run in ``run_dir`` (it must be the same run); a finished one is opened and returned. "auto"
            continues where there is a run and begins where there is none, so that one command can be repeated.
        unimodal: models of an earlier run with the same data, seed and settings, to save their training.
        evaluate_on: parts that are scored; the first one is results["scores"]. The test part is read for nothing else,
            so ``("validation",)`` never touches it. ``()`` scores nothing.
        device: "cpu", "cuda" or "cuda:N". Bitwise repeats are promised on the CPU only.
        distributed: share each batch among processes: None where torchrun started several, True always, False never. All processes call ``train`` with the same arguments and get the same result; the
            first one writes. With "cuda" each takes the device of its LOCAL_RANK.

    Raises:
        InputError: arguments that do not fit each other or the data; nothing has been written then.
        Interrupted: Ctrl-C or SIGTERM; state saved where there is a ``run_dir``.
        TrainingDiverged: a loss became NaN or infinite.
        SaveFailed: a full disk or a folder that cannot be written; the last good checkpoint is kept.
        ProcessLost: another process of a distributed run died.

    Examples:
        >>> from mmc_fast.experiments.training import TrainConfig, train
        >>> dataset = mmc_fast.experiments.data.synthetic(300, modalities=2, seed=0)
        >>> result = train(dataset, TrainConfig.preset("vanilla", epochs=2), seed=0)
        >>> sorted(result.results["scores"]["reliance"])
        ['a', 'b']
    """
    run = _Run(dataset, config, seed, progress or Silent(), tuple(evaluate_on), join(device, distributed))
    return run.execute(run_dir, resume, unimodal)


class _Run:
    def __init__(
        self,
        dataset: MultimodalDataset,
        config: TrainConfig,
        seed: int,
        progress: Progress,
        evaluate_on: tuple[str, ...],
        processes: Processes,
    ) -> None:
        for part in evaluate_on:
            if part not in PARTS:
                raise unknown("part", part, PARTS)
        if config.kd is not None and len(dataset.modalities) < 2:
            raise InputError(f"kd needs at least 2 modalities and {dataset.name} has {len(dataset.modalities)}")
        if config.reweight_modality is not None and config.reweight_modality not in dataset.modalities:
            raise unknown("reweight_modality", config.reweight_modality, dataset.modalities)
        self.heads = 0
        if config.ebr is not None:
            self.heads = len(select_modalities(dataset.modalities, config.ebr.modalities))
        check_size(config, dataset.dims, dataset.task.outputs)
        self.dataset, self.config, self.seed = dataset, config, check_seed(seed)
        self.progress, self.evaluate_on = progress if processes.first else Silent(), evaluate_on
        self.processes, self.device = processes, processes.device
        self.guard = InterruptGuard()
        self.guard.agreed = None if processes.size == 1 else False
        self.folder: RunFolder | None = None  # of the first process
        self.unimodal: UnimodalModels | None = None
        self.timing: dict[str, float] = {}
        self.fingerprint, self.task = fingerprint(dataset), task_of(dataset, config)
        self.ran_before = ran()

    @property
    def trivial(self) -> bool:
        """Whether λ cannot change anything, so that the λ = 0 control would be the run itself."""
        ebr = self.config.ebr
        return ebr is None or ebr.reversal == 0 or self.heads < 2

    @property
    def reference(self) -> str | None:
        return self.unimodal.strongest if self.unimodal is not None else None

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run."""
        d = self.dataset
        data: dict[str, Any] = {"name": d.name, "fingerprint": self.fingerprint, "dims": d.dims}
        data |= {"task": self.task.to_dict(), "metric": self.task.metric}
        return {
            "config": self.config.to_dict(),
            "seed": self.seed,
            "data": data,
            "evaluate_on": list(self.evaluate_on),
            "device": self.device.type,
        }

    def execute(self, run_dir: str | Path | None, resume: bool | str, unimodal: UnimodalModels | None) -> TrainResult:
        key = unimodal_key(self.dataset, self.config, self.seed, self.fingerprint)
        if unimodal is not None and unimodal.key != key:
            raise InputError(
                "unimodal: these models belong to other data, another seed or other settings; leave them out"
            )
        if resume not in (True, False, "auto"):
            raise InputError(f"resume is {resume!r}; allowed are True, False and 'auto'")
        if resume and run_dir is None:
            raise InputError("resume needs run_dir, the folder of the run to continue")
        advice = "give all the same data, settings and seed, or pass distributed=False for runs of their own"
        try:
            self.processes.check_same("arguments", json.dumps(self.identity(), sort_keys=True).encode(), advice)
        except ProcessesDiffer as error:
            raise InputError(f"train: {error}") from error
        if run_dir is not None:
            self.processes.kept = lambda: f"its checkpoints are in {run_dir}; start it again with resume"
            if self.processes.agree(lambda: self._open(run_dir, resume)):
                loaded = load_run(run_dir)
                return TrainResult(loaded.model, loaded.results, loaded.unimodal, Path(run_dir))
        try:
            with self.guard:
                return self._stages(unimodal)
        finally:
            if self.folder is not None:
                self.folder.close()

    def _open(self, run_dir: str | Path, resume: bool | str) -> bool:
        """Open the run folder; True where the run in it is finished."""
        self.folder = RunFolder.open(run_dir, self.identity(), resume)
        if self.folder.finished:
            self.folder.close()
        return self.folder.finished

    def _stages(self, unimodal: UnimodalModels | None) -> TrainResult:
        started = time.perf_counter()
        folder, dims, task = self.folder, self.dataset.dims, self.task
        stored = self.processes.agree(lambda: folder and folder.load_unimodal(self.config, dims, task))
        self.unimodal = unimodal or stored
        self.processes.check_same(
            "unimodal models", b"1" if unimodal else b"0", "give them to all processes or to none"
        )
        main = self._checkpoint("train", TrainerMeta)
        control = self._checkpoint("control", TrainerMeta)
        alone = self._checkpoint("unimodal", UnimodalMeta) if self.unimodal is None else None
        stages = ("train", "control")
        taught = {stage: self._checkpoint(f"{stage}-distillation", DistillationMeta) for stage in stages}
        self.progress.on_start(self._epochs_left(alone, main, control, taught), self.config.method)
        if self.unimodal is None and self.config.unimodal_epochs:
            self.unimodal = self.processes.broadcast(self._timed("unimodal", lambda: self._train_unimodal(alone)))
        for model in self.unimodal.models.values() if self.unimodal is not None else ():
            model.to(self.device)  # those of the first process come from its device
        if self.folder is not None and stored is None and self.unimodal is not None:
            self.folder.save_unimodal(self.unimodal)
            self.folder.checkpoints("unimodal", 1).clear()
        run = self._fit("train", self.config, main, taught["train"])
        control_run = None
        if self.config.control and not self.trivial and self.config.ebr is not None:
            zero = replace(self.config, ebr=replace(self.config.ebr, reversal=0.0))
            control_run = self._fit("control", zero, control, taught["control"])
        adversarial = self._timed("adversarial", lambda: adversarial_figures(run, control_run, self.trivial))
        self._check_guard("the evaluation")
        scores, predictions = self._timed("evaluate", lambda: self._evaluate(run.model))
        self._check_guard("the evaluation")
        self.timing["total_seconds"] = time.perf_counter() - started
        results = self.processes.agree(
            lambda: results_of(
                run, adversarial=adversarial, trivial=self.trivial, scores=scores, unimodal=self.unimodal,
                data=self.identity()["data"], ran_before=self.ran_before, timing=self.timing,
            )
        )  # fmt: skip
        if self.folder is not None:
            self.folder.save_model(run.model)
            self.folder.save_preprocessing(self.dataset.preprocessing)
            self.folder.save_predictions(predictions)
            self.folder.save_results(results)
        self.progress.on_end(results)
        return TrainResult(
            run.model, results, self.unimodal, None if self.folder is None else self.folder.path, predictions
        )

    def _check_guard(self, stage: str) -> None:
        self._agree_to_stop()
        self.guard.check(stage)

    def _agree_to_stop(self) -> None:
        if self.processes.size > 1:
            self.guard.agreed = self.processes.any(self.guard.requested)

    def _on_stage_epoch(self, record: dict[str, Any]) -> None:
        """Progress of a stage that every process goes through by itself; it ends in all of them at the same epoch."""
        self.progress.on_epoch(record)
        self._agree_to_stop()

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        self.timing[f"{name}_seconds"] = time.perf_counter() - started
        return result

    def _store(self, stage: str) -> CheckpointStore | None:
        return None if self.folder is None else self.folder.checkpoints(stage, self.config.keep_checkpoints)

    def _checkpoint(self, stage: str, schema: Any) -> Checkpoint | None:
        store = self._store(stage)
        return self.processes.agree(lambda: None if store is None else store.latest(schema))

    def _stage(self, name: str, on_epoch: Callable[[dict[str, Any]], None], checkpoint: Checkpoint | None) -> Stage:
        return Stage(name, on_epoch, self._store(name), self.guard, self.config.checkpoint_seconds, checkpoint)

    def _train_unimodal(self, checkpoint: Checkpoint | None) -> UnimodalModels:
        stage = self._stage("unimodal", self._on_stage_epoch, checkpoint)
        return train_unimodal(
            self.dataset, self.config, seed=self.seed, fingerprint=self.fingerprint, device=self.device, stage=stage
        )

    def _epochs_left(
        self,
        alone: Checkpoint | None,
        main: Checkpoint | None,
        control: Checkpoint | None,
        taught: dict[str, Checkpoint | None],
    ) -> int:
        config = self.config
        total = 0
        if self.unimodal is None:
            total = config.unimodal_epochs - (0 if alone is None else int(alone.meta["epoch"]))
        runs = {"train": main} if self.trivial or not config.control else {"train": main, "control": control}
        for stage, checkpoint in runs.items():
            total += config.epochs - (0 if checkpoint is None else int(checkpoint.meta["epoch"]))
            if checkpoint is None and config.kd is not None:
                m = len(self.dataset.modalities)
                once = config.kd.teachers == "strongest" or config.kd.order == "simultaneous"
                pairs = m - 1 if once else m * (m - 1) // 2
                total += pairs * config.kd.epochs - _epochs_taught(taught[stage], config.kd.epochs)
        return total

    def _fit(
        self, stage: str, config: TrainConfig, checkpoint: Checkpoint | None, taught: Checkpoint | None
    ) -> Trainer:
        """Train one model from scratch or from its checkpoint; the run and its control share this."""
        with seeded_init(self.seed, "init"):
            model = MultimodalModel(self.dataset.dims, self.task.outputs, config, self.task)
        model = model.to(self.device)
        model.prior.copy_(self.task.prior(self.dataset.labels[self.dataset.split == 0]))
        trainer = Trainer(
            model,
            self.dataset,
            config,
            seed=self.seed,
            reference=self.reference,
            stage=self._stage(stage, self.progress.on_epoch, checkpoint),
            processes=self.processes,
        )
        if checkpoint is not None:
            trainer.restore(checkpoint)
        elif config.kd is not None and self.unimodal is not None:
            teachers, kd = self.unimodal, config.kd
            lesson = self._stage(f"{stage}-distillation", self._on_stage_epoch, taught)
            done = self._timed(
                "distillation",
                lambda: distil(
                    model, self.dataset, teachers, kd, seed=self.seed, nonfinite=config.nonfinite, stage=lesson
                ),
            )
            model.load_state_dict(self.processes.broadcast(model.state_dict()))
            trainer.about = {"distilled": done}
            trainer.autosave.save()
            if lesson.store is not None:
                lesson.store.clear()
        self._timed(stage, trainer.fit)
        if model.experts is not None and self.unimodal is not None:
            model.experts.take(self.unimodal)
            fit_experts(model, self.dataset.part("validation"), config.rates, self.seed)
        self.timing[f"{stage}_seconds"] = sum(r["seconds"] for r in trainer.history)
        return trainer

    def _evaluate(self, model: MultimodalModel) -> tuple[list[dict[str, Any]], list[Predictions]]:
        scores, predictions = [], []
        for part in self.evaluate_on:
            result, found = measure(
                model, self.dataset, part, self.config.rates, self.seed, self.unimodal, True, "prior",
                self.config.rates_modality,
            )  # fmt: skip
            scores.append(result)
            predictions.append(found)
        return scores, predictions


def _epochs_taught(checkpoint: Checkpoint | None, epochs: int) -> int:
    if checkpoint is None:
        return 0
    pair = checkpoint.meta["pair"]
    return len(checkpoint.meta["done"]) * epochs + (0 if pair is None else int(pair["epoch"]))
