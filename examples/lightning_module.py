"""EBR in a LightningModule: one callback, the module's source stays as it is.

Run: ``python examples/lightning_module.py [--epochs 8]``; needs ``pip install 'mmc-fast[lightning]'``. Data: five
clinical views of seriously ill patients, in the package.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mmc_fast.experiments import data
from mmc_fast.integrations.lightning import EBRCallback


class Mortality(pl.LightningModule):
    """Somebody's module: an encoder for each view, concatenation, two classes."""

    def __init__(self, dims: dict[str, int]) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: nn.Sequential(nn.Linear(d, 24), nn.ReLU()) for name, d in dims.items()})
        self.classifier = nn.Linear(24 * len(dims), 2)

    def forward(self, views: list[Tensor]) -> Tensor:
        return self.classifier(torch.cat([e(x) for e, x in zip(self.encoders.values(), views, strict=True)], -1))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        *views, labels = batch
        return F.cross_entropy(self(views), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def train(epochs: int = 8, seed: int = 0) -> dict[str, float]:
    """Train with EBR under a Trainer; validation AUROC and what the callback logged last."""
    dataset = data.load("support2")
    part, held_out = dataset.part("train"), dataset.part("validation")
    pl.seed_everything(seed, verbose=False)
    module = Mortality(dataset.dims)
    ebr = EBRCallback(
        at={name: f"encoders.{name}" for name in dataset.modalities},
        reversal=lambda progress: 0.1 * progress,
        reconstruction=0.1,
        latent_dim=16,
        hidden_dim=32,
        psi_dims=(16,),
        log_every=10,
    )
    rows = DataLoader(TensorDataset(*part.features, part.labels), batch_size=128, shuffle=True)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=[ebr], accelerator="cpu", default_root_dir=folder, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, rows)
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    print(ebr.handle)
    module.eval()
    with torch.no_grad():
        risk = module(held_out.features).softmax(-1)[:, 1]
    return {"auroc": float(roc_auc_score(held_out.labels.numpy(), risk.numpy())), **logged}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    result = train(options.epochs)
    print(", ".join(f"{name} {value:.3f}" for name, value in result.items()))
