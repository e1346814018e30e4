"""The calls whose launches are compiled and counted: every shipped kernel in every precision it has.

``TRITON_INTERPRET=1 python bench/gpu_scenes.py out.json`` runs the workloads in the sanitizing interpreter and writes what
Triton would compile for each launch, and on which kind of operand its products run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]

import triton_guard  # noqa: E402

PRECISIONS = {  # name: dtype, torch.set_float32_matmul_precision
    "fp32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bf16": (torch.bfloat16, "highest"),
}


class Ebr(NamedTuple):
    """Sizes of an EBR step."""

    modalities: int
    features: int | tuple[int, ...]
    hidden: int
    latent: int
    psi: tuple[int, ...]
    batch: int

    @property
    def dims(self) -> list[int]:
        """Width of each modality's features."""
        return [self.features] * self.modalities if isinstance(self.features, int) else list(self.features)


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


def relu_agop(samples: int, inputs: int, units: int, dtype: torch.dtype) -> None:
    """Co-activation counts of one hidden layer."""
    from mmc_fast.ops.agop import op as agop

    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((samples, inputs), (units, inputs), (units,)))
    counts, flag = torch.zeros(units, units, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    agop.relu_coactivation_update(x, weight, bias, counts, flag, backend="triton")


def finished_agop(units: int, width: int, outputs: int, sums: torch.dtype, dtype: torch.dtype) -> None:
    """The final product of an AGOP from its sums."""
    from mmc_fast.ops.agop import op as agop

    weight, outer = torch.randn(units, width).to(dtype), torch.randn(outputs, units).to(dtype)
    inner, flag = torch.zeros(units, units, dtype=sums), torch.zeros(1, dtype=torch.int64)
    agop.agop_finalise(weight, outer, inner, nonfinite=flag, backend="triton")


def gelu_agop(samples: int, inputs: int, units: int, dtype: torch.dtype) -> None:
    """Gram matrix of the derivatives of one hidden layer."""
    from mmc_fast.ops.agop import op as agop

    x, weight = torch.randn(samples, inputs).to(dtype), torch.randn(units, inputs).to(dtype)
    gram, flag = torch.zeros(units, units, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    agop.derivative_gram_update(x, weight, None, "gelu", gram, gram.new_zeros(units), flag, backend="triton")


def chain_agop(samples: int, rows: int, depth: int, units: int, dtype: torch.dtype) -> None:
    """Gram matrix of the Jacobian rows of a head with two hidden layers."""
    from mmc_fast.ops.agop import op as agop

    shapes = ((rows, depth), (samples, depth), (depth, units), (samples, units))
    left, inner, v, outer = (torch.randn(shape).to(dtype) for shape in shapes)
    agop.chain_gram_update(left, inner, v, outer, torch.zeros(units, units, dtype=torch.float64), backend="triton")


def ebr_head(sizes: Ebr, dtype: torch.dtype) -> Any:
    """An ``EBRHead`` of these widths."""
    from mmc_fast.nn import EBRHead

    return EBRHead(
        sizes.dims, latent_dim=sizes.latent, hidden_dim=sizes.hidden, psi_dims=sizes.psi, backend="triton"
    ).to(dtype)


def ebr_step(sizes: Ebr, dtype: torch.dtype, kind: str = "plain") -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """(forward to its output, backward of it) of one step; ``kind``: one of ``EBR_KINDS``."""
    m, batch, head = sizes.modalities, sizes.batch, ebr_head(sizes, dtype)
    features = [torch.randn(batch, d).to(dtype).requires_grad_() for d in sizes.dims]
    upstream = [torch.randn(batch, d).to(dtype) for d in sizes.dims]
    present = None if kind == "plain" else torch.ones(batch, m, dtype=torch.bool)
    source: Tensor | None = None
    if kind == "index":
        source = torch.arange(m).repeat(batch, 1)
    if kind == "weights":
        source = torch.eye(m, dtype=dtype).repeat(batch, 1, 1).requires_grad_()
    head.residual, head.normalize = kind != "plain", kind == "weights"
    one = torch.ones(())

    def backward(out: Any) -> None:
        outputs, gradients = [*out.recovered, out.discrimination_loss, out.reconstruction_loss], [*upstream, one, one]
        if kind == "weights":
            outputs, gradients = [*outputs, out.latents], [*gradients, torch.ones_like(out.latents)]
        torch.autograd.backward(outputs, gradients)

    return lambda: head(features, present, source, torch.tensor(0.5)), backward


EBR_KINDS = {
    "plain": "no mask, no source",
    "index": "a mask, whole-number source, residual",
    "weights": "a mask, float source with a gradient, residual, normalised latents that take a gradient",
}
# What a kernel is compiled for depends on the number of modalities and of the discriminator's layers, on the tiles that the
# widths ask for, and on whether 16 divides all of them: never on the batch.
NARROW, WIDE = Ebr(5, 128, 256, 64, (64,), 64), Ebr(4, 128, 256, 256, (256, 256), 64)
EBR_CASES = {
    "narrow": (NARROW, "plain", tuple(PRECISIONS)),
    "wide": (WIDE, "plain", tuple(PRECISIONS)),
    "weights": (WIDE, "weights", tuple(PRECISIONS)),
    "index": (WIDE, "index", ("bf16",)),
    "no hidden layer": (Ebr(2, 64, 64, 64, (), 64), "plain", ("tf32",)),
    "odd widths": (Ebr(4, (74, 35, 300, 33), 300, 131, (9, 7), 65), "weights", tuple(PRECISIONS)),
    "odd widths, plain": (Ebr(2, (74, 35), 33, 17, (9,), 65), "plain", ("bf16",)),
}


class Workload(NamedTuple):
    """A call on a small batch."""

    name: str
    precision: str
    deterministic: bool
    run: Callable[[torch.dtype], None]


def workloads() -> Iterator[Workload]:
    """Together they launch every shipped tile. float16 takes the paths of bfloat16."""
    for name in PRECISIONS:
        yield Workload(f"agop relu {name}", name, False, partial(relu_agop, 128, 64, 144))
        for edge, outputs, sums in ((144, 10, torch.int64), (1088, 10, torch.int64), (144, 200, torch.float64)):
            work = partial(finished_agop, edge, edge, outputs, sums)
            yield Workload(f"agop finish {edge} {outputs} {name}", name, False, work)
        for mode in ("atomic", "ordered"):
            yield Workload(f"agop gelu {mode} {name}", name, mode == "ordered", partial(gelu_agop, 128, 64, 80))
            yield Workload(f"agop chain {mode} {name}", name, mode == "ordered", partial(chain_agop, 64, 10, 64, 64))
        yield Workload(f"agop wide chain {name}", name, False, partial(chain_agop, 16, 10, 64, 144))
        for case, (sizes, kind, wanted) in EBR_CASES.items():
            if name in wanted:
                yield Workload(f"ebr {case} {name}", name, False, partial(_train, sizes, kind))


def _train(sizes: Ebr, kind: str, dtype: torch.dtype) -> None:
    forward, backward = ebr_step(sizes, dtype, kind)
    backward(forward())


def record() -> list[dict[str, Any]]:
    """One entry per distinct specialisation, named after the first workload that launches it."""
    found: dict[str, dict[str, Any]] = {}
    labels: dict[str, int] = {}
    matrix = {"int8": "int8", "fp32:tf32": "tf32", "fp32:tf32x3": "tf32", "bf16": "half"}
    for workload in workloads():
        with precision(workload.precision, workload.deterministic) as dtype, triton_guard.watch(sample=1) as watch:
            workload.run(dtype)
        for launch in watch.launches:
            key = json.dumps(launch.specialisation, sort_keys=True)
            if key in found:
                continue
            label = f"{launch.name.strip('_').removesuffix('_kernel')} [{workload.name}]"
            labels[label] = labels.get(label, 0) + 1
            units = sorted({matrix[kind] for kind in launch.dot_flops if kind in matrix})
            name = label if labels[label] == 1 else f"{label} {labels[label]}"
            found[key] = {"label": name, "matrix": units, **launch.specialisation}
    return list(found.values())


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    entries = record()
    Path(sys.argv[1]).write_text(json.dumps(entries))
    print(f"{len(entries)} specialisations")
