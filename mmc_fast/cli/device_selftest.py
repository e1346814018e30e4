"""``mmc-fast selftest --device cuda``: every op by every backend that can run on the device, against float64."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise, product

import torch
from torch import Tensor

from mmc_fast import functional
from mmc_fast.ops import dispatch as backends
from mmc_fast.ops.agop import op as agop
from mmc_fast.ops.agop.reference import activation_derivative
from mmc_fast.ops.selftest import Check

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# relative error in the norm; a gradient jumps where rounding moves a unit of one of 130 rows across its kink
# (.006, .043 and .076 at most in 13,000 draws; a row that is left out is .09)
_LIMITS = {torch.float32: 6e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_GRADIENT_LIMITS = {torch.float32: 2e-2, torch.float16: 8e-2, torch.bfloat16: 1.2e-1}
SIZES = ((1, 1, 1), (15, 17, 16), (129, 63, 65), (517, 70, 131), (3000, 33, 257))


def device_selftest(
    device: torch.device, dtypes: Sequence[torch.dtype] = DTYPES, sizes: Sequence[tuple[int, int, int]] = SIZES,
    deadline: float = float("inf"),
) -> list[Check]:  # fmt: skip
    """One row per op, backend, dtype and size; ``passed`` is False where a number is wrong or a kernel raises.

    float32 products are those that torch allows, with TF32's limits where that is TF32. Checks that ``deadline`` (of
    ``time.monotonic``) leaves no time for are rows that say so.
    """
    seed = torch.seed() % 2**31
    generator = torch.Generator().manual_seed(seed)
    rows = []
    example = torch.ones(2, 2, device=device)
    for op in ("relu_coactivation_update", "ebr_step"):
        for row in backends.explain(op, example):
            if row.backend in ("triton", "cuda") and not row.usable:
                rows.append(Check(f"{op} {row.backend}", True, f"not run: {row.reason}"))
    for name, check in _checks(device, generator, dtypes, sizes):
        if time.monotonic() > deadline:
            rows.append(Check(name, True, "not run: no time left"))
            continue
        try:
            problem = check()
        except Exception as error:  # a kernel that does not compile or launch is a failed row
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        rows.append(Check(name, problem is None, "equal" if problem is None else f"{problem} (seed {seed})"))
    return rows


def _checks(
    device: torch.device,
    generator: torch.Generator,
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[tuple[int, int, int]],
) -> Iterator[tuple[str, Callable[[], str | None]]]:
    example = torch.ones(2, 2, device=device)
    for backend, dtype, size in product(("cuda", "triton", "eager"), dtypes, shapes):
        label = f"{backend} {str(dtype).removeprefix('torch.')} {size[0]}x{size[1]}x{size[2]}"
        for op, check in (
            ("relu_coactivation_update", _counts),
            ("derivative_gram_update", _gram),
            ("chain_gram_update", _chain),
        ):
            offered = {row.backend for row in backends.explain(op, example) if row.usable}
            if backend in offered:
                yield f"{op} {label}", partial(check, device, generator, backend, dtype, *size)
    for backend, dtype in product(("triton", "eager"), dtypes):
        if any(row.backend == backend and row.usable for row in backends.explain("ebr_step", example)):
            for sizes in (
                ((20, 33), 24, 16, (16,)),
                ((64, 128, 65), 256, 64, (64,)),
                ((128, 96), 1024, 512, (512, 256)),
            ):
                for low in (False, True) if dtype == torch.bfloat16 else (False,):
                    name = f"ebr_step {backend} {str(dtype).removeprefix('torch.')} {sizes}{' by autocast' * low}"
                    yield name, partial(_ebr, device, generator, backend, dtype, low, *sizes)


def _integers(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=generator)


def _counts(device, generator, backend, dtype, samples, inputs, units) -> str | None:
    x, weight = _integers(generator, samples, inputs), _integers(generator, units, inputs)
    active = (x.double() @ weight.double().t() > 0).double()
    counts = torch.zeros(units, units, dtype=torch.int64, device=device)
    flag = torch.zeros(1, dtype=torch.int64, device=device)
    agop.relu_coactivation_update(
        x.to(device, dtype), weight.to(device, dtype), None, counts, flag, chunk_rows=1000, backend=backend
    )
    wrong = int((counts.cpu() != (active.t() @ active).triu().long()).sum())
    return f"{wrong} counts differ" if wrong else "the flag is up" if flag.item() else None


def _gram(device, generator, backend, dtype, samples, inputs, units) -> str | None:
    x, weight = _integers(generator, samples, inputs), _integers(generator, units, inputs)
    a = activation_derivative(x.double() @ weight.double().t() / 8, "gelu", 0.0, 0.0)
    gram = torch.zeros(units, units, dtype=torch.float64, device=device)
    total, flag = gram.new_zeros(units), torch.zeros(1, dtype=torch.int64, device=device)
    operands = (x.to(device, dtype), (weight / 8).to(device, dtype))
    agop.derivative_gram_update(*operands, None, "gelu", gram, total, flag, backend=backend)
    return _far(gram, (a.t() @ a).triu(), dtype if backend == "eager" else torch.float32) or _far(
        total, a.sum(0), dtype if backend == "eager" else torch.float32
    )


def _chain(device, generator, backend, dtype, samples, depth, units) -> str | None:
    left, inner = _integers(generator, 3, depth), _integers(generator, samples, depth)
    v, outer = _integers(generator, depth, units), _integers(generator, samples, units)
    rows = ((left.double() * inner.double()[:, None]) @ v.double() * outer.double()[:, None]).flatten(0, 1)
    gram = torch.zeros(units, units, dtype=torch.float64, device=device)
    first, second, third, last = (t.to(device, dtype) for t in (left, inner, v, outer))
    agop.chain_gram_update(first, second, third, last, gram, backend=backend)
    return _far(gram, (rows.t() @ rows).triu(), dtype)


def _ebr(device, generator, backend, dtype, low, dims, hidden, latent, psi) -> str | None:
    def layers(*widths: int) -> list[Tensor]:
        found = []
        for a, b in pairwise(widths):
            found += [torch.randn(b, a, generator=generator) / a**0.5, torch.randn(b, generator=generator) / 4]
        return found

    heads = [layers(d, hidden, latent) for d in dims], [layers(latent, hidden, d) for d in dims]
    last = layers(latent, *psi, len(dims))
    features = [torch.randn(130, d, generator=generator) for d in dims]
    present = torch.rand(130, len(dims), generator=generator) < 0.8

    def leaf(t: Tensor, kind: torch.dtype, where: torch.device) -> Tensor:
        return t.to(dtype).to(where, kind).requires_grad_()  # both sides start from the same rounded numbers

    def run(kind: torch.dtype, where: torch.device, how: str) -> list[Tensor]:
        leaves = [[leaf(t, kind, where) for t in head] for group in heads for head in group]
        psi_leaves = [leaf(t, kind, where) for t in last]
        inputs = [leaf(f, kind, where) for f in features]
        with torch.autocast(where.type, torch.bfloat16, enabled=low and kind == torch.float32):
            out = functional.ebr_step(
                inputs, leaves[: len(dims)], leaves[len(dims) :], psi_leaves, present=present.to(where), reversal=0.3,
                backend=how,
            )  # fmt: skip
        total = sum(r.float().square().sum() for r in out.recovered) / 100
        (total + out.discrimination_loss + out.reconstruction_loss).backward()
        wanted = [*out.recovered, out.discrimination_loss, *(t.grad for head in leaves for t in head)]
        return [t.detach() for t in (*wanted, *(t.grad for t in psi_leaves), *(f.grad for f in inputs))]

    truth = run(torch.float64, torch.device("cpu"), "reference")
    own = torch.float32 if low else dtype
    for index, (got, expected) in enumerate(zip(run(own, device, backend), truth, strict=True)):
        limits = _LIMITS if index <= len(dims) else _GRADIENT_LIMITS  # what is recovered and the loss come first
        if problem := _far(got, expected, dtype, limits):
            return f"output {index}: {problem}"
    return None


def _far(got: Tensor, expected: Tensor, dtype: torch.dtype, limits: dict[torch.dtype, float] = _LIMITS) -> str | None:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        dtype = torch.float16  # TF32 keeps as many bits of the operands
    error = float((got.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30))
    return None if error <= limits[dtype] else f"relative error {error:.1e}"
