"""What an expert would write in plain PyTorch for an EBR step, and the products that no implementation can leave out.

Each baseline takes a head and returns ``step(features) -> (recovered, L_md, L_rec)`` with the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmc_fast.nn import EBRHead

Step = Callable[[Sequence[Tensor]], tuple[Sequence[Tensor], Tensor, Tensor]]


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return -grad


def eager(head: EBRHead) -> Step:
    """Separate ``nn.Sequential`` modules, one ``torch.cat`` in front of the discriminator."""

    def step(features: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        latents = [encoder(x) for encoder, x in zip(head.encoders, features, strict=True)]
        recovered = [decoder(g) for decoder, g in zip(head.decoders, latents, strict=True)]
        m, batch = len(features), features[0].shape[0]
        logits = head.discriminator(_Reverse.apply(torch.cat(latents)))
        labels = torch.arange(m).repeat_interleave(batch)
        pairs = zip(recovered, features, strict=True)
        losses = [F.mse_loss(r.float(), x.detach().float()) for r, x in pairs]
        return recovered, F.cross_entropy(logits.float(), labels), torch.stack(losses).mean()

    return step


def stacked(head: EBRHead) -> Step:
    """All modalities in one ``baddbmm`` per layer; their weights are stacked in every step, for equal widths."""

    def step(features: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        def layer(x: Tensor, modules: nn.ModuleList, index: int) -> Tensor:
            weight = torch.stack([module[index].weight for module in modules])
            bias = torch.stack([module[index].bias for module in modules]).unsqueeze(1)
            return torch.baddbmm(bias, x, weight.transpose(1, 2))

        x = torch.stack(tuple(features))
        m, batch, _ = x.shape
        latents = layer(F.relu(layer(x, head.encoders, 0)), head.encoders, 2)
        recovered = layer(F.relu(layer(latents, head.decoders, 0)), head.decoders, 2)
        logits = head.discriminator(_Reverse.apply(latents.flatten(0, 1)))
        labels = torch.arange(m).repeat_interleave(batch)
        losses = F.cross_entropy(logits, labels), F.mse_loss(recovered, x.detach())
        return recovered.unbind(0), *losses

    return step


def floor(head: EBRHead, batch: int, dtype: torch.dtype) -> Callable[[], None]:
    """The step's multiplications by ``torch.mm(out=)``, forward and backward, and nothing else."""
    jobs: list[tuple[Tensor, Tensor, Tensor]] = []
    modules = [(m, batch) for m in (*head.encoders, *head.decoders)] + [(head.discriminator, batch * len(head.dims))]
    for module, rows in modules:
        for linear in module:
            if isinstance(linear, nn.Linear):
                weight = linear.weight.detach().to(dtype)
                outputs, inputs = weight.shape
                x, dy = torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype)
                jobs.append((x, weight.t(), torch.empty_like(dy)))
                jobs.append((dy, weight, torch.empty_like(x)))
                jobs.append((dy.t(), x, torch.empty_like(weight)))

    def run() -> None:
        for a, b, out in jobs:
            torch.mm(a, b, out=out)

    return run


BASELINES: dict[str, Callable[[EBRHead], Step]] = {"eager": eager, "stacked": stacked}
