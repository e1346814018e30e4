"""What a diagnosis measures, and how: every setting with its meaning, checked in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from torch import Tensor

from mmc_fast._util.names import unknown
from mmc_fast._util.numbers import make_plain
from mmc_fast._util.schema import Count, Positive, Range, Share, check_numbers
from mmc_fast.errors import InputError

from .absence import ABSENCES
from .tasks import METRICS, Metric, metric_name
from .verdict import THRESHOLDS, Thresholds


@dataclass(frozen=True)
class DiagnoseOptions:
    """Settings of :func:`mmc_fast.diagnose`; InputError for a value that has no meaning.

    Attributes:
        metric: "accuracy", "auroc" (two classes), "f1" (several labels a sample, micro-averaged), "macro_auroc" (their mean),
            "r2" (regression), "concordance" (survival: labels are time and event), "recall@1", "recall@5", "recall@10" (two towers,
            their embeddings the outputs side by side), or a function
            ``score(outputs [N, C], labels) -> float``, larger is better, judged on ``sample_rows`` samples. None: by the labels.
        absence: how a modality is taken away: "model" (the model's own handling, ``fuse(features, present)``; default where
            there is one), "resample" (features of other samples, one for all that are taken away together; default elsewhere),
            "mean" (the mean of the features).
        draws: how many other samples stand in for each one; None: enough for 2048 in all, at most 4.
        agop: sum AGOP and covariances of the layers. False: scores and verdicts alone, which is much faster.
        groups, resamples: uncertainty by a bootstrap over random groups of samples. level: of the intervals; that of the index,
            which verdicts go by, is 95 %.
        seed: of groups, samples and probes.
        reliance: score all coalitions of modalities (needs labels, at most 6 modalities; 2^m forwards of the fusion).
        probes: train a small network on each modality alone, on ``sample_rows`` samples: on its raw inputs where the adapter
            has ``inputs(batch)``, and on its features, which only bound its ability from below; the better one counts.
        control: also train networks on the features without each modality.
        utilisation: refit a linear head on the frozen features with and without each modality.
        remaining: rank and class variance of the fused representation without each modality, on 2048 rows.
        samples: keep the table of the sampled rows, ``Diagnosis.samples()``.
        emap: score the outputs without interactions of modalities on the first batch (256 forwards for each modality).
        alone: modality -> score, in the same metric, of a model of your own that knows this modality only. Better than the
            probe: a small network on few samples misses signal that is hard to learn, and a lost modality then looks weak. An
            adapter may bring such models: ``unimodal(batch) -> {modality: outputs}``.
        unimodal_weights: modality -> ``[h_i, d_i]`` of unimodal models, for the weight classifier.
        initial_weight: first Linear layer of the head at initialisation, for the neural feature matrix.
        sample_rows: samples that are kept for what needs rows: probes, controls, responses of neurons.
        tolerance: of the numerical rank, relative to the largest value.
        tau, energy: of the degree of polysemanticity. ridge: of the variance inflation.
        thresholds: where verdicts change.
    """

    metric: Metric | None = None
    absence: str | None = None
    draws: Annotated[int, Range(1, 1024, high_closed=True)] | None = None
    agop: bool = True
    groups: Annotated[int, Range(1, 1024, high_closed=True)] = 16
    resamples: Annotated[int, Range(0, 100_000, high_closed=True)] = 100
    level: Annotated[float, Range(0, 1, closed=False)] = 0.95
    seed: Annotated[int, Range(0, 2**63)] = 0
    reliance: bool = True
    probes: bool = True
    control: bool = False
    utilisation: bool = False
    remaining: bool = False
    emap: bool = False
    samples: bool = False
    alone: Mapping[str, float] | None = None
    unimodal_weights: Mapping[str, Tensor] | None = None
    initial_weight: Tensor | None = None
    sample_rows: Count = 4096
    tolerance: Share = 1e-3
    tau: Annotated[float, Range(0, 1, closed=False, high_closed=True)] = 0.5
    energy: Annotated[float, Range(0, 1, closed=False, high_closed=True)] = 0.99
    ridge: Positive = 1e-6
    thresholds: Thresholds = THRESHOLDS

    def __post_init__(self) -> None:
        make_plain(self)  # NumPy's numbers are taken
        check_numbers("diagnose", self)
        if not callable(self.metric) and self.metric is not None and self.metric not in METRICS:
            raise InputError(
                f"diagnose: unknown metric {metric_name(self.metric)!r}; known are {', '.join(METRICS)}, or give a function"
            )
        if self.absence is not None and self.absence not in ABSENCES:
            raise unknown("absence", self.absence, ABSENCES)
        for name, score in (self.alone or {}).items():
            bounded = self.metric is None or self.metric in METRICS
            if bounded and not (score <= 1 and (score >= 0 or self.metric == "r2")):
                raise InputError(f"diagnose: alone[{name!r}] is {score}; give a score between 0 and 1, not in percent")

    def override(self, changes: Mapping[str, Any]) -> DiagnoseOptions:
        """A copy with some fields changed; InputError for a name that is no option."""
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                raise unknown("option of diagnose", name, known)
        return replace(self, **changes)
