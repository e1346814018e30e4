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
    "fp16": (torch.float16, "highest"),
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
    from mmc_fast.ops.agop import op as agop

    x, weight = torch.randn(samples, inputs).to(device, dtype), torch.randn(units, inputs).to(device, dtype)
    bias = torch.randn(units).to(device, dtype)
    counts = torch.zeros(units, units, dtype=torch.int64, device=device)
    flag = torch.zeros(1, dtype=torch.int64, device=device)
    return lambda: agop.relu_coactivation_update(x, weight, bias, counts, flag, backend=backend)


def gelu_agop(
    samples: int, inputs: int, units: int, dtype: torch.dtype, device: str, backend: str
) -> Callable[[], Any]:
    """Gram matrix of the derivatives of one hidden layer."""
    from mmc_fast.ops.agop import op as agop

    x, weight = torch.randn(samples, inputs).to(device, dtype), torch.randn(units, inputs).to(device, dtype)
    gram = torch.zeros(units, units, dtype=torch.float64, device=device)
    total, flag = gram.new_zeros(units), torch.zeros(1, dtype=torch.int64, device=device)
    return lambda: agop.derivative_gram_update(x, weight, None, "gelu", gram, total, flag, backend=backend)


def chain_agop(
    samples: int, rows: int, depth: int, units: int, dtype: torch.dtype, device: str, backend: str
) -> Callable[[], Any]:
    """Gram matrix of the Jacobian rows of a head with two hidden layers."""
    from mmc_fast.ops.agop import op as agop

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
    sizes: Ebr, dtype: torch.dtype, device: str, backend: str, kind: str = "plain"
) -> tuple[Callable[[], Tensor], Callable[..., Any]]:
    """(forward to its outputs, backward of them) of one step; ``kind``: one of ``EBR_KINDS``."""
    from mmc_fast import functional

    head = ebr_head(sizes, dtype, device)
    features = [
        torch.randn(sizes.batch, sizes.features).to(device, dtype).requires_grad_() for _ in range(sizes.modalities)
    ]
    upstream = [torch.randn(sizes.batch, sizes.features).to(device, dtype) for _ in range(sizes.modalities)]
    parameters = ebr_parameters(head)
    if kind == "frozen":
        head.requires_grad_(False)
    if kind == "task":
        features = [f.detach() for f in features]
    one, options = torch.ones((), device=device), _ebr_options(kind, sizes, dtype, device)
    latents_wanted = kind == "weights"

    def forward() -> Any:
        return functional.ebr_step(features, *parameters, backend=backend, **options)

    def backward(out: Any) -> None:
        outputs, gradients = [*out.recovered, out.discrimination_loss], [*upstream, one]
        if kind != "task":
            outputs, gradients = [*outputs, out.reconstruction_loss], [*gradients, one]
        if latents_wanted:
            outputs, gradients = [*outputs, out.latents], [*gradients, torch.ones_like(out.latents)]
        torch.autograd.backward(outputs, gradients)

    return forward, backward


EBR_KINDS = {
    "plain": "no mask, no source, both losses, every gradient wanted",
    "parts": "the same, deterministic",
    "frozen": "the same, no gradient of a parameter wanted",
    "task": "no reconstruction loss, a mask, residual, no gradient of a feature wanted",
    "masked": "a mask, residual, normalised latents, given denominators",
    "index": "a mask, whole-number source, residual",
    "weights": "a mask, float source with a gradient, residual, normalised latents that take a gradient",
}


def _ebr_options(kind: str, sizes: Ebr, dtype: torch.dtype, device: str) -> dict[str, Any]:
    m, batch = sizes.modalities, sizes.batch
    options: dict[str, Any] = {"reversal": torch.tensor(0.5, device=device)}
    if kind not in ("plain", "parts", "frozen"):
        options |= {"present": torch.ones(batch, m, dtype=torch.bool, device=device), "residual": True}
    if kind in ("masked", "weights"):
        options |= {"normalize": True}
    if kind == "masked":
        options |= {"normalizer": torch.ones(2, device=device)}
    if kind == "index":
        options |= {"source": torch.arange(m, device=device).repeat(batch, 1)}
    if kind == "weights":
        options |= {"source": torch.eye(m, dtype=dtype, device=device).repeat(batch, 1, 1).requires_grad_()}
    return options


class Scene(NamedTuple):
    """A call on a small batch; ``main``: what ``make gpu-check`` compiles and ``make gpu-report`` for every architecture.

    The rest is compiled by ``make gpu-report`` for the two architectures where a spill is an error.
    """

    name: str
    precision: str
    deterministic: bool
    main: bool
    run: Callable[[torch.dtype], None]


# What a kernel is compiled for depends on latent, discriminator and number of modalities; other widths arrive at run time.
EBR_SIZES = {
    "narrow": Ebr(5, 64, 64, 64, (64,), 64),
    "wide": Ebr(4, 64, 64, 144, (64, 256), 64),
    "narrow, no hidden layer": Ebr(2, 16, 16, 16, (), 64),
    "narrow, latent 128": Ebr(2, 64, 64, 128, (64,), 64),
    "wide, discriminator 128": Ebr(2, 64, 64, 64, (128,), 64),
    "wide, two hidden layers of 64": Ebr(2, 64, 64, 64, (64, 64), 64),
    "wide, no hidden layer": Ebr(2, 64, 64, 512, (), 64),
    "wide, three hidden layers": Ebr(2, 64, 64, 144, (64, 64, 512), 64),
}


def small_scenes() -> Iterator[Scene]:
    """Together they launch every shipped tile along every path of the code.

    float16 takes the paths of bfloat16, and the wide path has no mode for determinism: they are there once.
    """
    for name in PRECISIONS:
        main = name != "fp16"
        yield Scene(f"agop relu {name}", name, False, main, partial(_agop, relu_agop, (128, 64, 144)))
        for deterministic in (False, True):
            mode = f"{name} {'parts' if deterministic else 'atomic'}"
            yield Scene(f"agop gelu {mode}", name, deterministic, main, partial(_agop, gelu_agop, (128, 64, 80)))
            yield Scene(f"agop chain {mode}", name, deterministic, main, partial(_agop, chain_agop, (64, 10, 64, 64)))
        yield Scene(f"agop wide chain {name}", name, False, main, partial(_agop, chain_agop, (16, 10, 64, 144)))
        for path, sizes in EBR_SIZES.items():
            for kind in _kinds(path, name):
                kinds = ("plain", "masked", "weights") if path.startswith("narrow") else ("plain", "weights")
                checked = main and path in ("narrow", "narrow, latent 128", "wide") and kind in kinds
                yield Scene(f"ebr {path} {kind} {name}", name, kind == "parts", checked, partial(_train, sizes, kind))


def _kinds(path: str, precision: str) -> tuple[str, ...]:
    """Which of ``EBR_KINDS`` are compiled for a size of ``EBR_SIZES`` in a precision of ``PRECISIONS``."""
    usual = path in ("narrow", "wide")
    if precision == "fp16":
        return ("plain", "weights") if usual else ()
    if not usual and not path.startswith("narrow, latent"):
        return ("weights",) if path.startswith("wide") else ("plain", "weights")
    return tuple(kind for kind in EBR_KINDS if (path, kind) != ("wide", "parts"))


def _agop(scene: Callable[..., Callable[[], Any]], sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    scene(*sizes, dtype, "cpu", "triton")()


def _train(sizes: Ebr, kind: str, dtype: torch.dtype) -> None:
    forward, backward = ebr_step(sizes, dtype, "cpu", "triton", kind)
    backward(forward())


def record(only: str = "") -> list[dict[str, Any]]:
    """One entry per distinct specialisation, named after the first scene that launches it."""

    found: dict[str, dict[str, Any]] = {}
    for scene in filter(lambda scene: only in scene.name, small_scenes()):
        with precision(scene.precision, scene.deterministic) as dtype, triton_guard.watch(sample=1) as watch:
            scene.run(dtype)
        for launch in watch.launches:
            key = json.dumps(launch.specialisation, sort_keys=True)
            matrix = sorted({_matrix(kind) for kind in launch.dot_flops} - {"none"})
            entry = {"scene": scene.name, "main": False, "matrix": matrix, **launch.specialisation}
            found.setdefault(key, entry)["main"] |= scene.main
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
    parser.add_argument("--only", default="", help="scenes whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    entries = record(options.only)
    fresh = options.record.with_suffix(".new")
    fresh.write_text(json.dumps(entries))
    os.replace(fresh, options.record)
    print(f"{len(entries)} specialisations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
