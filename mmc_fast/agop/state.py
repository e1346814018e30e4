"""What an AGOP remembers between batches: exact counts, or moments in float64. All merge, resume and sum over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmc_fast.ops.agop import op as primitives

# entries [start:stop, start:] of a symmetric matrix, float64 or the int64 of counts
Panel = Callable[[int, int], Tensor]

_SUMMING_KERNELS = ("cpp", "triton")  # backends whose syrk_update sums in float64 by itself
_STEP_ROWS = 1024  # rows summed in the working precision before they go to float64
_NARROW = 64  # BLAS sums narrow products in one chain, so these are summed in float64 at once
_EXACT = 2**53  # integers below are exact in float64


class CountState:
    """Co-activation counts: int64 ``[h, h]``, exact, so the order of batches and processes does not matter.

    They stand for ``AᵀA`` of ``A = 1`` where active and ``slope`` α elsewhere, about the mean with ``center``:
    ``α² N + α (1 − α)(n_i + n_j) + (1 − α)² c_ij``; centred ``(1 − α)² (c_ij − n_i n_j / N)``.
    """

    def __init__(self, zeros: Tensor, slope: float, center: bool) -> None:
        self.counts = zeros  # upper triangle
        self._slope, self._center = slope, center

    def panels(self, n: int) -> list[Panel]:
        counts, slope, ones = self.counts, self._slope, self.counts.diagonal()

        def panel(start: int, stop: int) -> Tensor:
            block = counts[start:stop, start:]
            if self._center:
                exact = centered_counts(block, ones[start:stop, None], ones[start:], n)
                return exact * ((1 - slope) ** 2 / max(1, n))
            if slope == 0:
                return block.clone()
            sums = (ones[start:stop, None] + ones[start:]).double()
            return slope**2 * n + slope * (1 - slope) * sums + (1 - slope) ** 2 * block.double()

        return [panel]

    def merge(self, other: CountState) -> None:
        self.counts += other.counts.to(self.counts.device)

    def to_tensors(self) -> dict[str, Tensor]:
        return {"counts": to_triangle(self.counts)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.counts = from_triangle(tensors["counts"].to(self.counts), len(self.counts))

    def to_sums(self) -> Iterator[Tensor]:
        yield to_triangle(self.counts).double()  # exact below 2^53

    def load_sums(self, sums: Iterator[Tensor]) -> None:
        self.counts = from_triangle(next(sums).to(torch.int64), len(self.counts))


class MomentState:
    """``Σ BᵀB`` over samples, each with rows ``B [R, h]``, and with ``center`` about the mean row of each of the R.

    Batches are merged by means and centred sums (Chan, Golub, LeVeque 1983), which does not cancel. The precision of
    the rows sums some hundred of them, float64 sums these.
    """

    def __init__(self, rows: int, width: int, center: bool, device: torch.device, kernel: str | None = None) -> None:
        self.n = 0
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)  # upper triangle
        self.mean = torch.zeros(rows, width, dtype=torch.float64, device=device) if center else None
        self._kernel = kernel

    def panels(self, n: int) -> list[Panel]:
        gram = self.gram
        return [lambda start, stop: gram[start:stop, start:].clone()]

    def add(self, rows: Tensor, first: int = 0) -> None:
        """Add ``rows [n, R', h]``: rows ``first .. first + R'`` of n further samples; ``advance(n)`` ends the batch."""
        samples, count, width = rows.shape
        if not samples:
            return
        if self.mean is not None:
            mean = rows.mean(dim=0)
            rows = rows - mean
            self._move_mean(samples, mean.double(), first)
        add_gram(rows.reshape(samples * count, width), self.gram, self._kernel)

    def advance(self, samples: int) -> None:
        """Close a batch of so many samples."""
        self.n += samples

    def merge(self, other: MomentState) -> None:
        self.gram += other.gram.to(self.gram.device)
        if other.mean is not None and other.n:
            self._move_mean(other.n, other.mean.to(self.gram.device))
        self.advance(other.n)

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {"n": torch.tensor(self.n), "gram": to_triangle(self.gram)}
        return tensors if self.mean is None else {**tensors, "mean": self.mean.clone()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.gram.copy_(from_triangle(tensors["gram"].to(self.gram), len(self.gram)))
        self.n = int(tensors["n"])
        if self.mean is not None:
            self.mean.copy_(tensors["mean"])

    def to_sums(self) -> Iterator[Tensor]:
        yield torch.tensor([self.n], dtype=torch.float64, device=self.gram.device)
        if self.mean is None:
            yield to_triangle(self.gram)
        else:
            yield to_triangle(torch.addmm(self.gram, self.mean.t(), self.mean, alpha=self.n))
            yield self.mean * self.n

    def load_sums(self, sums: Iterator[Tensor]) -> None:
        self.n = int(next(sums))
        self.gram = from_triangle(next(sums), len(self.gram))
        if self.mean is not None:
            self.mean = next(sums).reshape(self.mean.shape) / max(1, self.n)
            self.gram.addmm_(self.mean.t(), self.mean, alpha=-self.n)

    def _move_mean(self, samples: int, mean: Tensor, first: int = 0) -> None:
        """Take a batch with these mean rows into the mean, and what the shift adds into the Gram matrix."""
        if self.mean is None:
            return
        mine = self.mean[first : first + len(mean)]
        delta, total = mean - mine, self.n + samples
        self.gram.addmm_(delta.t(), delta, alpha=self.n * samples / total)
        mine += delta * (samples / total)


class ProbeState:
    """Sums over k random ±1 output probes r per sample: ``v = rᵀJ`` has ``E[v vᵀ] = JᵀJ`` whatever the outputs.

    They are kept in two independent halves (one for k = 1), whose gap shows the error. Each half with k' probes keeps
    ``V = Σ v vᵀ`` and, to centre, ``M = Σ r vᵀ`` (``E[M] = k' Σ J``). Then

    ``G_c = V (1 + (C − 1) / (k' N)) / k' − MᵀM / (k'² N)``

    is unbiased for ``Σ (J − J̄)ᵀ(J − J̄)``: in ``MᵀM`` the pairs of two samples or two probes are independent and each
    of the k' N own pairs adds C v vᵀ instead of JᵀJ, which the first term takes back.
    """

    def __init__(
        self, probes: int, outputs: int, width: int, center: bool, device: torch.device, seed: int,
        kernel: str | None = None,
    ) -> None:  # fmt: skip
        self.probes, self.outputs, self.center = probes, outputs, center
        half = max(1, probes // 2)
        self.parts = [half] if probes == 1 else [half, probes - half]
        self.second = [MomentState(1, width, False, device, kernel) for _ in self.parts]  # V
        signed = torch.zeros(outputs if center else 0, width, dtype=torch.float64, device=device)
        self.signed = [signed.clone() for _ in self.parts]  # M
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, samples: int) -> Tensor:
        """Signs ``[n, k, C]`` on the CPU, int8; the stream does not depend on how samples are cut into calls."""
        needed = self.probes * self.outputs
        words = -(-needed // 32)
        bits = torch.randint(0, 2**32, (samples, words), generator=self._generator)
        signs = (bits[:, :, None] >> torch.arange(32)) & 1
        signs = (2 * signs - 1).to(torch.int8).reshape(samples, 32 * words)[:, :needed]
        return signs.reshape(samples, self.probes, self.outputs)

    def add(self, rows: Tensor, signs: Tensor, first: int = 0) -> None:
        """Add probes ``first .. first + k'``, ``v [n, k', width]`` of all ``signs [n, k, C]``; then ``advance(n)``."""
        start = 0
        for count, second, signed in zip(self.parts, self.second, self.signed, strict=True):
            begin, end = max(first, start), min(first + rows.shape[1], start + count)
            if begin < end:
                part = rows[:, begin - first : end - first]
                second.add(part)
                if self.center:
                    signed += signs[:, begin:end].flatten(0, 1).t() @ part.flatten(0, 1)
            start += count

    def advance(self, samples: int) -> None:
        for second in self.second:
            second.advance(samples)

    def panels(self, n: int) -> list[Panel]:
        """The estimate from all probes, the halves weighted by their number of probes; then that of each half."""
        halves = [
            self._panel(second.gram, signed, count, max(1, n))
            for second, signed, count in zip(self.second, self.signed, self.parts, strict=True)
        ]
        if len(halves) == 1:
            return halves
        (a, b), k, (first, second) = self.parts, self.probes, halves
        return [lambda start, stop: a / k * first(start, stop) + b / k * second(start, stop), *halves]

    def _panel(self, gram: Tensor, signed: Tensor, count: int, n: int) -> Panel:
        if not self.center:
            return lambda start, stop: gram[start:stop, start:] / count
        own = (1 + (self.outputs - 1) / (count * n)) / count
        return lambda start, stop: (
            own * gram[start:stop, start:] - signed[:, start:stop].t() @ signed[:, start:] / (count * count * n)
        )

    def merge(self, other: ProbeState) -> None:
        for mine, theirs in zip(self.second, other.second, strict=True):
            mine.merge(theirs)
        for signed, further in zip(self.signed, other.signed, strict=True):
            signed += further.to(signed.device)

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {"generator": self._generator.get_state()}
        for i, (second, signed) in enumerate(zip(self.second, self.signed, strict=True)):
            tensors.update({f"half{i}.{name}": tensor for name, tensor in second.to_tensors().items()})
            tensors[f"half{i}.signed"] = signed.clone()
        return tensors

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._generator.set_state(tensors["generator"].cpu())
        for i, (second, signed) in enumerate(zip(self.second, self.signed, strict=True)):
            second.load_tensors({name.removeprefix(f"half{i}."): tensor for name, tensor in tensors.items()
                                 if name.startswith(f"half{i}.")})  # fmt: skip
            signed.copy_(tensors[f"half{i}.signed"])

    def to_sums(self) -> Iterator[Tensor]:
        for second, signed in zip(self.second, self.signed, strict=True):
            yield from second.to_sums()
            yield signed

    def load_sums(self, sums: Iterator[Tensor]) -> None:
        for second, signed in zip(self.second, self.signed, strict=True):
            second.load_sums(sums)
            signed.copy_(next(sums).reshape(signed.shape))


State = CountState | MomentState | ProbeState


def all_reduce_sums(
    states: Sequence[State], nonfinite: Tensor, n: int, fingerprint: str, seed: int | None, group: Any
) -> int:
    """Replace ``states`` and ``nonfinite`` by their sums over a process group; returns the total number of samples.

    One all-reduce of one float64 vector, symmetric matrices as triangles. Each process also writes a hash of its head
    and its probe seed into a place of its own, so that the same all-reduce shows to all whether the sums belong together.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("agop: sync() needs a process group; call torch.distributed.init_process_group() first")
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    if n >= _EXACT // world:
        raise RuntimeError(f"agop: {n} samples in each of {world} processes exceed 2^53, where counts stop being exact")
    places = torch.zeros(3, world, dtype=torch.float64, device=nonfinite.device)
    places[0, rank] = int(fingerprint[:12], 16)  # 48 bits
    places[1, rank] = 0 if seed is None else seed % 2**52
    places[2, rank] = n
    parts = [places.reshape(-1), nonfinite.double()]
    parts += [part.reshape(-1) for state in states for part in state.to_sums()]
    packed = torch.cat(parts)
    dist.all_reduce(packed, group=group)
    pieces = iter(packed.split([len(part) for part in parts]))
    heads, seeds, counts = next(pieces).reshape(3, world)
    if len(set(heads.tolist())) > 1:
        raise RuntimeError("agop: the processes hold different heads or options; load the same checkpoint in each")
    used = seeds[counts > 0].tolist()
    if seed is not None and len(set(used)) < len(used):
        raise RuntimeError("agop: two processes drew their probes with one seed; pass seed=base + rank")
    nonfinite.copy_(next(pieces).to(torch.int64))
    for state in states:
        state.load_sums(pieces)
    return int(counts.sum())


def centered_counts(counts: Tensor, first: Tensor, second: Tensor, n: int) -> Tensor:
    """``n·counts − first·second`` in exact integers, rounded once to float64; int64 in, broadcast.

    Below 2^31 samples the products fit 63 bits; beyond, they are formed in limbs of 31 bits (128 bits in all).
    """
    if n < 2**31:
        return (n * counts - first * second).double()
    mask = 2**31 - 1
    n1, n0 = n >> 31, n & mask
    c1, c0 = counts >> 31, counts & mask
    a1, a0 = first >> 31, first & mask
    b1, b0 = second >> 31, second & mask
    low = n0 * c0 - a0 * b0
    middle = n1 * c0 + n0 * c1 - a1 * b0 - a0 * b1 + (low >> 31)  # the shift rounds down, so the rest is not negative
    high = n1 * c1 - a1 * b1 + (middle >> 31)
    rest = ((middle & mask) << 31) + (low & mask)  # value = high · 2^62 + rest
    near_zero = (high == 0) | (high == -1)
    exact = torch.where(near_zero, rest + high.clamp(-1, 0) * 2**62, 0).double()
    return torch.where(near_zero, exact, high.double() * 2.0**62 + rest.double())


def add_gram(rows: Tensor, gram: Tensor, kernel: str | None) -> None:
    """``gram += rowsᵀ rows`` on the upper triangle, in place: ``rows [R, h]``, float64 ``gram [h, h]``; by a kernel that
    sums in float64, or by torch some rows at a time."""
    if kernel in _SUMMING_KERNELS:
        primitives.syrk_update(rows, gram, backend=kernel)
    elif rows.dtype == torch.float64 or len(gram) <= _NARROW:
        _add_panels(rows.double(), gram)
    else:
        for part in rows.split(_STEP_ROWS):
            total = torch.zeros_like(gram, dtype=rows.dtype)
            _add_panels(part, total)
            gram += total


def _add_panels(rows: Tensor, gram: Tensor) -> None:
    """As :func:`add_gram`, where both have one dtype.

    Panels of columns skip most of the lower half: 5/8 of the arithmetic of the full product. Below the diagonal of
    ``gram`` there are parts of the same sums or nothing.
    """
    width = rows.shape[1]
    step = max(64, -(-width // 4))
    for start in range(0, width, step):
        stop = min(start + step, width)
        gram[start:stop, start:].addmm_(rows[:, start:stop].t(), rows[:, start:])


def to_triangle(matrix: Tensor) -> Tensor:
    """The upper triangle with its diagonal, row after row: ``[h, h] -> [h (h + 1) / 2]``."""
    rows, columns = torch.triu_indices(*matrix.shape, device=matrix.device)
    return matrix[rows, columns]


def from_triangle(packed: Tensor, width: int) -> Tensor:
    """Undo ``to_triangle``; zeros below the diagonal."""
    matrix = packed.new_zeros(width, width)
    rows, columns = torch.triu_indices(width, width, device=packed.device)
    matrix[rows, columns] = packed
    return matrix
