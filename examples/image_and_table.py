"""EBR between an image tower, as torchvision builds them, and a table: from training to a file and back.

Run: ``python examples/image_and_table.py [--steps 60]``. Drawn pictures and measurements.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmc_fast
from mmc_fast.nn.substitution import mean_source

COLUMNS, PIXELS = 6, 16


class ImageTower(nn.Module):
    """Convolutions, pooling, ``fc``: the shape of torchvision's classifiers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.avgpool(self.layer2(self.layer1(x))), 1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = ImageTower(24)
        self.table = nn.Sequential(nn.Linear(COLUMNS, 24), nn.ReLU(inplace=True), nn.Linear(24, 24))
        self.classifier = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(48, 4))

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        return self.classifier(torch.cat([self.backbone(image), self.table(table)], 1))


def draw(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Each modality knows half of the answer: a bright half of the picture, the sign of the first column."""
    half, sign = torch.randint(2, (2, rows), generator=generator)
    image = 0.5 * torch.randn(rows, 3, PIXELS, PIXELS, generator=generator)
    image += (half * 2.0 - 1)[:, None, None, None]
    table = torch.randn(rows, COLUMNS, generator=generator)
    table[:, 0] += 3 * (sign * 2.0 - 1)
    return image, table, 2 * half + sign


def train(steps: int = 60, seed: int = 0) -> dict[str, float]:
    """Accuracy after training, also without the table and from a file, and the adversarial training at the end."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Model()
    handle = mmc_fast.apply_ebr(
        model, {"image": "backbone.fc", "table": "table"}, fusion="classifier",
        latent_dim=16, hidden_dim=32, psi_dims=(16,), residual=True, reversal=0.02,
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        image, table, label = draw(64, generator)
        loss = F.cross_entropy(model(image, table), label) + sum(handle.losses())
        game = handle.adversarial()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(handle.explain())
    model.eval()
    image, table, label = draw(256, generator)
    with torch.no_grad():
        logits = model(image, table)
    no_table = torch.tensor([[True, False]]).expand(256, 2)
    image_only = handle.predict(image, torch.zeros_like(table), present=no_table, source=mean_source(no_table))

    with tempfile.TemporaryDirectory() as folder:  # the model's own weights and the heads' in two files
        path = Path(folder) / "heads.pt"
        handle.save(path)
        plain = Model().eval()
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("ebr.")})
        mmc_fast.load_ebr(plain, path)
    with torch.no_grad():
        again = plain(image, table)
    return {
        "accuracy": float((logits.argmax(1) == label).double().mean()),
        "accuracy_without_table": float((image_only.argmax(1) == label).double().mean()),
        "difference_from_file": float((again - logits).abs().max()),
        **game,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    torch.set_num_threads(1)
    result = train(parser.parse_args().steps)
    print(", ".join(f"{name} {value:.3f}" for name, value in result.items()))
