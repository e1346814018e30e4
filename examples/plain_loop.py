"""EBR in a plain training loop: three lines around a model that knows nothing of it.

Run: ``python examples/plain_loop.py [--epochs 12] [--reversal 0.1]``. Data: six views of handwritten numerals, in the
package.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmc_fast
from mmc_fast.experiments import data


class Classifier(nn.Module):
    """Somebody's model: one encoder a view, concatenation, a linear classifier."""

    def __init__(self, dims: dict[str, int], classes: int) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: nn.Sequential(nn.Linear(d, 32), nn.ReLU()) for name, d in dims.items()})
        self.fusion = nn.Sequential(nn.Linear(32 * len(dims), 64), nn.ReLU(), nn.Linear(64, classes))

    def forward(self, views: list[Tensor]) -> Tensor:
        encoded = [encoder(x) for encoder, x in zip(self.encoders.values(), views, strict=True)]
        return self.fusion(torch.cat(encoded, dim=-1))


def train(epochs: int = 12, reversal: float = 0.1, reconstruction: float = 0.1, seed: int = 0) -> dict[str, float]:
    """Train with EBR; validation accuracy and the last look at the game."""
    dataset = data.load("mfeat")
    part, held_out = dataset.part("train"), dataset.part("validation")
    torch.manual_seed(seed)
    model = Classifier(dataset.dims, dataset.num_classes)

    at = {name: f"encoders.{name}" for name in dataset.modalities}
    handle = mmc_fast.apply_ebr(model, at, latent_dim=32, hidden_dim=64, psi_dims=(32,), reversal=reversal)
    print(handle)

    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    order, game = torch.Generator().manual_seed(seed), {}
    for epoch in range(epochs):
        model.train()
        for step, rows in enumerate(torch.randperm(len(part), generator=order).split(64)):
            logits = model([x[rows] for x in part.features])
            md, rec = handle.losses()
            loss = F.cross_entropy(logits, part.labels[rows]) + md + reconstruction * rec
            if step == 0:
                game = handle.adversarial()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            accuracy = float((model(held_out.features).argmax(-1) == held_out.labels).double().mean())
        state = f"L_md/H {game['loss_md_over_entropy']:.2f}, ψ accuracy {game['psi_accuracy']:.2f}"
        print(f"epoch {epoch + 1:2}: validation accuracy {accuracy:.3f}, {state}")
    return {"accuracy": accuracy, **game}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--reversal", type=float, default=0.1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = train(options.epochs, options.reversal)
    print(", ".join(f"{name} {value:.3f}" for name, value in result.items()))
