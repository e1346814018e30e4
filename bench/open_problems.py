"""Four open problems of the talk on multimodal collapse, as numbers (docs/results/open-problems.md).

``python bench/open_problems.py docs/results/open-problems.jsonl --seeds 5`` runs the (set, seed) pairs that the log lacks, appends a
line for each, and prints the table: paired differences with Student's 95 % interval over seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from scipy.stats import spearmanr
from torch import Tensor

from mmc_fast.diagnose.adapter import flat
from mmc_fast.diagnose.measures.information import components, gaussian_information, one_hot
from mmc_fast.diagnose.measures.polysemanticity import neuron_response
from mmc_fast.diagnose.measures.probes import denoising_r2, noise_component
from mmc_fast.diagnose.measures.weights import neuron_modality_shares
from mmc_fast.experiments.data import MultimodalDataset, Part, SyntheticModality, load, synthetic
from mmc_fast.experiments.paper import paired
from mmc_fast.experiments.paper.inside import alone, fused
from mmc_fast.experiments.training import MultimodalModel, TrainConfig, train
from mmc_fast.experiments.training.adapter import RunAdapter

EPOCHS, BATCH = 20, 64
PRESETS = {"vanilla": "vanilla", "KD": "kd", "dropout": "dropout", "EBR": "robust", "EBR, λ = 0": "robust"}
ROWS = 512  # training rows of the Hessian


def data(name: str, seed: int) -> MultimodalDataset:
    """mfeat, or modalities that differ in what they say of the label and in nothing else."""
    if name == "mfeat":
        return load("mfeat")
    kinds = {f"r{100 * r:.0f}": SyntheticModality(reliability=r) for r in (0.95, 0.8, 0.65, 0.5)}
    return synthetic(1500, modalities=kinds, num_classes=4, seed=seed)


def configs(weakest: str) -> dict[str, TrainConfig]:
    common: dict[str, Any] = {"epochs": EPOCHS, "batch_size": BATCH, "selection": "last", "rates": (), "control": False}
    found = {name: TrainConfig.preset(preset, **common) for name, preset in PRESETS.items()}
    for name in ("EBR", "EBR, λ = 0"):
        heads = found[name].ebr
        assert heads is not None
        reversal = heads.reversal if name == "EBR" else 0.0
        found[name] = replace(found[name], ebr=replace(heads, backend="reference", reversal=reversal))
    weighted = replace(
        found["vanilla"], reweight_modality=weakest, reweight=4.0, reweight_form="loss", unimodal_share=0.0
    )
    return found | {"re-weighted": weighted}


def information_use(model: MultimodalModel, dataset: MultimodalDataset) -> dict[str, float | None]:
    """Do neurons of the fusion's first layer go to the modalities that say most of the label?"""
    train_part, test = dataset.part("train"), dataset.part("test")
    known = [gaussian_information(components(x), one_hot(train_part.labels)) for x in train_part.features]
    received = RunAdapter(model).encode(test)
    weight = next(p for p in model.fusion.parameters() if p.dim() == 2)
    widths = {name: z.shape[1] for name, z in received.items()}
    shares = neuron_modality_shares(weight.detach(), widths, torch.cov(flat(received).T.double())).mean(0)
    share = np.array(known) / np.sum(known)
    return {
        "rank correlation of neuron shares and information": float(spearmanr(known, shares).statistic),
        "share of the least informative, over its share of information": float(shares[share.argmin()] / share.min()),
    }


def separability(model: MultimodalModel, dataset: MultimodalDataset) -> dict[str, float | None]:
    """Of the neurons that answer to one modality's signal: how many answer to other modalities' noise too, and where?

    Signal: what the class means of the modality that says most to the neuron add to it. Noise: what the other modalities'
    features minus class means add. Each counts where it explains 5 % of the activation's variance.
    """
    test = dataset.part("test")
    received = RunAdapter(model).encode(test)
    weight = next(p for p in model.fusion.parameters() if p.dim() == 2).detach().double()
    widths = [z.shape[1] for z in received.values()]
    centred = [z.double() - z.double().mean(0) for z in received.values()]
    noises = [noise_component(z, test.labels) for z in centred]
    parts = list(zip(centred, noises, weight.split(widths, 1), strict=True))
    noise = torch.stack([n @ w.T for _, n, w in parts])  # [m, N, h]
    signal = torch.stack([(z - n) @ w.T for z, n, w in parts])
    main = signal.var(1).argmax(0)
    activation = fused(model, test).double()
    found = [
        neuron_response(activation[:, k], signal[main[k], :, k], noise[:, :, k].sum(0) - noise[main[k], :, k])
        for k in (activation.std(0) > 0).nonzero().flatten().tolist()
    ]
    found = [r for r in found if r.slopes[0] ** 2 >= 0.05 and not np.isnan(r.overlap)]
    mixed, overlap = np.array([r.entangled for r in found], bool), np.array([r.overlap for r in found])
    gap = float(overlap[~mixed].mean() - overlap[mixed].mean()) if mixed.any() and not mixed.all() else None
    return {
        "share of entangled neurons": float(mixed.mean()),
        "overlap of active ranges": float(overlap.mean()),
        "overlap, disentangled minus entangled neurons": gap,
    }


def cross_entropy(model: MultimodalModel, part: Part) -> Tensor:
    return F.cross_entropy(model(part.features).logits, part.labels)


def top_eigenvalue(model: MultimodalModel, part: Part) -> float:
    """Largest eigenvalue of the Hessian of the cross-entropy on ``part``, over encoders and fusion, by Lanczos iteration."""
    model = copy.deepcopy(model).double()
    part = Part([x.double() for x in part.features], part.present, part.labels, part.index)
    parameters = [*model.encoders.parameters(), *model.fusion.parameters()]
    gradients = torch.autograd.grad(cross_entropy(model, part), parameters, create_graph=True)
    gradient = torch.cat([g.flatten() for g in gradients])

    def product(v: np.ndarray) -> np.ndarray:
        found = torch.autograd.grad(gradient @ torch.from_numpy(v.reshape(-1)), parameters, retain_graph=True)
        return torch.cat([g.flatten() for g in found]).numpy()

    size = len(gradient)
    start = np.random.default_rng(0).standard_normal(size)
    operator = LinearOperator((size, size), product, dtype=np.float64)
    return float(eigsh(operator, k=1, which="LA", tol=1e-3, v0=start, return_eigenvectors=False)[0])


@torch.no_grad()
def barrier(first: MultimodalModel, second: MultimodalModel, part: Part, points: int = 11) -> float:
    """Largest rise of the test cross-entropy on the straight line between two models, over the line between their losses."""
    model, a, b = copy.deepcopy(first), dict(first.named_parameters()), dict(second.named_parameters())
    losses = []
    for t in np.linspace(0, 1, points).tolist():
        for name, p in model.named_parameters():
            p.copy_((1 - t) * a[name] + t * b[name] if name in b else a[name])
        losses.append(float(cross_entropy(model, part)))
    straight = np.linspace(losses[0], losses[-1], points)
    return float((np.array(losses) - straight).max())


def measure(name: str, seed: int) -> dict[str, dict[str, float | None]]:
    """Every number of one set and seed: measure -> method (or pair of models) -> value."""
    dataset = data(name, seed)
    test, some = dataset.part("test"), dataset.part("train").select(torch.arange(ROWS))
    settings = configs(dataset.modalities[0])
    first = train(dataset, settings["vanilla"], seed=seed, evaluate_on=())
    unimodal = first.unimodal
    assert unimodal is not None
    ranking = unimodal.weakest_first()
    settings = configs(ranking[0])
    models = {"vanilla": first.model}
    for method, config in settings.items():
        if method != "vanilla":
            shared = unimodal if config.unimodal_epochs else None
            models[method] = train(dataset, config, seed=seed, unimodal=shared, evaluate_on=()).model
    other = train(dataset, replace(settings["re-weighted"], reweight=0.0, reweight_modality=None), seed=seed + 1000)
    found: dict[str, dict[str, float | None]] = {}
    teacher = noise_component(alone(unimodal, dataset, test, ranking[-1]), test.labels)
    for method, model in models.items():
        model.eval()
        numbers = information_use(model, dataset) | separability(model, dataset)
        with torch.no_grad():
            student = model.encoders[dataset.modalities.index(ranking[0])](
                test.features[dataset.modalities.index(ranking[0])]
            )
        numbers["R² of the strongest teacher's noise from the weakest student's"] = denoising_r2(
            noise_component(student, test.labels), teacher
        )
        numbers["ln of the top Hessian eigenvalue"] = float(np.log(max(top_eigenvalue(model, some), 1e-12)))
        for key, value in numbers.items():
            found.setdefault(key, {})[method] = value
    pairs = {
        "two vanilla runs with other seeds": ("vanilla", other.model),
        "vanilla – re-weighted": ("vanilla", models["re-weighted"]),
        "vanilla – dropout": ("vanilla", models["dropout"]),
        "EBR – EBR, λ = 0": ("EBR", models["EBR, λ = 0"]),
    }
    found["barrier"] = {key: barrier(models[a], b.eval(), test) for key, (a, b) in pairs.items()}
    return found


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown: mean ± s.d. over the seeds, and the paired difference from vanilla with its interval."""
    rows = ["| measure | set | of | value | minus vanilla [95 %] | seeds |", "|---|---|---|---:|---:|---:|"]
    for key in lines[0]["found"]:
        for name in dict.fromkeys(line["data"] for line in lines):
            some = [line["found"][key] for line in lines if line["data"] == name]
            for of in some[0]:
                both = [(s[of], s.get("vanilla", 0.0)) for s in some if None not in (s[of], s.get("vanilla", 0.0))]
                if not both:
                    continue
                mine, base = map(list, zip(*both, strict=True))
                against = paired(mine, base) if of != "vanilla" and "vanilla" in some[0] else None
                zero = paired(mine, [0.0] * len(mine))
                text = f"{np.mean(mine):.3f} [{zero.low:.3f}, {zero.high:.3f}]"
                change = "" if against is None else f"{against.value:+.3f} [{against.low:+.3f}, {against.high:+.3f}]"
                rows.append(f"| {key} | {name} | {of} | {text} | {change} | {len(mine)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    text = options.log.read_text(encoding="utf-8") if options.log.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    for seed in range(options.seeds):
        for name in ("unequal", "mfeat"):
            if not any((line["data"], line["seed"]) == (name, seed) for line in lines):
                lines.append({"data": name, "seed": seed, "found": measure(name, seed)})
                with options.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(lines[-1], ensure_ascii=False) + "\n")
    print(table(lines))
