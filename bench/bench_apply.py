"""A training step through ``apply_ebr`` against the same model written with ``EBRHead``.

``python bench/bench_apply.py [--rounds 40] [--gate]``: losses of both must agree; then the median of paired ratios of CPU
times of one thread (``time.thread_time``), the two in turn. ``--gate``: exit code 1 above the limit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmc_fast
from mmc_fast.nn import EBRHead

LIMIT = 1.05
INPUTS, CLASSES, BATCH = {"image": 64, "text": 48, "audio": 32}, 10, 256
HEAD = {"latent_dim": 128, "hidden_dim": 512, "psi_dims": (128, 64)}
WIDTH = 256


class Towers(nn.Module):
    """Three encoders of width 256, concatenation, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: nn.Linear(d, WIDTH) for name, d in INPUTS.items()})
        self.classifier = nn.Linear(WIDTH * len(INPUTS), CLASSES)

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        return self.classifier(torch.cat([self.encoders[name](x[name]) for name in INPUTS], 1))


class Written(Towers):
    """The same with the head in its source."""

    def __init__(self) -> None:
        super().__init__()
        self.head = EBRHead(dict.fromkeys(INPUTS, WIDTH), **HEAD)

    def forward(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = self.head({name: self.encoders[name](x[name]) for name in INPUTS})
        losses = out.discrimination_loss + 0.1 * out.reconstruction_loss
        return self.classifier(torch.cat(list(out.recovered.values()), 1)), losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--gate", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    written, applied = Written(), Towers()
    handle = mmc_fast.apply_ebr(applied, {name: f"encoders.{name}" for name in INPUTS}, **HEAD)
    applied.load_state_dict(
        {k.replace("head.", "ebr."): v for k, v in written.state_dict().items() if "_extra" not in k}
    )
    x, y = {name: torch.randn(BATCH, d) for name, d in INPUTS.items()}, torch.randint(CLASSES, (BATCH,))

    optimizers = {model: torch.optim.SGD(model.parameters(), lr=1e-4) for model in (written, applied)}

    def step(model: nn.Module) -> tuple[float, float]:
        start = time.thread_time()
        if model is written:
            logits, extra = model(x)
        else:
            logits = model(x)
            md, rec = handle.losses()
            extra = md + 0.1 * rec
        loss = F.cross_entropy(logits, y) + extra
        optimizers[model].zero_grad()
        loss.backward()
        optimizers[model].step()
        return time.thread_time() - start, float(loss.detach())

    a, b = step(applied)[1], step(written)[1]
    assert abs(a - b) <= 1e-5 * abs(b), f"the losses differ: {a} and {b}"
    ratios = [step(applied)[0] / step(written)[0] for _ in range(options.rounds)]
    ratio = statistics.median(ratios)
    print(f"apply_ebr / EBRHead: {ratio:.3f} (limit {LIMIT}; quartiles {statistics.quantiles(ratios, n=4)})")
    print(handle.explain())
    return int(options.gate and ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
