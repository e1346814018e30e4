"""Cheap measures during training: those of the diagnosis, the model untouched, and logged by Lightning."""

from __future__ import annotations

import pytest
import torch
from diagnose_models import Toy, batches, chain, whole
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mmc_fast.diagnose import diagnose
from mmc_fast.diagnose.monitor import LOGGED, measure_use, use_logger
from mmc_fast.errors import InputError


def test_the_measures_are_those_of_the_diagnosis(generator: torch.Generator) -> None:
    head, loader = chain(generator), batches(generator)
    toy = Toy(head, head)
    d = diagnose(toy, loader, resamples=0, probes=False, draws=1)
    head.train()
    head[1].eval()
    modes, state = [m.training for m in head.modules()], torch.get_rng_state()
    found = measure_use(toy, loader)
    assert found == {n: d.value(n) for n in ("score.all", *(f"{k}.{m}" for m in d.modalities for k in LOGGED))}
    other = {"metric": lambda y, t: -float((y.argmax(1) != t).sum()), "absence": "mean", "seed": 7}
    d = diagnose(toy, loader, resamples=0, probes=False, draws=1, **other)
    changed = measure_use(toy, loader, **other)
    assert changed == {name: d.value(name) for name in found}
    assert all(changed[name] != found[name] for name in ("score.all", "shapley.audio", "total_effect.audio"))
    assert [m.training for m in head.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in head.parameters())


def test_lightning_logs_them(generator: torch.Generator, tmp_path) -> None:
    pytorch = pytest.importorskip("lightning.pytorch")
    loader = batches(generator, n=128)

    class Module(pytorch.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))

        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self.head(torch.cat(batch[:2], 1)), batch[2])

        def validation_step(self, batch, index):
            self.log("val", self.training_step(batch, index))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    trainer = pytorch.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu",
        callbacks=[use_logger(lambda m: Toy(m.head, m.head), loader)], default_root_dir=tmp_path,
    )  # fmt: skip
    rows = TensorDataset(*whole(loader))
    trainer.fit(module, DataLoader(rows, 64), DataLoader(rows, 64))
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("use/")}
    module.eval()
    expected = {f"use/{k}": v for k, v in measure_use(Toy(module.head, module.head), loader).items()}
    assert logged == pytest.approx(expected, abs=1e-6)
    with pytest.raises(InputError, match="every is 0"):
        use_logger(lambda m: m, loader, every=0)
