"""Heads in files: save and load, checkpoints of whole models, Lightning, from_pretrained, DDP, FSDP2; and what is refused."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from apply_models import SMALL, Two, two_inputs
from torch import nn

import mmc_fast
from mmc_fast.errors import InputError
from mmc_fast.integrations import find_handles

AT = {"a": "a", "b": "b"}


def trained(generator, **options) -> tuple[Two, mmc_fast.integrations.EBRHandle]:
    """A model with heads whose weights are not those of any seed."""
    model = Two()
    handle = mmc_fast.apply_ebr(model, AT, **SMALL, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval(), handle


def without_heads(model: nn.Module) -> Two:
    plain = Two().eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "ebr." not in k})
    return plain


def test_keys_name_the_modalities(generator):
    model, _ = trained(generator)
    keys = [k for k in model.state_dict() if k.startswith("ebr.encoders")]
    assert keys == [f"ebr.encoders.{m}.{layer}.{kind}" for m in AT for layer in (0, 2) for kind in ("weight", "bias")]


@pytest.mark.parametrize(
    "kind", ["heads.safetensors", "heads.pt", "model.pt", "model.safetensors", "ddp.ckpt", "given"]
)
def test_heads_come_back_from_any_file(generator, tmp_path, kind):
    model, handle = trained(generator, residual=True, normalize=True)
    path = tmp_path / kind
    if kind.startswith("heads"):
        handle.save(path)
    elif kind == "model.pt":
        torch.save(model.state_dict(), path)
    elif kind == "model.safetensors":
        pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file(
            model.state_dict(), path
        )
    elif kind == "ddp.ckpt":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    plain = without_heads(model)
    loaded = mmc_fast.load_ebr(plain, model.state_dict() if kind == "given" else path, reversal=0.25)
    x = two_inputs(generator)
    assert torch.equal(plain(*x), model(*x))
    assert loaded.reversal == 0.25
    assert mmc_fast.load_ebr(plain, model.state_dict()) is loaded  # heads that are there are filled


def test_a_checkpoint_of_one_program_is_read_by_another(generator, tmp_path):
    model, _ = trained(generator)
    x = two_inputs(generator)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch, mmc_fast\nsys.path.insert(0, sys.argv[1])\nfrom apply_models import Two\n"
        "state = torch.load('model.pt', weights_only=True)\nmodel = Two().eval()\n"
        "model.load_state_dict({k: v for k, v in state.items() if 'ebr.' not in k})\n"
        "mmc_fast.load_ebr(model, 'model.pt')\ntorch.save(model(*torch.load('x.pt')), 'out.pt')"
    )
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = os.environ | {"PYTHONPATH": os.path.dirname(tests)}
    done = subprocess.run(
        [sys.executable, "-c", code, tests], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), model(*x))


class Named(Two):
    """A site of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.d = nn.Linear(5, 8)


class Deep(nn.Module):
    """The same model one level down."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Two()


@pytest.mark.parametrize(
    ("build", "at", "options", "told"),
    [
        (Two, {"b": "b", "a": "a"}, {}, "modalities of the weights is ['a', 'b'], of the model ['b', 'a']"),
        (Named, {"a": "a", "b": "d"}, {}, "sites of the weights is"),
        (Two, {"a": "a"}, {}, "modalities of the weights"),
        (Two, AT, {"latent_dim": 5}, "latent_dim of the weights is 6, of the model 5"),
        (Two, AT, {"residual": True}, "residual of the weights is False, of the model True"),
        (Deep, {"a": "net.a", "b": "net.b"}, {}, "sites of the weights is"),
    ],
)
def test_other_heads_are_refused_with_what_differs(generator, tmp_path, build, at, options, told):
    model, handle = trained(generator)
    handle.save(tmp_path / "heads.pt")
    other = build()
    its = mmc_fast.apply_ebr(other, at, **{**SMALL, **options})
    before = copy.deepcopy(its.head.state_dict())
    for load in (
        lambda: its.load(tmp_path / "heads.pt"),
        lambda: its.head.load_state_dict(handle.head.state_dict(), strict=False),
        lambda: other.load_state_dict({k: v for k, v in model.state_dict().items() if "ebr." in k}, strict=False),
    ):
        with pytest.raises(InputError) as caught:
            load()
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in its.head.state_dict().items())


def test_files_without_heads_are_refused(generator, tmp_path):
    torch.save(Two().state_dict(), tmp_path / "plain.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "pickle.pt")
    (tmp_path / "empty").mkdir()
    for name, told in (
        ("plain.pt", "found at: nowhere"),
        ("pickle.pt", "cannot be read without unpickling"),
        ("none.pt", "there is no file"),
        ("empty", "holds no .safetensors"),
    ):
        with pytest.raises(InputError, match=told):
            mmc_fast.load_ebr(Two(), tmp_path / name)
    head = mmc_fast.nn.EBRHead({"a": 8, "b": 8}, **SMALL)
    with pytest.raises(InputError, match="know no sites"):
        mmc_fast.load_ebr(Two(), head.state_dict())
    _, handle = trained(generator)
    handle.save(tmp_path / "heads.pt")
    with pytest.raises(InputError, match=r"no submodule 'a'; nearest: net\.a"):
        mmc_fast.load_ebr(Deep(), tmp_path / "heads.pt")


def test_one_of_two_heads_in_a_file(generator):
    model, _ = trained(generator)
    other = nn.ModuleDict({"net": model, "more": Two()})
    mmc_fast.apply_ebr(other, {"a": "more.a", "b": "more.b"}, name="second", **SMALL)
    fresh = nn.ModuleDict({"net": Two(), "more": Two()})
    with pytest.raises(InputError, match=r"found at: net\.ebr, second; choose one by name="):
        mmc_fast.load_ebr(fresh, other.state_dict())
    handle = mmc_fast.load_ebr(fresh, other.state_dict(), name="ebr")
    assert handle.model is fresh["net"]
    second = mmc_fast.load_ebr(fresh, other.state_dict(), name="second")
    assert (handle.report.name, second.report.name, second.model) == ("ebr", "second", fresh)
    for found, wanted in ((handle, model.ebr), (second, other.second)):
        for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(a, b)
    fresh.load_state_dict(other.state_dict())  # under the same names


def test_lightning_checkpoint(generator, tmp_path):
    pl = pytest.importorskip(
        "lightning.pytorch", reason="Lightning is not installed: pip install 'mmc-fast[lightning]'"
    )
    from mmc_fast.integrations.lightning import EBRCallback

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Two()

        def training_step(self, batch, index):
            return F.cross_entropy(self.net(*batch[:2]), batch[2])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    rows = torch.utils.data.TensorDataset(*two_inputs(generator), torch.arange(8) % 3)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[EBRCallback({"a": "net.a", "b": "net.b"}, **SMALL)],
    )  # fmt: skip
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(rows, 4))
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    again = Module.load_from_checkpoint(tmp_path / "last.ckpt", strict=False)
    mmc_fast.load_ebr(again, tmp_path / "last.ckpt")
    x = two_inputs(generator)
    assert torch.equal(again.eval().net(*x), module.eval().net(*x))


def test_from_pretrained(generator, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "two_towers"

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config) -> None:
            super().__init__(config)
            self.two = Two()
            self.post_init()

        def _init_weights(self, module) -> None:
            pass

        def forward(self, x, y):
            return self.two(x, y)

    class WithHeads(Model):
        _keys_to_ignore_on_load_unexpected = (r"_extra_state$",)

        def __init__(self, config) -> None:
            super().__init__(config)
            mmc_fast.apply_ebr(self, {"a": "two.a", "b": "two.b"}, **SMALL)

    model = WithHeads(Config()).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    model.save_pretrained(tmp_path)
    x = two_inputs(generator)
    first = WithHeads.from_pretrained(tmp_path).eval()  # the class puts the heads on
    second = Model.from_pretrained(tmp_path).eval()  # or they are added afterwards
    mmc_fast.load_ebr(second, tmp_path)
    for other in (first, second):
        torch.testing.assert_close(other(*x), model(*x))
        torch.testing.assert_close(find_handles(other)[0].losses(), find_handles(model)[0].losses())


@pytest.fixture
def one_process(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def step(wrapped: nn.Module, handle, x) -> torch.Tensor:
    loss = wrapped(*x).square().sum() + sum(handle.losses())
    loss.backward()
    return loss.detach()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("units", [("",), ("a", ""), ("c", ""), ("ebr", ""), ("a", "b", "c", "ebr", "")])
def test_fsdp2(generator, units, tmp_path):
    """Which modules are sharded does not matter: losses, gradients and checkpoints are those of the plain model."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    model, handle = trained(generator)
    plain = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (1,))
    for unit in units:
        fully_shard(model.get_submodule(unit), mesh=mesh)
    x = two_inputs(generator)
    for _ in range(2):
        model.zero_grad()
        plain.zero_grad()
        torch.testing.assert_close(step(model, handle, x), step(plain, find_handles(plain)[0], x))
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=lambda text, name=name: f"{name}: {text}")
    state = get_model_state_dict(model)
    assert set(state) == set(plain.state_dict())
    set_model_state_dict(model, state)
    handle.save(tmp_path / "heads.pt")
    assert torch.equal(mmc_fast.load_ebr(without_heads(plain), tmp_path / "heads.pt").model(*x), plain(*x))


@pytest.mark.usefixtures("one_process")
def test_ddp_checkpoint_loads_into_the_plain_model(generator):
    model, handle = trained(generator)
    plain = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    x = two_inputs(generator)
    torch.testing.assert_close(step(wrapped, handle, x), step(plain, find_handles(plain)[0], x))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    fresh = without_heads(model)
    mmc_fast.load_ebr(fresh, wrapped.state_dict())
    assert torch.equal(fresh(*x), plain(*x))
