"""EBRCallback: the same steps as a loop written by hand, logged figures, checkpoints, and what it refuses."""

from __future__ import annotations

import copy
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mmc_fast
from mmc_fast.errors import InputError
from mmc_fast.integrations import find_handles

pl = pytest.importorskip("lightning.pytorch", reason="Lightning is not installed: pip install 'mmc-fast[lightning]'")
from mmc_fast.integrations.lightning import EBRCallback  # noqa: E402

AT = {"image": "image", "text": "text"}
OPTIONS = {"latent_dim": 4, "hidden_dim": 6, "psi_dims": (5,), "seed": 7}
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=UserWarning, module="lightning")


class Module(pl.LightningModule):
    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        self.image, self.text, self.fusion = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(8, 2)
        self.kind = kind

    def forward(self, a, t):
        return self.fusion(torch.cat([self.image(a), self.text(t)], -1))

    def training_step(self, batch, batch_idx):
        a, t, y = batch
        if self.kind == "skip" and batch_idx == 1:
            return None
        logits = self.fusion(torch.cat([self.image(a), self.text(t)], -1)) if self.kind == "parts" else self(a, t)
        loss = F.cross_entropy(logits, y)
        return {"loss": loss, "kept": 1} if self.kind == "dict" else loss

    def validation_step(self, batch, batch_idx):
        self.log("val", F.cross_entropy(self(*batch[:2]), batch[2]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(generator) -> DataLoader:
    a, t = torch.randn(12, 3, generator=generator), torch.randn(12, 2, generator=generator)
    return DataLoader(TensorDataset(a, t, torch.randint(2, (12,), generator=generator)), batch_size=4)


def trainer(folder, callback, **kw):
    options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "log_every_n_steps": 1} | kw
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(callbacks=[callback], default_root_dir=folder, **options, **quiet)


@pytest.mark.parametrize("kind", ["tensor", "dict", "skip", "parts"])
def test_training_is_that_of_a_loop_by_hand(generator, tmp_path, kind):
    rows, module = loader(generator), Module(kind)
    plain = copy.deepcopy(module)
    callback = EBRCallback(AT, reversal=lambda progress: 0.5 + progress, reconstruction=0.3, **OPTIONS)
    run = trainer(tmp_path, callback)
    run.fit(module, rows, rows)

    handle = mmc_fast.apply_ebr(plain, AT, **OPTIONS)
    optimizer, step, total = torch.optim.SGD(plain.parameters(), lr=0.1), 0, 6
    for _ in range(2):
        for index, (a, t, y) in enumerate(rows):
            if kind == "skip" and index == 1:
                step += 1  # Lightning counts a skipped batch as a step
                continue
            handle.reversal = 0.5 + step / total
            loss = (
                F.cross_entropy(plain(a, t), y) + handle.losses().discrimination + 0.3 * handle.losses().reconstruction
            )
            figures = handle.adversarial()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    for (name, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda text, name=name: f"{name}: {text}")
    logged = {name.removeprefix("ebr/"): float(v) for name, v in run.logged_metrics.items() if name.startswith("ebr/")}
    for name, value in (figures | {"reversal": handle.reversal}).items():
        assert logged[name] == pytest.approx(value, rel=1e-4), name
    assert "training_step" not in vars(module)
    assert callback.handle is find_handles(module)[0]


def test_a_checkpoint_of_the_fit_can_be_tested_and_continued(generator, tmp_path):
    rows, module = loader(generator), Module()
    run = trainer(tmp_path, EBRCallback(AT, **OPTIONS), enable_checkpointing=True)
    run.fit(module, rows, rows)
    path = tmp_path / "last.ckpt"
    run.save_checkpoint(path)
    other, callback = Module(), EBRCallback(AT, **OPTIONS)
    again = trainer(tmp_path, callback, max_epochs=3)
    (before,) = again.validate(other, rows, ckpt_path=path, verbose=False, weights_only=False)
    (expected,) = run.validate(module, rows, verbose=False)
    assert before["val"] == pytest.approx(expected["val"], rel=1e-6)
    again.fit(
        other, rows, rows, ckpt_path=path, weights_only=False
    )  # the heads of validate are found, not put on twice
    assert again.current_epoch == 3
    assert len(find_handles(other)) == 1


def test_heads_that_are_there_already_are_used(generator, tmp_path):
    module = Module()
    handle = mmc_fast.apply_ebr(module, AT, **OPTIONS, reversal=0.125)
    callback = EBRCallback()
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(module, loader(generator))
    assert callback.handle is handle
    assert float(run.logged_metrics["ebr/reversal"]) == 0.125


def test_log_every_zero_leaves_the_game_out(generator, tmp_path):
    run = trainer(tmp_path, EBRCallback(AT, log_every=0, prefix="x_", **OPTIONS), max_epochs=1)
    run.fit(Module(), loader(generator))
    assert {name for name in run.logged_metrics if name.startswith("x_")} == {"x_loss_md", "x_loss_rec", "x_reversal"}


class Stream(torch.utils.data.IterableDataset):
    """Rows without a length."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(12):
            yield torch.randn(3, generator=generator), torch.randn(2, generator=generator), torch.tensor(1)


@pytest.mark.parametrize(
    ("rows", "options", "more", "expected"),
    [
        (None, {"max_epochs": -1}, {}, None),
        (Stream(), {"max_epochs": 2}, {}, None),
        (Stream(), {"max_epochs": 2}, {"total_steps": 4}, [0, 0.25, 0.5, 0.75, 1, 1]),
        (Stream(), {"max_epochs": 2, "max_steps": 5}, {}, [0, 0.2, 0.4, 0.6, 0.8]),
        (None, {"max_epochs": 2}, {}, [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6]),
        (None, {"max_epochs": 2, "accumulate_grad_batches": 3}, {}, [0, 0, 0, 0.5, 0.5, 0.5]),
    ],
)
def test_a_schedule_needs_its_length(generator, tmp_path, rows, options, more, expected):
    used = []

    class Spy(EBRCallback):
        def on_train_batch_end(self, *args) -> None:
            used.append(self.handle.reversal)

    callback = Spy(AT, reversal=lambda progress: progress, **more, **OPTIONS)
    batches = loader(generator) if rows is None else DataLoader(rows, 4)
    run = trainer(tmp_path, callback, **options)
    if expected is None:
        with pytest.raises(
            InputError, match=r"give EBRCallback\(total_steps=...\), Trainer\(max_steps=...\), or a number"
        ):
            run.fit(Module(), batches)
    else:
        run.fit(Module(), batches)
        assert used == pytest.approx(expected)


def test_heads_outside_of_the_trainers_optimisers(generator, tmp_path):
    class Own(Module):
        def configure_optimizers(self):
            return torch.optim.SGD([*self.image.parameters(), *self.fusion.parameters()], lr=0.1)

    with pytest.warns(
        UserWarning, match=r"heads at image, text are in no optimiser of the Trainer.*self\.ebr\.parameters"
    ):
        trainer(tmp_path, EBRCallback(AT, **OPTIONS)).fit(Own(), loader(generator))


def test_a_step_of_several_forwards_counts_all_their_rows(generator, tmp_path):
    class Siamese(Module):
        def training_step(self, batch, batch_idx):
            a, t, _ = batch
            with torch.no_grad():
                target = self(a, t)
            return F.mse_loss(self(a, t), target) + self(2 * a, 3 * t).square().mean()

    rows, module = loader(generator), Siamese()
    run = trainer(tmp_path, EBRCallback(AT, **OPTIONS), max_epochs=1, limit_train_batches=1)
    plain = copy.deepcopy(module)
    run.fit(module, rows)
    head = mmc_fast.apply_ebr(plain, AT, **OPTIONS).head
    a, t, _ = next(iter(rows))
    z = {"image": torch.cat([a, 2 * a]), "text": torch.cat([t, 3 * t])}
    out = head({name: F.linear(x, getattr(plain, name).weight, getattr(plain, name).bias) for name, x in z.items()})
    assert float(run.logged_metrics["ebr/loss_md"]) == pytest.approx(float(out.discrimination_loss), rel=1e-5)
    assert float(run.logged_metrics["ebr/loss_rec"]) == pytest.approx(float(out.reconstruction_loss), rel=1e-5)


def test_refusals(generator, tmp_path):
    by_hand = Module()
    by_hand.automatic_optimization = False
    for module, callback, text in (
        (by_hand, EBRCallback(AT, **OPTIONS), "optimises by hand"),
        (Module(), EBRCallback(), "has 0 EBR handles"),
        (Module(), EBRCallback(AT, reversal=lambda progress: progress - 1, **OPTIONS), "λ is -1"),
        (Module(), EBRCallback({"image": "imag"}, **OPTIONS), "nearest: image"),
    ):
        with pytest.raises(InputError, match=text):
            trainer(tmp_path, callback).fit(module, loader(generator))
    for arguments, text in (
        ({"reconstruction": -1.0}, "reconstruction"),
        ({"reconstruction": float("nan")}, "reconstruction"),
        ({"reconstruction": "0.1"}, "reconstruction"),
        ({"reversal": float("nan")}, "λ is nan"),
        ({"reversal": -1.0}, "λ is -1"),
        ({"total_steps": 0}, "1 or more"),
        ({"log_every": -1}, "0 for never"),
        ({"latent_dim": 3}, "latent_dim given without at"),
    ):
        with pytest.raises(InputError, match=text):
            EBRCallback(**arguments)
