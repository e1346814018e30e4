"""What ``pip install mmc-fast`` gives without extras: run in an environment that holds torch and numpy alone.

``python tests/core_only.py`` checks the environment that it runs in; ``--block`` hides the extras first.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

# what the extras bring, less what torch itself depends on (jinja2, filelock)
EXTRAS = (
    "typer",
    "rich",
    "sklearn",
    "scipy",
    "matplotlib",
    "safetensors",
    "lightning",
    "lightning_fabric",
    "pandas",
    "pydantic",
)


def check_layer(torch) -> None:
    from mmc_fast.functional import ebr_step
    from mmc_fast.nn import EBRHead

    torch.manual_seed(0)
    head = EBRHead({"image": 12, "text": 7}, latent_dim=5, hidden_dim=9, psi_dims=(6,)).double()
    features = {"image": torch.randn(8, 12).double(), "text": torch.randn(8, 7).double()}
    out = head(features, reversal=0.3)
    g = head.encoders[0](features["image"])
    torch.testing.assert_close(out.latents[0], g)
    torch.testing.assert_close(out.recovered["image"], head.decoders[0](g))
    (out.discrimination_loss + out.reconstruction_loss).backward()
    layers = [[t for p in module[::2] for t in (p.weight, p.bias)] for module in (*head.encoders, *head.decoders)]
    psi = [t for p in head.discriminator[::2] for t in (p.weight, p.bias)]
    again = ebr_step(list(features.values()), layers[:2], layers[2:], psi, reversal=0.3)
    torch.testing.assert_close(again.discrimination_loss, out.discrimination_loss)


def check_agop(torch) -> None:
    import mmc_fast

    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.Linear(10, 3)).double()
    x = torch.randn(50, 6).double()
    jacobians = torch.func.vmap(torch.func.jacrev(head))(x)
    torch.testing.assert_close(mmc_fast.agop(head, x), torch.einsum("nci,ncj->ij", jacobians, jacobians))
    assert any(row.usable for row in mmc_fast.explain("ebr_step"))


def check_missing_extras() -> None:
    """Whatever needs an extra says so in one line with the command that brings it."""
    told = ""
    try:
        importlib.import_module("mmc_fast.experiments.training")
    except ImportError as error:
        told = str(error)
    assert "pip install 'mmc-fast[experiments]'" in told, told
    assert "\n" not in told
    code = "import runpy, sys; sys.argv = ['mmc-fast', 'info']; runpy.run_module('mmc_fast', run_name='__main__')"
    if sys.modules.get("typer", ...) is None:
        code = f"import sys; sys.path.insert(0, {__file__.rpartition('/')[0]!r}); import core_only; core_only.block(); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1, done.stderr
    assert "pip install 'mmc-fast[cli]'" in done.stderr, done.stderr


def block() -> None:
    """Make every extra look as if it were not installed."""
    sys.modules.update(dict.fromkeys(EXTRAS))  # type: ignore[arg-type]


def main() -> None:
    if "--block" in sys.argv:
        block()
    else:
        found = [name for name in EXTRAS if importlib.util.find_spec(name) is not None]
        assert not found, f"this environment holds more than the core: {', '.join(found)}"
    import torch

    check_layer(torch)
    check_agop(torch)
    check_missing_extras()
    heavy = [name for name in EXTRAS if sys.modules.get(name) is not None]
    assert not heavy, f"the core imported {', '.join(heavy)}"
    print("the core works without extras")


if __name__ == "__main__":
    main()
