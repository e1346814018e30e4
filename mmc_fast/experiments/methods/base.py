"""``Method``: what a system of the comparison is, and ``Fitted``: what training it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from mmc_fast._util.numbers import shown
from mmc_fast._util.toml import merged
from mmc_fast.errors import InputError

from ..data import MultimodalDataset
from ..training import Progress, TrainConfig, UnimodalModels
from ..training.interrupt import InterruptGuard, Stage
from ..training.parts import fingerprint
from ..training.progress import Silent
from ..training.unimodal import train_unimodal

CANDIDATES = 4  # settings in every declared search: the same budget for all
BATCH_ROWS = 256  # rows that a method whose prediction depends on its batch is evaluated on together
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One training: data, every setting of the loop, the method's own options, the seed."""

    dataset: MultimodalDataset
    config: TrainConfig
    options: Settings
    seed: int
    progress: Progress | None = None


@dataclass
class Fitted:
    """A trained method.

    ``answer(features, present)``: answers of the task for rows with at least one modality. ``prior`` ``[A]`` answers for
    the others. ``batch_rows``: rows that are answered together, None where the answer does not depend on it.
    ``record``: plain facts about the training (validation score, selected epoch, ...).
    """

    answer: Callable[[Sequence[Tensor], Tensor], Tensor]
    prior: Tensor
    batch_rows: int | None
    record: dict[str, Any]

    def predict(self, features: Sequence[Tensor], present: Tensor) -> Tensor:
        """Answers ``[N, A]`` (class probabilities, ...) for features ``[N, d_i]`` and presence bool ``[N, m]``.

        Values of an absent modality are never read. Rows with nothing present get the prior.
        """
        rows = present.any(1).nonzero().flatten()
        result = self.prior.expand(len(present), -1).clone()
        size = self.batch_rows or max(1, len(rows))
        for some in rows.split(size):
            if len(some):
                result[some] = self.answer([x[some] for x in features], present[some])
        return result


@dataclass(frozen=True)
class Method:
    """A system of the comparison as a plug-in of the standard loop.

    Attributes:
        name, title, source: key, name in tables, and where it was published.
        fitter: trains it.
        search: the declared settings that are tried on the validation part, the default first; each is a mapping of
            ``TrainConfig`` fields, with the method's own under "options".
        fixed: settings of every candidate.
        batch_dependent: its prediction for a row depends on the other rows of the batch.
        baseline: a re-implementation of somebody else's method; its results have to pass the sanity threshold.
        classes_only: it cannot be trained on a task other than classification.
    """

    name: str
    title: str
    source: str
    fitter: Callable[[Task], Fitted]
    search: tuple[Settings, ...]
    fixed: Settings = field(default_factory=dict)
    batch_dependent: bool = False
    baseline: bool = False
    classes_only: bool = False

    def __post_init__(self) -> None:
        if len(self.search) != CANDIDATES:
            raise InputError(f"method {self.name}: {len(self.search)} candidates; every method declares {CANDIDATES}")

    def resolve(
        self, settings: Settings | None = None, budget: TrainConfig | None = None
    ) -> tuple[TrainConfig, dict[str, Any]]:
        """Every setting of a training, and the method's own options: budget, then ``fixed``, then ``settings``.

        ``settings=None`` takes the first candidate. Raises InputError for settings that do not exist.
        """
        values = merged(
            (budget or TrainConfig()).to_dict(), self.fixed, self.search[0] if settings is None else settings
        )
        options = values.pop("options", {})
        del values["method"]
        declared = [s.get("options", {}) for s in (self.fixed, *self.search)]
        known = {name for some in declared for name in some}
        for name, value in options.items():
            if name not in known:
                raise InputError(
                    f"method {self.name}: option {name!r} does not exist; allowed are {', '.join(sorted(known)) or 'none'}"
                )
            _check_option(
                f"method {self.name}: option {name}", value, [some[name] for some in declared if name in some]
            )
        return TrainConfig.from_dict(values), options

    def fit(
        self,
        dataset: MultimodalDataset,
        settings: Settings | None = None,
        seed: int = 0,
        *,
        budget: TrainConfig | None = None,
        progress: Progress | None = None,
    ) -> Fitted:
        """Train on the train part, select the epoch on the validation part; the test part is not read.

        Raises what :func:`mmc_fast.experiments.training.train` raises.
        """
        config, options = self.resolve(settings, budget)
        self.check_kind(dataset.task.kind, dataset.name)
        return self.fitter(Task(dataset, config, options, seed, progress))

    def check_kind(self, kind: str, where: str) -> None:
        """Raise InputError where this method is for classes and the task of the data ``where`` is another."""
        if self.classes_only and kind != "classification":
            raise InputError(f"method {self.name} is for classes and {where} holds a task of {kind}; leave it out")

    def with_settings(self, name: str, title: str, fixed: Settings) -> Method:
        """The same method with more fixed settings, under a name of its own."""
        return replace(self, name=name, title=title, fixed=merged(self.fixed, fixed))


def _check_option(where: str, value: Any, declared: Sequence[Any]) -> None:
    """An option has the type of the declared candidates; a number lies within a thousandfold of them."""
    kinds = {bool: "true or false", str: "a text", int: "a whole number", float: "a number"}
    kind = type(declared[0])
    if kind not in kinds:
        return
    if not isinstance(value, (int, float) if kind is float else kind) or (kind is not bool and isinstance(value, bool)):
        raise InputError(f"{where} is {shown(value)}; give {kinds[kind]}, such as {declared[0]}")
    if kind in (int, float):
        most = 1000 * max(1, *map(abs, declared))
        if not (min(0, *declared) <= value <= most):
            raise InputError(f"{where} is {shown(value)}; give a number from {min(0, *declared)} to {most:g}")


def unimodal_models(task: Task, guard: InterruptGuard | None = None) -> UnimodalModels:
    """One model for each modality, trained with the settings of the task."""
    on_epoch = (task.progress or Silent()).on_epoch
    stage = Stage("unimodal", on_epoch, guard=guard or InterruptGuard())
    data = task.dataset
    return train_unimodal(data, task.config, seed=task.seed, fingerprint=fingerprint(data), stage=stage)


def with_val_score(fitted: Fitted, dataset: MultimodalDataset) -> Fitted:
    """The same with the score on the validation part in its record."""
    held = dataset.part("validation")
    fitted.record["val_score"] = dataset.task.score(fitted.predict(held.features, held.present), held.labels)
    return fitted


def prior(dataset: MultimodalDataset) -> Tensor:
    """The answer ``[A]`` that is best for all rows of the train part alike."""
    task = dataset.task
    return task.answers(task.prior(dataset.labels[dataset.split == 0])[None])[0]
