"""Random ±1 output probes: ``v = rᵀJ`` has ``E[v vᵀ] = JᵀJ``, at a cost that does not grow with the outputs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .finish import Panel
from .state import MomentState

__all__ = ["ProbeSums"]


class ProbeSums:
    """Sums over k probes per sample, kept in two independent halves (one for k = 1) so that their gap shows the error.

    Each half with k' probes keeps ``V = Σ v vᵀ`` and, to centre, ``M = Σ r vᵀ`` (``E[M] = k' Σ J``). Then

    ``G_c = V (1 + (C − 1) / (k' N)) / k' − MᵀM / (k'² N)``

    is unbiased for ``Σ (J − J̄)ᵀ(J − J̄)``: in ``MᵀM`` the pairs of two samples or two probes are independent and each
    of the k' N own pairs adds C v vᵀ instead of JᵀJ, which the first term takes back.
    """

    def __init__(
        self,
        probes: int,
        outputs: int,
        width: int,
        center: bool,
        device: torch.device,
        seed: int,
        kernel: str | None = None,
    ) -> None:
        self.probes, self.outputs, self.width, self.center = probes, outputs, width, center
        first = max(1, probes // 2)
        self.parts = [first] if probes == 1 else [first, probes - first]
        self.second = [MomentState(1, width, False, device, kernel) for _ in self.parts]
        self.signed = [
            torch.zeros(outputs if center else 0, width, dtype=torch.float64, device=device) for _ in self.parts
        ]
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    def draw(self, samples: int) -> Tensor:
        """Signs ``[n, k, C]`` on the CPU, int8; the stream does not depend on how samples are cut into calls."""
        needed = self.probes * self.outputs
        words = -(-needed // 32)
        bits = torch.randint(0, 2**32, (samples, words), generator=self._generator)
        signs = (bits[:, :, None] >> torch.arange(32)) & 1
        signs = (2 * signs - 1).to(torch.int8).reshape(samples, 32 * words)[:, :needed]
        return signs.reshape(samples, self.probes, self.outputs)

    def add(self, rows: Tensor, signs: Tensor) -> None:
        """Add ``v [n, k, width]`` of the signs ``[n, k, C]``, and count the samples."""
        start = 0
        for count, second, signed in zip(self.parts, self.second, self.signed, strict=True):
            part = rows[:, start : start + count]
            second.add(part)
            if self.center:
                signed += signs[:, start : start + count].flatten(0, 1).t() @ part.flatten(0, 1)
            start += count
        self.advance(len(rows))

    def add_one(self, row: Tensor, signs: Tensor | None, index: int) -> None:
        """Add probe ``index`` alone, ``v [n, width]``; ``advance(n)`` ends the batch."""
        half = 0 if index < self.parts[0] else 1
        self.second[half].add(row[:, None, :])
        if self.center and signs is not None:
            self.signed[half] += signs[:, index].t() @ row

    def advance(self, samples: int) -> None:
        for second in self.second:
            second.advance(samples)

    def panel(self, n: int) -> Panel:
        """The estimate from all probes: the halves weighted by their number of probes."""
        panels = self.part_panels(n)
        weights = [count / self.probes for count in self.parts]
        return lambda start, stop: sum(w * p(start, stop) for w, p in zip(weights, panels, strict=True))  # type: ignore[return-value]

    def part_panels(self, n: int) -> list[Panel]:
        """The estimate of each half alone."""
        return [
            self._panel(second.gram, signed, count, n)
            for second, signed, count in zip(self.second, self.signed, self.parts, strict=True)
        ]

    def _panel(self, gram: Tensor, signed: Tensor, count: int, n: int) -> Panel:
        if not self.center:
            return lambda start, stop: gram[start:stop, start:] / count
        many = max(1, n)
        own = (1 + (self.outputs - 1) / (count * many)) / count
        return lambda start, stop: (
            own * gram[start:stop, start:] - signed[:, start:stop].t() @ signed[:, start:] / (count * count * many)
        )

    def merge(self, other: ProbeSums) -> None:
        for mine, theirs in zip(self.second, other.second, strict=True):
            mine.merge(theirs)
        for sums, further in zip(self.signed, other.signed, strict=True):
            sums += further.to(sums.device)

    def detach_copy(self) -> ProbeSums:
        copy = ProbeSums(1, 1, 0, False, torch.device("cpu"), self.seed)
        copy.__dict__.update(self.__dict__)
        copy.second = [state.detach_copy() for state in self.second]
        copy.signed = [tensor.clone() for tensor in self.signed]
        return copy

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {"generator": self._generator.get_state()}
        for i, (second, signed) in enumerate(zip(self.second, self.signed, strict=True)):
            tensors.update({f"half{i}.{name}": tensor for name, tensor in second.to_tensors().items()})
            tensors[f"half{i}.signed"] = signed.clone()
        return tensors

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self._generator.set_state(tensors["generator"].cpu())
        for i, (second, signed) in enumerate(zip(self.second, self.signed, strict=True)):
            prefix = f"half{i}."
            second.load_tensors({name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)})
            signed.copy_(tensors[f"{prefix}signed"])

    def to_sums(self) -> Iterator[Tensor]:
        for second, signed in zip(self.second, self.signed, strict=True):
            yield from second.to_sums()
            yield signed.reshape(-1)

    def load_sums(self, sums: Iterator[Tensor]) -> None:
        for i, second in enumerate(self.second):
            second.load_sums(sums)
            self.signed[i] = next(sums).reshape(self.signed[i].shape)
