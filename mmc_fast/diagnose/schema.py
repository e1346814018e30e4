"""The forms of what a diagnosis leaves on disk: its JSON, and the header of the sums of an unfinished one."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from typing_extensions import TypedDict

from mmc_fast._util.documents import Count0, Finite

from .verdict import KINDS

Digest = Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]
Kind = Annotated[str, pydantic.Field(pattern=f"^({'|'.join(KINDS)})$")]


class _Measure(TypedDict):
    value: Finite | None
    error: Finite | None
    low: Finite | None
    high: Finite | None


class _Verdict(TypedDict):
    modality: str
    kind: Kind
    evidence: dict[str, Finite | None]


class DiagnosisDocument(TypedDict):
    """What ``Diagnosis.to_json`` writes."""

    schema_version: Literal[3]
    kind: Literal["diagnosis"]
    modalities: dict[str, Count0]
    n_samples: Count0
    metric: str | None
    measures: dict[str, _Measure]
    arrays: dict[str, Any]
    verdicts: list[_Verdict]
    settings: dict[str, Any]
    notes: list[str]
    version: str
    sha256: Digest


class StateHeader(TypedDict):
    """The first line of a state file: what it belongs to, what wrote it, and the hash and size of all after that line."""

    kind: Literal["diagnosis state"]
    version: int
    meaning: list[Any]
    mmc_fast: str
    command: str
    sha256: Digest
    size: Count0
