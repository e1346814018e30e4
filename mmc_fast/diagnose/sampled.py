"""What is measured on the sample of rows that the first pass kept: probes, controls, neurons that pass on noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmc_fast._util.extras import MissingExtra
from mmc_fast.errors import InputError

from .collect import Collector
from .layers import ChainSums, jacobian_rows
from .measures import weights
from .measures.polysemanticity import NeuronResponse, neuron_response
from .measures.probes import modality_probe
from .measures.reliance import Afresh, train_afresh
from .options import DiagnoseOptions
from .reservoir import Reservoir
from .result import Measure, around
from .tasks import BOUNDED

_GRADIENT_ROWS = 512


def features_of(collector: Collector, reservoir: Reservoir | None = None) -> dict[str, Tensor]:
    """The kept rows by modality."""
    kept = collector.reservoir if reservoir is None else reservoir
    return dict(zip(collector.widths, kept.columns["x"].split(list(collector.widths.values()), 1), strict=True))


def probe_measures(
    measures: dict[str, Measure],
    notes: list[str],
    collector: Collector,
    o: DiagnoseOptions,
    given: Mapping[str, float],
    training: Reservoir | None,
) -> dict[str, Afresh]:
    """Scores of networks trained on single modalities and, as a control, without each; ``given`` scores are taken over.

    Returns by modality the network that tells its ability.

    They train on the rows of ``training``, where there are such, and the diagnosed ones judge; else these do both. A modality is
    probed on its raw inputs, where these are kept, and on its features; the better network tells its ability.
    """
    assert collector.task is not None
    measures |= {f"alone.{name}": Measure(float(score)) for name, score in given.items()}
    names, judged = list(collector.widths), None
    source = collector.reservoir if training is None else training
    features, labels = features_of(collector, source), source.columns["labels"]
    for name in names:
        if f"input.{name}" in source.columns:
            features[f"input.{name}"] = source.columns[f"input.{name}"]
    if training is not None:
        own = collector.reservoir.columns
        tested = features_of(collector) | {n: own[n] for n in features if n.startswith("input.")}
        judged = (tested, own["labels"])
    wanted: dict[str, tuple[str, ...]] = {}
    for name in names:
        if f"alone.{name}" not in measures:
            wanted[f"probe_features.{name}"] = (name,)
            if f"input.{name}" in features:
                wanted[f"probe_inputs.{name}"] = (f"input.{name}",)
    if o.control:
        wanted |= {f"retrained_without.{name}": tuple(n for n in names if n != name) for name in names}
        wanted["retrained_all"] = tuple(names)
    try:
        found = {
            subset: train_afresh(features, labels, subset, task=collector.task, seed=o.seed, judged=judged)
            for subset in dict.fromkeys(wanted.values())
        }
    except MissingExtra:
        raise
    except InputError as error:
        notes.append(f"No network was trained on single modalities: {error}.")
        return {}
    limits = (0.0, 1.0) if collector.task.metric in BOUNDED else (-math.inf, math.inf)
    for name, subset in wanted.items():
        measures[name] = around(found[subset].score, found[subset].error, o.level, limits=limits)
    best = {}
    for name in names:
        probes = [p for p in (f"probe_features.{name}", f"probe_inputs.{name}") if p in wanted]
        if probes:
            chosen = max(probes, key=lambda p: found[wanted[p]].score)
            measures[f"alone.{name}"], best[name] = measures[chosen], found[wanted[chosen]]
    blind = [n for n in names if f"probe_features.{n}" in measures and f"probe_inputs.{n}" not in measures]
    if blind:
        notes.append(
            f"Ability of {', '.join(blind)} was probed on the encoders' features, which bounds it from below: a collapsed "
            "modality's own encoder may never have learned. Give alone= or an adapter with inputs(batch) or unimodal(batch)."
        )
    return best


def latent_measures(measures: dict[str, Measure], reservoir: Reservoir, seed: int) -> None:
    """The post-hoc modality probe on the latents, where the adapter has some."""
    latents = {n.removeprefix("latent."): x for n, x in reservoir.columns.items() if n.startswith("latent.")}
    if len(latents) < 2:
        return
    whole = torch.stack([x.isfinite().all(1) for x in latents.values()]).all(0)
    latents = {name: x[whole] for name, x in latents.items()}
    if int(whole.sum()) >= 20:
        found = modality_probe(latents, seed=seed)
        measures["modality_probe.balanced_accuracy"] = Measure(found["balanced_accuracy"])
        measures["modality_probe.chance"] = Measure(found["chance"])


def neuron_measures(measures: dict[str, Measure], arrays: dict[str, Any], collector: Collector) -> None:
    """What the first layer's neurons pass on; with labels, how much noise of other modalities meets their signal."""
    if not isinstance(collector.layers, ChainSums):
        return
    chain, columns = collector.layers, collector.reservoir.columns
    x, weight = columns["x"], chain.weights[0]
    if len(chain.positions) > 1:
        some = x[:_GRADIENT_ROWS]
        first = chain.modules[0]
        tail = nn.Sequential(*chain.modules[1:])
        device = next(first.parameters()).device
        with torch.no_grad():
            z = first(some.to(device))
        squared = torch.zeros_like(z)
        for row in jacobian_rows(lambda f: tail(f["z"]), {"z": z}):
            squared += row.square()
        shares = weights.attribution_shares(weight, some, squared.cpu(), collector.widths)
        entropy = weights.modality_entropy(shares)
        measures["attribution_entropy"] = Measure(float(entropy.nanmean()) if entropy.isfinite().any() else None)
    if collector.task is None or collector.task.kind != "classes":
        return
    if "labels" not in columns or len(columns["labels"].unique()) < 2 or len(collector.widths) < 2:
        return
    signal, noise = weights.signal_noise_shares(weight, x, columns["labels"], collector.widths)
    home = signal.argmax(1)
    foreign = noise.sum(1) - noise.gather(1, home[:, None])[:, 0]
    alive = (signal + noise).sum(1) > 0
    measures["foreign_noise"] = Measure(float(foreign[alive].mean()) if alive.any() else None)
    if alive.any() and len(x) >= 64 and len(chain.positions) > 1:
        with torch.no_grad():
            device = next(chain.modules[0].parameters()).device
            activation = chain.modules[1](chain.modules[0](x.to(device))).cpu()
        # Neurons that answer and have some signal at all, by how much noise of others they carry.
        spread = activation.std(0)
        shown = alive & (signal.amax(1) > 0.02) & (spread > 0.05 * spread.max())
        if shown.any():
            score = foreign.masked_fill(~shown, math.nan).numpy()
            most, least = int(np.nanargmax(score)), int(np.nanargmin(score))
            arrays["responses"] = [
                _response(collector, k, activation[:, k], weight, home, noise, columns["labels"]) for k in (most, least)
            ]


def _response(
    collector: Collector, k: int, activation: Tensor, weight: Tensor, home: Tensor, noise: Tensor, labels: Tensor
) -> dict[str, Any]:
    """Response of neuron k to the signal of its home modality and to the noise of the loudest other one."""
    names = list(collector.widths)
    features = features_of(collector)
    parts = dict(zip(names, weight.split(list(collector.widths.values()), 1), strict=True))
    own = names[int(home[k])]
    others = noise[k].clone()
    others[int(home[k])] = -1
    foreign = names[int(others.argmax())]
    means = {}
    for name in (own, foreign):
        x = features[name].double()
        x = x - x.mean(0)
        mean = torch.zeros_like(x)
        for label in labels.unique():
            mean[labels == label] = x[labels == label].mean(0)
        means[name] = (mean, x - mean)
    # The direction between classes that the neuron reads, in the features themselves: class means alone are few values.
    signal, reading = means[own][0], parts[own][k].double()
    predictive = features[own].double() @ (signal.t() @ (signal @ reading))
    noisy = means[foreign][1] @ parts[foreign][k].double()
    found: NeuronResponse = neuron_response(activation.double(), predictive, noisy, bins=9)
    return {
        "neuron": k, "signal of": own, "noise of": foreign, "centres": list(found.centres),
        "predictive": list(found.predictive), "noisy": list(found.noisy), "overlap": found.overlap,
        "entangled": found.entangled,
    }  # fmt: skip
