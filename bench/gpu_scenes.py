"""The calls whose launches are compiled, counted and projected: every shipped kernel in every precision it has.

``TRITON_INTERPRET=1 python bench/gpu_scenes.py --record out.json`` runs the small scenes in the guarded interpreter and
writes what Triton would compile for each launch, and on which kind of operand its products run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

PRECISIONS = {  # name: dtype, torch.set_float32_matmul_precision
    "fp32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bf16": (torch.bfloat16, "highest"),
}


class Ebr(NamedTuple):
    """Sizes of an EBR step."""

    modalities: int
    features: int
    hidden: int
    latent: int
    psi: tuple[int, ...]
    batch: int


NARROW = Ebr(5, 128, 256, 64, (64,), 4096)


def paper(modalities: int, batch: int = 512) -> Ebr:
    """The paper's widths."""
    return Ebr(modalities, 128, 1024, 512, (512, 256), batch)


@contextmanager
def precision(name: str, deterministic: bool = False) -> Iterator[torch.dtype]:
    """Set torch's switches for one precision; yields its dtype."""
    dtype, allowed = PRECISIONS[name]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    torch.use_deterministic_algorithms(deterministic)
    try:
        yield dtype
    finally:
        torch.set_float32_matmul_precision(before)
        torch.use_deterministic_algorithms(False)


def relu_agop(
    samples: int, inputs: int, units: int, dtype: torch.dtype, device: str, backend: str
) -> Callable[[], Any]:
    """Co-activation counts of one hidden layer."""
    from mmc_fast.ops import agop

    x, weight = torch.randn(samples, inputs).to(device, dtype), torch.randn(units, inputs).to(device, dtype)
    bias = torch.randn(units).to(device, dtype)
    counts = torch.zeros(units, units, dtype=torch.int64, device=device)
    flag = torch.zeros(1, dtype=torch.int64, device=device)
    return lambda: agop.relu_coactivation_update(x, weight, bias, counts, flag, backend=backend)


def gelu_agop(
    samples: int, inputs: int, units: int, dtype: torch.dtype, device: str, backend: str
) -> Callable[[], Any]:
    """Gram matrix of the derivatives of one hidden layer."""
    from mmc_fast.ops import agop

    x, weight = torch.randn(samples, inputs).to(device, dtype), torch.randn(units, inputs).to(device, dtype)
    gram = torch.zeros(units, units, dtype=torch.float64, device=device)
    total, flag = gram.new_zeros(units), torch.zeros(1, dtype=torch.int64, device=device)
    return lambda: agop.derivative_gram_update(x, weight, None, "gelu", gram, total, flag, backend=backend)


def chain_agop(
    samples: int, rows: int, depth: int, units: int, dtype: torch.dtype, device: str, backend: str
) -> Callable[[], Any]:
    """Gram matrix of the Jacobian rows of a head with two hidden layers."""
    from mmc_fast.ops import agop

    left, inner = torch.randn(rows, depth).to(device, dtype), torch.randn(samples, depth).to(device, dtype)
    v, outer = torch.randn(depth, units).to(device, dtype), torch.randn(samples, units).to(device, dtype)
    gram = torch.zeros(units, units, dtype=torch.float64, device=device)
    return lambda: agop.chain_gram_update(left, inner, v, outer, gram, backend=backend)


def ebr_head(sizes: Ebr, dtype: torch.dtype, device: str) -> Any:
    """An ``EBRHead`` of these widths."""
    from mmc_fast.nn import EBRHead

    dims = [sizes.features] * sizes.modalities
    head = EBRHead(dims, latent_dim=sizes.latent, hidden_dim=sizes.hidden, psi_dims=sizes.psi)
    return head.to(device, dtype)


def ebr_parameters(head: Any) -> tuple[list, list, list]:
    """Weights in the order of ``functional.ebr_step``."""
    encoders = [tuple(module.parameters()) for module in head.encoders]
    decoders = [tuple(module.parameters()) for module in head.decoders]
    return encoders, decoders, list(head.discriminator.parameters())


def ebr_step(
    sizes: Ebr, dtype: torch.dtype, device: str, backend: str
) -> tuple[Callable[[], Tensor], Callable[..., Any]]:
    """(forward to a scalar, backward of it) of one step with a reconstruction loss, every gradient wanted."""
    from mmc_fast import functional

    head = ebr_head(sizes, dtype, device)
    features = [
        torch.randn(sizes.batch, sizes.features).to(device, dtype).requires_grad_() for _ in range(sizes.modalities)
    ]
    upstream = [torch.randn(sizes.batch, sizes.features).to(device, dtype) for _ in range(sizes.modalities)]
    parameters = ebr_parameters(head)
    reversal, one = torch.tensor(0.5, device=device), torch.ones((), device=device)

    def forward() -> Any:
        return functional.ebr_step(features, *parameters, reversal=reversal, backend=backend)

    def backward(out: Any) -> None:
        torch.autograd.backward(
            [*out.recovered, out.discrimination_loss, out.reconstruction_loss], [*upstream, one, one]
        )

    return forward, backward


def small_scenes() -> Iterator[tuple[str, str, bool, Callable[[torch.dtype], None]]]:
    """(name, precision, deterministic, run): together they launch every shipped specialisation."""
    for name in PRECISIONS:
        yield f"agop relu {name}", name, False, lambda dtype: relu_agop(128, 64, 144, dtype, "cpu", "triton")()
        for deterministic in (False, True):
            mode = f"{name} {'parts' if deterministic else 'atomic'}"
            yield (
                f"agop gelu {mode}",
                name,
                deterministic,
                lambda dtype: gelu_agop(128, 64, 80, dtype, "cpu", "triton")(),
            )
            yield (
                f"agop chain {mode}", name, deterministic,
                lambda dtype: chain_agop(64, 10, 64, 64, dtype, "cpu", "triton")(),
            )  # fmt: skip
        yield (
            f"agop wide chain {name}",
            name,
            False,
            lambda dtype: chain_agop(16, 10, 64, 144, dtype, "cpu", "triton")(),
        )
        if has_ebr():
            yield f"ebr narrow {name}", name, False, lambda dtype: _train(NARROW._replace(batch=64), dtype)
            yield f"ebr wide {name}", name, False, lambda dtype: _train(paper(2, 64), dtype)


def _train(sizes: Ebr, dtype: torch.dtype) -> None:
    forward, backward = ebr_step(sizes, dtype, "cpu", "triton")
    backward(forward())


def has_ebr() -> bool:
    """Whether this tree has Triton kernels of the EBR step."""
    import importlib.util

    return importlib.util.find_spec("mmc_fast.kernels.ebr") is not None


def record() -> list[dict[str, Any]]:
    """One entry per distinct specialisation, named after the first scene that launches it."""
    from mmc_fast.testing import triton_guard

    found: dict[str, dict[str, Any]] = {}
    for scene, name, deterministic, run in small_scenes():
        with precision(name, deterministic) as dtype, triton_guard.watch(sample=1) as watch:
            run(dtype)
        for launch in watch.launches:
            key = json.dumps(launch.specialisation, sort_keys=True)
            matrix = sorted({_matrix(kind) for kind in launch.dot_flops} - {"none"})
            found.setdefault(key, {"scene": scene, "matrix": matrix, **launch.specialisation})
    labels: dict[str, int] = {}
    for entry in found.values():
        label = f"{entry['kernel'].strip('_').removesuffix('_kernel')} [{entry['scene']}]"
        labels[label] = labels.get(label, 0) + 1
        entry["label"] = label if labels[label] == 1 else f"{label} {labels[label]}"
    return list(found.values())


def _matrix(kind: str) -> str:
    return {"int8": "int8", "fp32:tf32": "tf32", "fp32:ieee": "none", "bf16": "half", "fp16": "half"}[kind]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, required=True, help="file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    entries = record()
    fresh = options.record.with_suffix(".new")
    fresh.write_text(json.dumps(entries))
    os.replace(fresh, options.record)
    print(f"{len(entries)} specialisations")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.exit(main())
