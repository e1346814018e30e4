"""Small made-up data sets and settings that the training tests share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmc_fast.experiments.data import MultimodalDataset
from mmc_fast.experiments.manifest import MANIFEST, Manifest
from mmc_fast.experiments.training import TrainConfig
from mmc_fast.experiments.training.checkpoint import CheckpointStore
from mmc_fast.experiments.training.model import MultimodalModel
from mmc_fast.nn import EBRConfig

SIZES = (60, 30, 30)


def tiny(
    seed: int,
    dims: tuple[int, ...] = (5, 3, 4),
    num_classes: int = 3,
    absent: float = 0.0,
    sizes: tuple[int, int, int] = SIZES,
) -> MultimodalDataset:
    """Classes as shifted means; the first modality is the clearest, the last the noisiest."""
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    labels = torch.arange(n) % num_classes
    labels[1 : sizes[0] : 6] = (
        0  # class shares of their own in the train part: who takes those of all rows is found out
    )
    split = torch.cat([torch.full((s,), code, dtype=torch.uint8) for code, s in enumerate(sizes)])
    present = torch.rand(n, len(dims), generator=g) >= absent
    present[~present.any(1), 0] = True
    features = {}
    for i, d in enumerate(dims):
        means = torch.randn(num_classes, d, generator=g) * 2.0 / (i + 1)
        x = means[labels] + torch.randn(n, d, generator=g)
        features["abcdefg"[i]] = torch.where(present[:, i, None], x, 0.0)
    return MultimodalDataset(
        name="tiny",
        features=features,
        present=present,
        labels=labels,
        split=split,
        num_classes=num_classes,
        metric="auroc" if num_classes == 2 else "accuracy",
        feature_names={k: [f"{k}{j}" for j in range(x.shape[1])] for k, x in features.items()},
    )


def losses_by_hand(
    model: MultimodalModel, features: Sequence[Tensor], labels: Tensor, present: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """L_sem, L_md and L_rec of a model with EBR heads in plain layers: no reversal, no fused op, no model.forward."""
    z = [encoder(x) * present[:, i, None] for i, (encoder, x) in enumerate(zip(model.encoders, features, strict=True))]
    g = [h(x) for h, x in zip(model.head.encoders, z, strict=True)]
    r = [d(x) * present[:, i, None] for i, (d, x) in enumerate(zip(model.head.decoders, g, strict=True))]
    semantic = F.cross_entropy(model.fusion.layers(torch.cat(r, 1)), labels)
    adversarial, errors = [], []
    for i, here in enumerate(present.t()):
        logits = model.head.discriminator(g[i][here])
        adversarial.append(F.cross_entropy(logits, torch.full((len(logits),), i), reduction="none"))
        errors.append((r[i] - z[i].detach())[here].square().mean(1))
    return semantic, torch.cat(adversarial).mean(), torch.cat(errors).mean()


def small(method: str = "ebr", **changes: Any) -> TrainConfig:
    """Settings for runs of a fraction of a second; ``ebr_*`` changes go to the EBR section."""
    ebr = {k.removeprefix("ebr_"): v for k, v in changes.items() if k.startswith("ebr_")}
    plain = {k: v for k, v in changes.items() if not k.startswith("ebr_")}
    base: dict[str, Any] = {
        "epochs": 3,
        "batch_size": 16,
        "encoder_width": 8,
        "encoder_dim": 6,
        "fusion_hidden": (8,),
        "fusion_dim": 8,
    }
    base |= {"fusion_heads": 2, "fusion_depth": 1, "rates": (0.3,), "unimodal_share": 1.0}
    if method == "ebr":
        base["ebr"] = replace(EBRConfig(latent_dim=4, hidden_dim=8, psi_dims=(6,), reversal=0.5), **ebr)
    return TrainConfig.preset(method, **(base | plain))


def same_numbers(a: Any, b: Any) -> bool:
    """Equality of results, leaving out wall-clock times."""
    if isinstance(a, dict) and isinstance(b, dict):
        timed = ("seconds", "timing")
        return a.keys() == b.keys() and all(k in timed or same_numbers(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_numbers, a, b))
    return a == b


def store_at(folder: Path, keep: int, run: str = "") -> CheckpointStore:
    """Checkpoints of a stage in ``folder``; the manifest, which a run has above its stages, stands beside them."""
    root = folder.parent
    if (root / MANIFEST).exists():
        return CheckpointStore(folder, keep, Manifest.read(root, advice="x"))
    root.mkdir(parents=True, exist_ok=True)
    return CheckpointStore(folder, keep, Manifest.begin(root, "run", {"run": run}, advice="x"))


def check_one_line(error: Exception) -> None:
    """A message that a user can act on: one line, neither empty nor a dump."""
    text = str(error)
    assert text.strip(), type(error)
    assert "\n" not in text, text
    assert len(text) < 900, text


BUDGET = {
    "epochs": 1,
    "batch_size": 16,
    "encoder_width": 8,
    "encoder_dim": 8,
    "fusion_hidden": [8],
    "rates": [0.2, 0.5],
}


def own_data(folder: Path, seed: int, num_classes: int = 2, spoil_test: bool = False) -> Path:
    """An npz file and, beside it, the TOML file that is all a user has to write."""
    dataset = tiny(seed, num_classes=num_classes)
    arrays = {f"x_{name}": x.numpy().copy() for name, x in dataset.features.items()}
    if spoil_test:
        for x in arrays.values():
            x[dataset.split.numpy() == 2] = 7.0
    np.savez(
        folder / "mine.npz",
        meta='{"kind": "classification"}',
        y=dataset.labels.numpy(),
        split=dataset.split.numpy(),
        **arrays,
    )
    budget = "\n".join(f"{k} = {json.dumps(v)}" for k, v in BUDGET.items())
    path = folder / "mine.toml"
    path.write_text(f'data = "mine.npz"\n[budget]\n{budget}\n')
    return path
