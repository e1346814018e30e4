"""What an EBR launch needs to know before it starts: tiles, sizes, and the call's tensors as kernels take them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import common
from ..common import DTYPES, Tile, cdiv, input_precision, triton_version
from .rows import ebr_pack_kernel, ebr_table_kernel

MOST_MODALITIES = 64
_LONGEST_ROW = 2**24  # elements; offsets within a tile are 32 bits
_PACK = {"BR": 32, "BC": 64}

# kind of product (common.product_kind) -> (rows, columns) that a layer asks for -> tile. That depends on the widths of the
# layer and never on the batch: a batch of another size must not compile anew.
TILES = {
    kind: {
        (rows, columns): Tile({"BM": rows, "BN": columns, "BK": depth}, 8 if rows == 128 else 4, 3)
        for rows, columns in ((128, 128), (64, 128), (64, 64))
    }
    for kind, depth in (("half", 64), ("tf32", 32))
}
_SPLIT = {64: Tile({"BM": 64, "BN": 64, "BK": 16}, 4, 3), 128: Tile({"BM": 128, "BN": 64, "BK": 32}, 8, 3)}
TILES["tf32x3"] = {wanted: _SPLIT[wanted[1]] for wanted in TILES["tf32"]}  # larger ones spill on sm_80
LOSS_TILES = {
    "half": Tile({"BM": 64, "BP": 64}, 4, 2),
    "tf32": Tile({"BM": 64, "BP": 64}, 4, 2),
    "tf32x3": Tile({"BM": 32, "BP": 32}, 4, 2),
}


def product_tile(kind: str, columns: int, rows: int = 1 << 30) -> Tile:
    """The tile for products of so many columns; ``rows``: of the weight gradients of the same launch."""
    wanted = (128 if columns >= 256 and rows >= 128 else 64, 128 if columns >= 256 else 64)
    return TILES[kind][wanted]


def shares(rows: int, each: int, most: int) -> int:
    """Into how many shares a sum over rows is cut: of about ``each`` rows, in whole blocks of 64, none of them empty."""
    n = min(most, max(1, rows // each))
    return cdiv(rows, cdiv(cdiv(rows, n), 64) * 64)


def round16(n: int) -> int:
    """The next multiple of 16."""
    return cdiv(n, 16) * 16


@dataclass(frozen=True)
class Sizes:
    """Widths of one EBR head; ``psi`` starts with the latent width and ends with m."""

    m: int
    dims: tuple[int, ...]
    hidden: int
    psi: tuple[int, ...]

    @staticmethod
    def of(features: Sequence[Tensor], params: Sequence[Tensor]) -> Sizes:
        m = len(features)
        discriminator = params[8 * m :]
        psi = (discriminator[0].shape[1], *(w.shape[0] for w in discriminator[0::2]))
        return Sizes(m, tuple(f.shape[1] for f in features), params[0].shape[0], psi)

    @property
    def latent(self) -> int:
        return self.psi[0]

    @functools.cached_property
    def even(self) -> bool:
        """Whether 16 divides every width, so that stores of results move 16 bytes at a time."""
        return not any(n % 16 for n in (*self.dims, self.hidden, *self.psi[:-1]))


def unsupported(features: Sequence[Tensor], params: Sequence[Tensor]) -> str | None:
    """Say which size the kernels cannot run, None where they can."""
    m, dtype = len(features), features[0].dtype
    if dtype not in DTYPES:
        return f"the kernels compute in float32, bfloat16 and float16 and features[0] is {dtype}"
    if m > MOST_MODALITIES:
        return f"the kernels take at most {MOST_MODALITIES} modalities and got {m}"
    for i in range(2 * m):
        if params[4 * i].shape[0] != params[0].shape[0]:
            return "the kernels need one hidden width for all encoders and decoders"
    sizes = Sizes.of(features, params)
    if 0 in (*sizes.dims, *sizes.psi, sizes.hidden):
        return "the kernels need widths of at least 1"
    return None


class Needs(NamedTuple):
    """Which gradients are wanted of a backward: of some feature, of the source, of some parameter."""

    features: bool
    source: bool
    params: bool


class Upstream(NamedTuple):
    """Gradients of what forward returned, None where there is none."""

    recovered: tuple[Tensor | None, ...]
    latents: Tensor | None
    discrimination: Tensor | None
    reconstruction: Tensor | None


class Plan:
    """What calls of equal sizes, dtypes, strides, device and options share.

    ``made``: what was computed from the sizes; ``compiled``: by the number of a launch, its compiled kernel, grid and constants;
    ``regular``: whether the kernels read all where it lies; ``heads``: parameters of the heads in the table's order.
    """

    def __init__(self, sizes: Sizes, strides: Sequence[int]) -> None:
        m = sizes.m
        self.sizes, self.numbers = sizes, tuple(strides)
        self.heads = itemgetter(*((c // 4) * 4 * m + 4 * i + c % 4 for c in range(8) for i in range(m)))
        self.made: dict[Any, Any] = {}
        self.compiled: dict[int, tuple[Any, tuple[int, int, int], tuple[Any, ...]]] = {}
        self.regular = False


_plans: dict[tuple[Any, ...], Plan] = {}
_MOST_PLANS = 256
# what a launch does after the look-up is an internal of Triton: other versions look up every time
_RELAUNCHES = triton_version() in ((3, 7), (3, 8))


class Call(common.Launches):
    """Tensors of a call as the kernels take them, its plan, and its table of addresses.

    ``what``: further options of the call; ``outside``: further tensors that come from outside, ``inside``: such that a
    forward of ours made.

    The table, in int64: for each modality 0-7 the head's parameters, 8 features and 9 their row stride, 10 width, 11
    ``recovered``; then the discriminator's 2 L parameters and L + 1 widths, and the hidden width. For a backward follow 0-7
    the gradients of the head's parameters, 8 of the features, 9 of the decoder's output, 10 of ``recovered`` and 11, 12 its
    strides; then the discriminator's 2 L gradients, and the sizes of a slab of the heads and of the discriminator.
    """

    def __init__(
        self, features, present, source, params, residual: bool, normalize: bool, what: tuple[Any, ...],
        outside: Sequence[Tensor | None], inside: Sequence[Tensor] = (),
    ) -> None:  # fmt: skip
        self.features, self.params = tuple(features), tuple(params)
        self.residual, self.normalize = residual, normalize
        self.present = None if present is None else present.contiguous().view(torch.uint8)
        self.source = None if source is None else source.contiguous()
        like = self.features[0]
        self.batch, self.dtype, self.device = like.shape[0], like.dtype, like.device
        self.precision = input_precision(self.dtype)
        self.kind = self.precision if self.dtype == torch.float32 else "half"
        outside = (present, source, *outside)
        psi = self.params[8 * len(self.features) :: 2]
        key = (
            what, *((f.shape, f.stride()) for f in self.features), self.params[0].shape[0], *(w.shape for w in psi),
            self.dtype, self.device, self.precision, residual, normalize, common.active_driver(),
            *(None if t is None else (t.dtype, t.stride()) for t in outside),
        )  # fmt: skip
        plan = _plans.get(key)
        if plan is None:
            if len(_plans) >= _MOST_PLANS:
                _plans.clear()
            plan = _plans[key] = Plan(Sizes.of(self.features, self.params), [f.stride(0) for f in self.features])
        self.plan, self.sizes = plan, plan.sizes
        self.layers = len(self.sizes.psi) - 1
        given = (*self.features, *self.params, *(t for t in outside if t is not None), *inside)
        aligned = not functools.reduce(or_, map(Tensor.data_ptr, given)) & 15
        super().__init__(
            like.device, plan.compiled, _RELAUNCHES and aligned and all(map(Tensor.is_contiguous, self.params))
        )
        self.table = like

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returned for this key in the first call of the plan."""
        made = self.plan.made.get(key)
        if made is None:
            made = self.plan.made[key] = make()
        return made

    def empty(self, *shape: int) -> Tensor:
        """A buffer in the dtype of the features."""
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def floats(self, *shape: int) -> Tensor:
        """A buffer of float32."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def rows(self, width: int) -> Tensor:
        """A buffer ``[m, B, width]``, the width rounded up to 16."""
        return self.empty(self.sizes.m, self.batch, round16(width))

    def address(self, recovered: Sequence[Tensor], *more: Any) -> None:
        """Write the table: the forward's part, then ``more``. Copies what the kernels cannot read where it lies."""
        m, plan = self.sizes.m, self.plan
        params, x, copies = self.params, self.features, []
        if not (self.relaunches and plan.regular):
            self.reached = [*x, *params, *recovered, *(t for t in more if isinstance(t, Tensor))]
            params, x, copies = self._readable()
            plan.regular = not copies
        heads, numbers = plan.heads(params), plan.numbers if plan.regular else [t.stride(0) for t in x]
        sizes = (*self.sizes.psi, self.sizes.hidden)
        values = (*heads, *x, *numbers, *self.sizes.dims, *recovered, *params[8 * m :], *sizes, *more, *copies)
        self.table = torch.empty(len(values), dtype=torch.int64, device=self.device)
        self.launch(ebr_table_kernel, 1, self.table, values, N=len(values), num_warps=1)
        if copies:
            largest = max(cdiv(t.shape[0], _PACK["BR"]) * cdiv(t.shape[1], _PACK["BC"]) for t in copies[1::7])
            self.launch(
                ebr_pack_kernel, (largest, len(copies) // 7), self.table[-len(copies) :], x[0], self.present, self.batch,
                M=m, **_PACK,
            )  # fmt: skip

    def _readable(self) -> tuple[list[Tensor], list[Tensor], list[Any]]:
        """Parameters and features, or buffers with widths rounded up; and what ``ebr_pack_kernel`` is to copy there."""
        copies: list[Any] = []

        def readable(t: Tensor, rows: int = 0, modality: int = -1) -> Tensor:
            columns = t.shape[-1]
            regular = t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and not columns % 16 and not rows % 16
            if regular and (t.dim() == 1 or (not t.stride(0) % 16 and t.stride(0) < _LONGEST_ROW)):
                return t
            real = -1 if modality >= 0 else t.shape[0] if t.dim() == 2 else 1
            held = self.empty(self.batch if modality >= 0 else round16(real), round16(columns))
            copies.extend((t, held, real, columns, t.stride(0) if t.dim() == 2 else 0, t.stride(-1), modality))
            self.reached.append(held)
            return held

        params = list(self.params)
        if not self.sizes.even or any(p.data_ptr() % 16 or not p.is_contiguous() for p in params[:-1]):
            params = [readable(p, p.shape[0] if p.dim() == 2 else 0) for p in params[:-2]]
            params += [readable(self.params[-2]), self.params[-1].contiguous()]
            self.reached.append(params[-1])
        return params, [readable(f, modality=i) for i, f in enumerate(self.features)], copies
