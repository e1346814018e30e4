"""Loaders of the data sets: mfeat and support2 are in the package, the others in the folder MMC_DATA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mmc_fast.experiments.data.archive import Archive
from mmc_fast.experiments.data.avmnist_paper import PAPER_VARIANTS, paper_rows
from mmc_fast.experiments.data.dataset import check_selection
from mmc_fast.experiments.data.info import DatasetInfo, Entry, locate
from mmc_fast.experiments.data.npz import column_names, read_npz
from mmc_fast.experiments.data.raw import RawDataset
from mmc_fast.experiments.tasks import Classification

MFEAT = DatasetInfo(
    name="mfeat",
    title="six views of 2,000 handwritten numerals",
    modalities=("fou", "fac", "kar", "pix", "zer", "mor"),
    tasks=("digit",),
    metric="accuracy",
    source="UCI Multiple Features",
    licence="CC BY 4.0",
)
SUPPORT2 = DatasetInfo(
    name="support2",
    title="five clinical views of 9,105 seriously ill patients",
    modalities=("demographics", "disease", "vitals", "labs", "function"),
    tasks=("hospital_death",),
    metric="auroc",
    source="SUPPORT (UCI SUPPORT2)",
    licence="CC BY 4.0",
)
_FSDD = "Free Spoken Digit Dataset, CC BY-SA 4.0"
AVMNIST = DatasetInfo(
    name="avmnist",
    title="handwritten digit and spoken digit, 18,000 pairs",
    modalities=("image", "audio"),
    tasks=("digit",),
    metric="accuracy",
    source="MNIST and Free Spoken Digit Dataset, paired by digit",
    licence=f"MNIST CC BY-SA 3.0, {_FSDD}",
    variants=("plain", "speaker", "hard", *PAPER_VARIANTS),
)
AVMNIST_SMALL = replace(
    AVMNIST, name="avmnist_small", title="the same, 5,000 pairs: a fixture", variants=("plain", "speaker")
)
FSDD = DatasetInfo(
    name="fsdd_logmel20",
    title="3,000 spoken digits as 20x20 log-mel pictures; one modality",
    modalities=("audio",),
    tasks=("digit",),
    metric="accuracy",
    source="Free Spoken Digit Dataset",
    licence=_FSDD,
    variants=("recording", "speaker"),
)
P2012 = DatasetInfo(
    name="p2012",
    title="8,000 intensive care stays, first 48 hours",
    modalities=("static", "vitals", "labs", "support"),
    tasks=("hospital_death",),
    metric="auroc",
    source="PhysioNet/Computing in Cardiology Challenge 2012, sets a and b",
    licence="open access (PhysioNet)",
)
DIABETES130 = DatasetInfo(
    name="diabetes130",
    title="101,766 hospital encounters of patients with diabetes",
    modalities=("demographics", "admission", "utilisation_labs", "diagnoses", "medications", "disposition"),
    tasks=("readmission", "death"),
    metric="auroc",
    source="UCI Diabetes 130-US Hospitals for Years 1999-2008",
    licence="CC BY 4.0",
)
EICU_DEMO = DatasetInfo(
    name="eicu_demo",
    title="2,520 intensive care stays, first 24 hours; whole views absent by nature",
    modalities=(
        "demographics",
        "bedside",
        "labs",
        "bp_series",
        "diagnoses",
        "treatments",
        "medications",
        "history",
    ),
    tasks=("hospital_death", "readmission"),
    metric="auroc",
    source="eICU Collaborative Research Database Demo 2.0",
    licence="ODbL 1.0",
)
MIMIC4_DEMO = DatasetInfo(
    name="mimic4_demo",
    title="275 hospital admissions of 100 patients: too small to compare methods",
    modalities=("demographics", "diagnoses", "procedures", "medications", "labs"),
    tasks=("death", "readmission"),
    metric="auroc",
    source="MIMIC-IV Clinical Database Demo 2.2",
    licence="ODbL 1.0",
)
MIMIC4 = DatasetInfo(
    name="mimic4",
    title="hospital admissions of adults in MIMIC-IV 2.2 or later: the data of the paper, for credentialed users",
    modalities=("demographics", "diagnoses", "procedures", "medications", "labs", "vitals"),
    tasks=("death", "readmission"),
    metric="auroc",
    source="MIMIC-IV Clinical Database, 2.2 or later",
    licence="PhysioNet Credentialed Health Data License 1.5.0",
)


def _embedded(info: DatasetInfo, modalities: Sequence[str] | None) -> RawDataset:
    return read_npz(locate(info.name), modalities=info.modalities if modalities is None else modalities)


def _avmnist(info: DatasetInfo, variant: str | None, modalities: Sequence[str] | None) -> RawDataset:
    """``plain``: no recording in two parts; ``speaker``: no speaker in two parts; ``hard``: the image as its four
    leading principal components, the audio with three other recordings mixed in at 0 dB."""
    archive = Archive(locate(info.name))
    if variant in PAPER_VARIANTS:
        return _avmnist_paper(archive, PAPER_VARIANTS[variant], modalities)
    pair = archive.read("audio_index_speaker" if variant == "speaker" else "audio_index")
    views = {}
    for view in check_selection(info.modalities if modalities is None else modalities, info.modalities):
        if view == "image":
            views[view] = archive.read("image_pca_coef" if variant == "hard" else "image")
        else:
            views[view] = archive.read("audio_babble") if variant == "hard" else archive.read("audio_bank")[pair]
    return RawDataset(
        name=info.name,
        views=views,
        labels=archive.read("label"),
        split=archive.read("split"),
        task=Classification.of(10, info.metric),
        ids=pair.astype(np.int64),
    )


def _avmnist_paper(archive: Archive, share: float | None, modalities: Sequence[str] | None) -> RawDataset:
    """``paper``: 1,500 recordings of three speakers; ``paper-95`` and so on: with rows that have no audio."""
    image, recording, split, heard = paper_rows(archive, share)
    wanted = check_selection(AVMNIST.modalities if modalities is None else modalities, AVMNIST.modalities)
    views = {"image": archive.read("image")[image], "audio": archive.read("audio_bank")[recording]}
    return RawDataset(
        name=AVMNIST.name,
        views={view: views[view] for view in wanted},
        labels=archive.read("label")[image],
        split=split,
        task=Classification.of(10, AVMNIST.metric),
        present={"audio": heard} if "audio" in wanted else {},
        ids=recording.astype(np.int64),
    )


def _fsdd(task: str, variant: str | None, modalities: Sequence[str] | None) -> RawDataset:
    """The split is by recording or by speaker."""
    check_selection(FSDD.modalities if modalities is None else modalities, FSDD.modalities)
    archive = Archive(locate(FSDD.name))
    by_speaker = variant == "speaker"
    return RawDataset(
        name=FSDD.name,
        views={"audio": archive.read("logmel")},
        labels=archive.read("digit"),
        split=archive.read("speaker_split" if by_speaker else "rec_split"),
        task=Classification.of(10, FSDD.metric),
        ids=archive.read("speaker") if by_speaker else None,
    )


def _clinical(
    info: DatasetInfo, modalities: Sequence[str] | None, *, label: str, ids: str, views: Sequence[str] | None = None
) -> tuple[Archive, RawDataset]:
    """The wanted views of a clinical file; ``views`` = those that the task allows."""
    allowed = info.modalities if views is None else views
    archive = Archive(locate(info.name))
    wanted = check_selection(allowed if modalities is None else modalities, allowed)
    arrays = {view: archive.read(f"x_{view}") for view in wanted}
    names = {
        view: column_names(archive.text(f"names_{view}"), x.shape, f"{archive.path}: names_{view}")
        for view, x in arrays.items()
    }
    raw = RawDataset(
        name=info.name,
        views=arrays,
        labels=archive.read(label),
        split=archive.read("split"),
        task=Classification.of(2, info.metric),
        names=names,
        ids=archive.read(ids),
        nan_policy="indicator",
    )
    return archive, raw


def _select(raw: RawDataset, rows: np.ndarray) -> RawDataset:
    """``raw`` with the rows where the mask is True."""
    return replace(
        raw,
        views={view: x[rows] for view, x in raw.views.items()},
        present={view: x[rows] for view, x in raw.present.items()},
        labels=raw.labels[rows],
        split=raw.split[rows],
        ids=None if raw.ids is None else raw.ids[rows],
        row_names=None,
    )


def _diabetes130(task: str, variant: str | None, modalities: Sequence[str] | None) -> RawDataset:
    """``readmission``: within 30 days against later or never, of the encounters that could be followed; ``death``:
    died in hospital, without the view ``disposition``, which tells the outcome."""
    if task == "death":
        views = [view for view in DIABETES130.modalities if view != "disposition"]
        return _clinical(DIABETES130, modalities, label="y_died", ids="patient", views=views)[1]
    archive, raw = _clinical(DIABETES130, modalities, label="y_readmit", ids="patient")
    return _select(replace(raw, labels=(raw.labels == 2).astype(np.int64)), archive.read("eligible") == 1)


def _eicu_demo(task: str, variant: str | None, modalities: Sequence[str] | None) -> RawDataset:
    """``hospital_death``: stays with an unknown outcome (255) are left out; ``readmission`` to intensive care in the
    same hospital stay: patients who died there, or whose fate is unknown, are left out.

    A view is absent for a stay where nothing in it was measured (all NaN) or recorded (all zero, for the views that
    list what happened).
    """
    death = task == "hospital_death"
    label = "y_hospital_death" if death else "y_icu_readmit"
    archive, raw = _clinical(EICU_DEMO, modalities, label=label, ids="patient")
    lists = [view for view in raw.views if view in ("diagnoses", "treatments", "medications", "history")]
    recorded = {view: (raw.views[view] != 0).any(1) for view in lists}
    known = raw.labels != 255 if death else archive.read("y_unit_death") == 0
    return _select(replace(raw, present=recorded), known)


def _mimic4_demo(task: str, variant: str | None, modalities: Sequence[str] | None) -> RawDataset:
    """``readmission`` within 30 days of the admissions that the patient survived; ``death`` in hospital."""
    if task == "death":
        return _clinical(MIMIC4_DEMO, modalities, label="y_death", ids="patient")[1]
    archive, raw = _clinical(MIMIC4_DEMO, modalities, label="y_readmit30", ids="patient")
    return _select(raw, archive.read("y_death") == 0)


def _mimic4(task: str, variant: str | None, modalities: Sequence[str] | None) -> RawDataset:
    """As the demo, with vital signs where the tables of intensive care were there. A view is absent for an admission
    where nothing in it was measured or recorded."""
    held = Archive(locate(MIMIC4.name))
    views = [view for view in MIMIC4.modalities if f"x_{view}" in held]
    archive, raw = _clinical(
        MIMIC4, modalities, label="y_death" if task == "death" else "y_readmit30", ids="patient", views=views
    )
    lists = [view for view in raw.views if view in ("diagnoses", "procedures", "medications")]
    raw = replace(raw, present={view: (raw.views[view] != 0).any(1) for view in lists})
    return raw if task == "death" else _select(raw, archive.read("y_death") == 0)


ENTRIES: tuple[Entry, ...] = (
    (MFEAT, lambda task, variant, modalities: _embedded(MFEAT, modalities)),
    (SUPPORT2, lambda task, variant, modalities: replace(_embedded(SUPPORT2, modalities), nan_policy="indicator")),
    (AVMNIST, lambda task, variant, modalities: _avmnist(AVMNIST, variant, modalities)),
    (AVMNIST_SMALL, lambda task, variant, modalities: _avmnist(AVMNIST_SMALL, variant, modalities)),
    (FSDD, _fsdd),
    (P2012, lambda task, variant, modalities: _clinical(P2012, modalities, label="y", ids="record")[1]),
    (DIABETES130, _diabetes130),
    (EICU_DEMO, _eicu_demo),
    (MIMIC4_DEMO, _mimic4_demo),
    (MIMIC4, _mimic4),
)
