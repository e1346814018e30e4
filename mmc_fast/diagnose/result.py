"""The numbers of a diagnosis with their uncertainty, the settings behind them, their JSON and their comparison."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmc_fast import __version__
from mmc_fast._util.extras import MissingExtra, require
from mmc_fast._util.files import replace_file, user_path
from mmc_fast.errors import InputError

from .verdict import ModalityVerdict, overall

if TYPE_CHECKING:
    from typing_extensions import Self

SCHEMA_VERSION = 3


@dataclass(frozen=True)
class Measure:
    """A value (None: not defined here), its standard error and its interval over samples (None: fixed by the weights)."""

    value: float | None
    error: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "–"
        return f"{self.value:.3g}" if self.low is None else f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def around(
    value: float, error: float, level: float, freedom: float = math.inf,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> Measure:  # fmt: skip
    """A measure with the interval of Student's t, normal without ``freedom``, cut off at ``limits``: what the measure can be."""
    half = float(require("scipy.stats", extra="diagnose").t.ppf((1 + level) / 2, freedom)) * error
    return Measure(value, error, max(value - half, limits[0]), min(value + half, limits[1]))


@dataclass(frozen=True)
class DiagnosisData:
    """Numbers and verdicts of a diagnosis.

    Attributes:
        modalities: name -> width of its features. n_samples: N. metric: of the scores ("accuracy", "auroc", or None).
        measures: name -> :class:`Measure`; ``docs/guides/diagnose.md`` lists the names.
        arrays: what is no single number: block energies, spectra, neuron shares, scores of coalitions.
        verdicts: one per modality. notes: what could not be measured, and why.
        settings: groups, resamples, level, seed, tolerances and how the AGOP was summed.
    """

    modalities: dict[str, int]
    n_samples: int
    metric: str | None
    measures: dict[str, Measure]
    arrays: dict[str, Any]
    verdicts: list[ModalityVerdict]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    version: str = __version__

    def __getitem__(self, name: str) -> Measure:
        if name not in self.measures:
            raise KeyError(f"no measure {name!r} here; there are: {', '.join(self.measures)}")
        return self.measures[name]

    def value(self, name: str) -> float | None:
        """The value of a measure; None where it was not measured or is not defined."""
        return self.measures[name].value if name in self.measures else None

    def with_measures(self, measures: Mapping[str, Measure]) -> Self:
        """A copy with further measures, such as ``"prefix_gap.audio"`` or ``"denoising_r2"``, which need a second model."""
        return replace(self, measures=self.measures | dict(measures))

    def summary(self) -> str:
        """The verdict in plain words with its evidence."""
        lines = [overall(self.verdicts, self.value("neuron_entropy"), self.settings["thresholds"])]
        lines += [verdict.sentence(self.metric) for verdict in self.verdicts]
        return "\n".join([*lines, *self.notes])

    def to_frame(self) -> Any:
        """The measures as a pandas DataFrame: index "measure", columns value, error, low, high; MissingExtra without pandas."""
        pandas = _pandas()
        columns = ["value", "error", "low", "high"]
        rows = [[getattr(m, column) for column in columns] for m in self.measures.values()]
        index = pandas.Index(list(self.measures), name="measure")
        return pandas.DataFrame(rows, index=index, columns=columns, dtype=float)

    def samples(self) -> Any:
        """The sampled rows as a pandas DataFrame, the silent failures first; of ``diagnose(..., samples=True)``.

        Columns: row (position in the data), label, predicted, confidence (with all modalities), and for each modality M
        predicted_without.M, confidence_without.M, silent_failure.M (right with all, and wrong with 90 % confidence once M is
        gone). Raises InputError where no classes were scored, MissingExtra without pandas.
        """
        if "samples" not in self.arrays:
            raise InputError("samples: this diagnosis has none; diagnose labelled classes with samples=True")
        frame = _pandas().DataFrame(self.arrays["samples"])
        silent = frame[[f"silent_failure.{name}" for name in self.modalities]].any(axis=1)
        return (
            frame.assign(_silent=~silent).sort_values(["_silent", "row"]).drop(columns="_silent").reset_index(drop=True)
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text with a schema version and a checksum; also written to ``path`` in one step where one is given."""
        values = plain({"schema_version": SCHEMA_VERSION, "kind": "diagnosis"} | asdict(self))
        text = json.dumps(values | {"sha256": _digest(values)}, indent=1, allow_nan=False)
        if path is not None:
            replace_file(path, text + "\n")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """The inverse of :meth:`to_json`: JSON text, or the path of a file with it.

        Raises InputError for anything else, for another schema version and for numbers that were changed.
        """
        from mmc_fast._util.documents import parse_json, read_json

        from .schema import DiagnosisDocument

        given = isinstance(source, str) and source.lstrip().startswith("{")
        advice = "give what Diagnosis.to_json() of this release wrote, or write it anew"
        where = "the diagnosis" if given else f"the diagnosis {str(source)!a}"
        if given:
            values = parse_json(str(source), DiagnosisDocument, where, advice)
        else:
            values = read_json(user_path(source), DiagnosisDocument, advice)
        known = {f.name for f in fields(DiagnosisData)}
        if values.pop("sha256") != _digest(values) or values.keys() - known != {"schema_version", "kind"}:
            raise InputError(f"{where} was changed after it was written (its checksum does not match); {advice}")
        if [v["modality"] for v in values["verdicts"]] != list(values["modalities"]):
            raise InputError(f"{where} has verdicts on other modalities than its own; {advice}")
        measures = {name: Measure(**m) for name, m in values["measures"].items()}
        verdicts = [ModalityVerdict(**v) for v in values["verdicts"]]
        return cls(**{k: values[k] for k in known} | {"measures": measures, "verdicts": verdicts})

    def compare(self, other: DiagnosisData) -> DiagnosisComparison:
        """This diagnosis minus ``other``, measure by measure (other model or other data, same modality names).

        Raises InputError where the modalities have other names, TypeError where ``other`` is no diagnosis.
        """
        if not isinstance(other, DiagnosisData):
            raise TypeError(
                f"compare: got {type(other).__name__}; give another Diagnosis, such as Diagnosis.from_json(path)"
            )
        if list(self.modalities) != list(other.modalities):
            raise InputError(
                f"compare: the diagnoses are of modalities {list(self.modalities)} and {list(other.modalities)}; "
                "compare models of the same modalities"
            )
        return DiagnosisComparison.of(self, other)


@dataclass(frozen=True)
class DiagnosisComparison:
    """Measures of two diagnoses side by side: name -> (first, second, difference).

    The interval of a difference takes the two as independent. On the same samples that is too wide, never too narrow as
    long as the two rise and fall together.
    """

    rows: dict[str, tuple[Measure, Measure, Measure]]
    changed_verdicts: dict[str, tuple[str, str]]

    @classmethod
    def of(cls, first: DiagnosisData, second: DiagnosisData) -> DiagnosisComparison:
        rows = {}
        for name, a in first.measures.items():
            b = second.measures.get(name, Measure(None))
            if a.value is None or b.value is None:
                continue
            difference = Measure(a.value - b.value)
            if a.low is not None and a.high is not None and b.low is not None and b.high is not None:
                half = math.hypot((a.high - a.low) / 2, (b.high - b.low) / 2)
                error = math.hypot(a.error or 0.0, b.error or 0.0)
                difference = Measure(a.value - b.value, error, a.value - b.value - half, a.value - b.value + half)
            rows[name] = (a, b, difference)
        kinds = {v.modality: v.kind for v in second.verdicts}
        changed = {v.modality: (v.kind, kinds[v.modality]) for v in first.verdicts if v.kind != kinds[v.modality]}
        return cls(rows, changed)

    def __str__(self) -> str:
        width = max((len(name) for name in self.rows), default=7)
        lines = [f"{'measure':<{width}}  {'first':>9}  {'second':>9}  difference"]
        for name, (a, b, d) in self.rows.items():
            star = " *" if d.low is not None and d.high is not None and (d.low > 0 or d.high < 0) else ""
            lines.append(f"{name:<{width}}  {a.value:>9.4g}  {b.value:>9.4g}  {d}{star}")
        lines += [f"verdict on {name}: {a} (first), {b} (second)" for name, (a, b) in self.changed_verdicts.items()]
        return "\n".join([*lines, "* the interval of the difference excludes 0"])


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _pandas() -> Any:
    try:
        import pandas
    except ModuleNotFoundError:
        raise MissingExtra("pandas is not installed; run: pip install pandas") from None
    return pandas


def plain(value: Any) -> Any:
    """JSON values: NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
