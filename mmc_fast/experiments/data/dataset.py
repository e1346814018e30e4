"""The one shape in which every data set reaches models: named feature matrices, presence, labels, split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mmc_fast._util.names import check_name, printable, unknown
from mmc_fast.errors import InputError
from mmc_fast.experiments.data.preprocessing import Preprocessing
from mmc_fast.experiments.tasks import Classification, Task

PARTS = ("train", "validation", "test")
PURPOSES = ("training", "scoring", "prediction")
_CHECKED = 1 << 22  # values that are checked at a time


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of one part (train, validation or test), in the order of the data set.

    ``features[i]`` float32 [N, d_i], ``present`` bool [N, m], ``labels`` int64 [N], ``index`` int64 [N] = the rows
    in the data set that they come from. ``streamed``: the features lie in a file that is mapped into memory; read them
    batch by batch.
    """

    features: list[Tensor]
    present: Tensor
    labels: Tensor
    index: Tensor
    streamed: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: Tensor) -> Part:
        """The given rows (int64 positions, repeats allowed, or a bool mask [N]) as a new part."""
        return Part([x[rows] for x in self.features], self.present[rows], self.labels[rows], self.index[rows])

    def batches(self, rows: int = 4096) -> PartBatches:
        """The part in batches of ``rows``, each read when its turn comes."""
        return PartBatches(self, rows)


@dataclass(frozen=True)
class PartBatches:
    """A part as an iterable of smaller parts, in order; it can be read any number of times."""

    part: Part
    rows: int

    def __len__(self) -> int:
        return -(-len(self.part) // self.rows)

    def __iter__(self) -> Iterator[Part]:
        for start in range(0, len(self.part), self.rows):
            yield self.part.select(torch.arange(start, min(start + self.rows, len(self.part))))


@dataclass(frozen=True, eq=False)
class MultimodalDataset:
    """N samples seen through m named modalities, with natural presence, labels and a fixed split.

    Column i of ``present`` belongs to the i-th entry of ``features``. Where ``present[n, i]`` is False, row n of that
    feature matrix holds zeros; ``present`` is the authority, never a value. The object is checked when it is made:
    one that exists has finite features, labels that fit its task, three parts that are not empty, every class and every
    modality in train, at least one modality in every training row, and no id in two parts. ``streamed``: the features
    lie in a file that is mapped into memory, and each part is a run of rows. ``preprocessing``: how the features were
    made; ``row_names``: the id of each row as its source writes it. ``task``: what is predicted, with the shape of ``labels``
    (:mod:`mmc_fast.experiments.tasks`); without it ``num_classes`` classes, scored by ``metric``. ``purpose``: "training", or for a finished model
    "scoring", where parts and classes may be missing, and "prediction", where the labels are unknown (-1).

    Raises :class:`~mmc_fast.errors.InputError` with one line that names the first thing that is wrong.
    """

    name: str
    features: dict[str, Tensor]
    present: Tensor
    labels: Tensor
    split: Tensor
    num_classes: int
    metric: str
    feature_names: dict[str, list[str]]
    ids: Tensor | None = None
    info: dict[str, Any] = field(default_factory=dict)
    streamed: bool = False
    preprocessing: Preprocessing | None = None
    purpose: str = "training"
    row_names: list[str] | None = None
    task: Task = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.purpose not in PURPOSES:
            raise unknown("purpose", self.purpose, PURPOSES)
        for name in self.features:
            check_name(f"{printable(self.name)}: a modality", name)
        object.__setattr__(self, "name", printable(self.name))
        _check_shapes(self)
        _check_labels(self)
        if self.purpose == "training":
            _check_split(self)
            _check_presence(self)
            object.__setattr__(self, "task", self.task.fit(self.labels[self.split == 0]))
            object.__setattr__(self, "num_classes", self.task.outputs)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, labels or targets, in the order of the columns of a prediction."""
        return list(self.task.names)

    @classmethod
    def from_frames(
        cls,
        frames: Mapping[str, Any] | Any,
        *,
        label: str | Sequence[str],
        id: str | None = None,
        split: str | int = 0,
        name: str = "frames",
        standardise: bool = True,
        **roles: Any,
    ) -> MultimodalDataset:
        """A data set from pandas tables: ``{modality: table}`` joined by ``id``, or one table with ``modalities=``.

        Args:
            label: the column with the class or number, in any of the tables, or several columns: 0/1 of which each row has
                one 1, or what ``kind`` says.
            id: column that joins the tables; rows of one table that share it stay in one part.
            split: a column with "train", "validation" and "test", or the seed with which 60/10/30 are drawn.
            roles: ``modalities`` (name -> columns, for one table), ``group``, ``categorical``, ``kind``, ``nan_policy``.

        Text columns become one 0/1 column for each category of the training rows (docs/guides/data.md has the rule). Raises
        InputError that names table, column and repair.
        """
        return _frames().from_frames(frames, {"label": label, "id": id, **roles}, split, name, standardise=standardise)

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Any],
        label: Any,
        *,
        id: Any = None,
        split: Any = 0,
        names: Mapping[str, Sequence[str]] | None = None,
        present: Mapping[str, Any] | None = None,
        name: str = "arrays",
        kind: str | None = None,
        nan_policy: str = "error",
        standardise: bool = True,
    ) -> MultimodalDataset:
        """A data set from arrays ``[N, ...]`` of numbers, NaN = not measured, in one order of rows.

        Args:
            label: ``[N]`` text or numbers, or ``[N, C]`` with one 1 in each row, or what ``kind`` says. id: ``[N]``; an id stays in one part.
            split: ``[N]`` part names or 0, 1, 2; or the seed with which 60/10/30 are drawn.
            names: of the columns. present: bool ``[N]`` for modalities that say it; else a row of NaN is absent.
            kind: "classification", "multilabel", "regression" or "survival"; needed where the labels alone do not tell (docs/data.md).

        Raises InputError.
        """
        return _frames().from_arrays(
            arrays,
            label,
            id,
            split,
            names or {},
            present or {},
            name,
            kind,
            nan_policy=nan_policy,
            standardise=standardise,
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def modalities(self) -> list[str]:
        """Names in column order."""
        return list(self.features)

    @property
    def dims(self) -> dict[str, int]:
        """Width of each modality, in column order."""
        return {name: x.shape[1] for name, x in self.features.items()}

    def part(self, name: str) -> Part:
        """The rows of ``"train"``, ``"validation"`` or ``"test"``."""
        if name not in PARTS:
            raise unknown("part", name, PARTS)
        rows = torch.nonzero(self.split == PARTS.index(name)).flatten()
        if not len(rows):
            raise InputError(f"{self.name}: no row is in the {name} part; choose another part.")
        if self.streamed:
            run = slice(int(rows[0]), int(rows[-1]) + 1)
            features = [x[run] for x in self.features.values()]
            return Part(features, self.present[run], self.labels[run], rows, streamed=True)
        return Part([x[rows] for x in self.features.values()], self.present[rows], self.labels[rows], rows)

    def batches(self) -> PartBatches:
        """The test part in batches, as :func:`mmc_fast.diagnose` reads it."""
        return self.part("test").batches()

    def training_batches(self) -> PartBatches:
        """The training part in batches."""
        return self.part("train").batches()

    def keep(self, modalities: Sequence[str]) -> MultimodalDataset:
        """The data set with these modalities only, in the order of the data set.

        Training rows with none of them present are dropped, since nothing can be learned from them; validation and
        test rows stay, so that scores of different selections compare on the same rows.
        """
        wanted = check_selection(modalities, self.modalities)
        columns = [self.modalities.index(name) for name in wanted]
        present = self.present[:, columns]
        rows = torch.nonzero(present.any(1) | (self.split != 0)).flatten()
        return replace(
            self,
            features={name: self._rows(self.features[name], rows) for name in wanted},
            present=present[rows],
            labels=self.labels[rows],
            split=self.split[rows],
            feature_names={name: self.feature_names[name] for name in wanted},
            ids=None if self.ids is None else self.ids[rows],
            preprocessing=None if self.preprocessing is None else self.preprocessing.keep(wanted),
            row_names=None if self.row_names is None else [self.row_names[i] for i in rows.tolist()],
        )

    def _rows(self, x: Tensor, rows: Tensor) -> Tensor:
        if not self.streamed:
            return x[rows]
        if len(rows) < len(x):
            raise InputError(
                f"{self.name}: the selection drops rows of features that are mapped into memory; "
                "load the file with modalities=... instead"
            )
        return x


def _frames() -> Any:
    """The module that makes data sets of this class; it is looked up late, since it needs the class itself."""
    return import_module("mmc_fast.experiments.data.frames")


def check_selection(wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    """``wanted`` in the order of ``known``; raises InputError where it is empty, repeats or names a stranger."""
    if isinstance(wanted, str):
        raise TypeError(f"modalities must be a list of names, got the string {wanted!r}")
    for name in wanted:
        if name not in known:
            raise unknown("modality", name, known)
    if not wanted or len(set(wanted)) != len(wanted):
        raise InputError(
            f"The selection of modalities {list(wanted)} is empty or names one twice. Allowed: {', '.join(known)}."
        )
    return [name for name in known if name in wanted]


def _tensor(data: MultimodalDataset, what: str, x: object, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise unless ``x`` is a tensor of this dtype and shape (-1 = any length)."""
    if not isinstance(x, Tensor):
        raise InputError(f"{data.name}: {what} must be a tensor, got {type(x).__name__}.")
    fits = x.dim() == len(shape) and all(want in (-1, got) for want, got in zip(shape, x.shape, strict=True))
    if x.dtype != dtype or not fits:
        wanted = ", ".join("any" if n < 0 else str(n) for n in shape)
        raise InputError(
            f"{data.name}: {what} must be {str(dtype)[6:]} of shape [{wanted}], got {str(x.dtype)[6:]} {list(x.shape)}."
        )


def _check_shapes(data: MultimodalDataset) -> None:
    if not data.features:
        raise InputError(f"{data.name}: no modality; at least one is needed.")
    if not isinstance(data.labels, Tensor) or data.labels.dim() == 0:
        raise InputError(
            f"{data.name}: labels must be a tensor with one entry a row, got {type(data.labels).__name__}."
        )
    n, m = len(data.labels), len(data.features)
    _tensor(data, "split", data.split, torch.uint8, (n,))
    _tensor(data, "present", data.present, torch.bool, (n, m))
    if data.ids is not None:
        _tensor(data, "ids", data.ids, torch.int64, (n,))
    for name, x in data.features.items():
        _tensor(data, f"modality {name!r}", x, torch.float32, (n, -1))
        if x.shape[1] == 0:
            raise InputError(f"{data.name}: modality {name!r} has no feature; drop it or give it columns.")
        if not all(bool(torch.isfinite(piece).all()) for piece in x.split(max(1, _CHECKED // x.shape[1]))):
            raise InputError(
                f"{data.name}: modality {name!r} holds NaN or infinite values; choose a NaN policy when loading, "
                "and hold zeros where a modality is absent."
            )
        names = data.feature_names.get(name)
        if names is None or len(names) != x.shape[1]:
            got = "none" if names is None else str(len(names))
            raise InputError(f"{data.name}: modality {name!r} has {x.shape[1]} features and {got} feature names.")


def _check_labels(data: MultimodalDataset) -> None:
    """The task, of numbered classes where none is given, and that the labels are of it."""
    if data.task is None:
        number, single = data.num_classes, "the labels hold a single class; a classifier needs at least 2."
        if data.purpose == "training" and len(data.labels) and len(torch.unique(data.labels)) < 2:
            raise InputError(f"{data.name}: {single}")
        if data.purpose == "training" and number > len(data.labels):
            raise InputError(
                f"{data.name}: {number} classes for {len(data.labels)} rows; number the classes 0, 1, 2, ..."
            )
        object.__setattr__(data, "task", Classification.of(number, data.metric))
    if (data.num_classes, data.metric) != (data.task.outputs, data.task.metric):
        raise InputError(
            f"{data.name}: num_classes {data.num_classes} and metric {data.metric!r} are not those of the task, "
            f"{data.task.outputs} and {data.task.metric!r}; change the task, or give task=None."
        )
    if data.purpose != "prediction":
        data.task.check(data.labels, data.name)


def _check_split(data: MultimodalDataset) -> None:
    if (data.split > 2).any():
        row = int((data.split > 2).nonzero()[0])
        raise InputError(
            f"{data.name}: split code {int(data.split[row])} in row {row} is unknown; "
            "allowed are 0 train, 1 validation, 2 test."
        )
    for code, part in enumerate(PARTS):
        rows = data.split == code
        if not rows.any():
            raise InputError(
                f"{data.name}: the {part} part is empty; give it rows (split = {code}) or let the split be drawn."
            )
        data.task.check_part(data.labels[rows], part, data.name)
    if data.streamed and bool((data.split[1:] < data.split[:-1]).any()):
        raise InputError(f"{data.name}: the rows of streamed data must be in the order train, validation, test.")
    if data.ids is not None:
        _check_ids(data, data.ids)


def _check_ids(data: MultimodalDataset, ids: Tensor) -> None:
    """No id may be in two parts: the score would be that of a memory of the patient."""
    pairs = torch.unique(torch.stack([ids, data.split.long()], 1), dim=0)
    unique, counts = torch.unique_consecutive(pairs[:, 0], return_counts=True)
    shared = unique[counts > 1]
    if len(shared):
        codes = pairs[pairs[:, 0] == shared[0], 1].tolist()
        raise InputError(
            f"{data.name}: {len(shared)} id(s) are in more than one part (the first is {int(shared[0])}, in "
            f"{' and '.join(PARTS[c] for c in codes)}); give all rows of an id to one part."
        )


def _check_presence(data: MultimodalDataset) -> None:
    train = data.split == 0
    for i, name in enumerate(data.features):
        if not data.present[train, i].any():
            raise InputError(
                f"{data.name}: modality {name!r} is absent in every training row; leave it out or add rows with it."
            )
    empty = train & ~data.present.any(1)
    if empty.any():
        raise InputError(
            f"{data.name}: {int(empty.sum())} training row(s) have no modality present (the first is row "
            f"{int(empty.nonzero()[0])}); drop them."
        )
