"""One pass over the data: everything that is summed about features, layers and fused representation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmc_fast._util.names import check_name
from mmc_fast.agop.head import linear_chain
from mmc_fast.errors import InputError
from mmc_fast.ops.dispatch import choose

from .adapter import Adapter, beyond_features, flat, prove
from .features import check_rows, checked_features, fingerprint_of
from .groups import GroupMoments, dealt
from .layers import ChainSums, JacobianSums
from .reservoir import Reservoir
from .tasks import Metric, Task

FLUSH_ROWS = 4096
MAX_WIDTH, MAX_INPUT = 4096, 8192
_OPENING = 64
_KEPT = ("samples", "batches", "flushes", "labelled", "first", "widths")


class Collector:
    """Sums for random groups of samples; set up by the first batch. ``sums=False``: a sample of rows only."""

    def __init__(
        self,
        adapter: Adapter,
        groups: int,
        seed: int,
        sample_rows: int,
        metric: Metric | None = None,
        sums: bool = True,
    ) -> None:
        self.adapter, self.groups, self.seed = adapter, groups, seed
        self.metric, self.sums = metric, sums
        self.task: Task | None = None
        self.reservoir = Reservoir(sample_rows, seed)
        self.widths: dict[str, int] = {}
        self.samples, self.batches, self.flushes = 0, 0, 0
        self.labelled = True
        self.first = ""
        self.chain: ChainSums | None = None
        self.jacobians: JacobianSums | None = None
        self.represent: Callable[[Mapping[str, Tensor]], Tensor] = adapter.fuse
        self.notes: list[str] = []
        self._buffer: list[Tensor] = []

    @property
    def layers(self) -> ChainSums | JacobianSums:
        found = self.chain or self.jacobians
        if found is None:
            raise InputError("diagnose: the loader gave no batch; give at least one")
        return found

    def start(self, batch: Any) -> None:
        """Learn the shapes from a batch, choose the fast or the general path, check that rows are independent."""
        self.proof = prove(self.adapter, batch)
        features = checked_features(self.adapter, batch, self.widths, 0)
        if not len(flat(features)):
            raise InputError("diagnose: the first batch has no rows; give batches with samples")
        if "all" in features:
            raise InputError("diagnose: a modality is named 'all', which stands for all of them; give another name")
        self.widths = {check_name("diagnose: a modality", name): x[0].numel() for name, x in features.items()}
        logits = self.adapter.fuse(features)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(flat(features)):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(f"diagnose: fuse() returned {got}; it must return logits [samples, classes]")
        if not bool(torch.isfinite(logits).all()):
            raise InputError("diagnose: the logits hold NaN or infinite values for finite features; check the weights")
        self.first = fingerprint_of(features | {"": logits})
        self.opening = flat(features)[:_OPENING].detach().cpu().double()
        check_rows(self.adapter, features, logits)
        beyond = beyond_features(features, logits, self.adapter)
        if beyond > 1e-3:
            self.notes.append(
                f"{beyond:.1%} of the outputs' variance follows the batch and not the named features (absent modalities, "
                "masks, inputs that go past the modules); that part is of no modality here."
            )
        self.outputs = logits.shape[1]
        self.task = Task.of(self.adapter, batch, self.outputs, self.metric)
        if self.task is not None:
            note = self.task.check_outputs(logits)
            self.notes += [note] if note else []
        if not self.sums:
            return
        modules = linear_chain(getattr(self.adapter, "head", None))
        x = flat(features)
        if modules is not None and self._is_head(modules, x, logits):
            self.chain = ChainSums(modules, self.groups)
            self.columns = [u.shape[1] for u in self.chain.inputs(x[:1].float())]
        else:
            self.jacobians = JacobianSums(self.groups)
            self.represent = getattr(self.adapter, "represent", None) or self.adapter.fuse
            self.notes.append(
                "The fusion is no chain of Linear layers on the features side by side, so there is one AGOP, at the "
                "features, by one backward pass per output, and no map of weights."
            )
            fused, limit = self._represent(features).shape[1], MAX_WIDTH - x.shape[1]
            if self.represent == self.adapter.fuse:
                self.notes.append("No fused representation is named; the logits stand for it.")
            elif limit >= logits.shape[1] and fused > limit:
                self.represent = self.adapter.fuse
                self.notes.append(
                    f"The fused representation has {fused} columns, too many to sum; the logits stand for it. Name a "
                    "narrower module, ModelAdapter(..., fused=...)."
                )
            self.columns = [x.shape[1], self._represent(features).shape[1]]
        if sum(self.columns) > MAX_WIDTH:
            raise InputError(
                f"diagnose: features and layers have {sum(self.columns)} columns together, more than {MAX_WIDTH}; name "
                "narrower features, such as pooled tokens instead of all of them, or give agop=False: scores and verdicts alone"
            )
        native = self.chain is not None and choose("syrk_update", "auto", torch.zeros(1, 1)) == "cpp"
        self.moments = GroupMoments(self.groups, sum(self.columns), native)

    def add(self, batch: Any) -> None:
        """One batch of the first pass."""
        features = checked_features(self.adapter, batch, self.widths, self.batches)
        x = flat(features)
        labels = self.labels(batch)
        if labels is not None and len(labels) != len(x):
            raise InputError(f"diagnose: batch {self.batches} has {len(x)} rows and {len(labels)} labels")
        if self.batches and self.labelled != (labels is not None):
            raise InputError(
                f"diagnose: batch {self.batches} and the ones before differ in having labels; give all or none"
            )
        self.labelled = self.labelled and labels is not None
        row, place = torch.arange(self.samples, self.samples + len(x)), self.places(self.batches, len(x))
        sample = {"x": x.float(), "row": row, "place": place} | ({} if labels is None else {"labels": labels})
        latents = getattr(self.adapter, "latents", None)
        if latents is not None:
            sample |= {f"latent.{name}": z.detach().float() for name, z in latents(batch).items()}
        sample |= {f"input.{name}": v for name, v in self.inputs(batch).items()}
        if not self.sums:
            pass
        elif self.jacobians is not None:
            places = dealt(self.groups, len(x), self.seed, "groups", self.flushes)
            self.jacobians.add(self.adapter.fuse, features, places)
            self._add_rows(torch.cat([x, self._represent(features)], 1), places, None)
            self.flushes += 1
        else:
            self._buffer.append(x.float())
        self.reservoir.add(self.batches, sample)
        self.samples += len(x)
        self.batches += 1
        if sum(map(len, self._buffer)) >= FLUSH_ROWS:
            self.flush()

    def labels(self, batch: Any) -> Tensor | None:
        """Labels of a batch as its task has them; None where there are none."""
        if self.task is None and Task.of(self.adapter, batch, self.outputs, self.metric) is not None:
            raise InputError("diagnose: the first batch has no labels and a later one has; give all or none")
        return None if self.task is None else self.task.labels(self.adapter, batch)

    def inputs(self, batch: Any) -> dict[str, Tensor]:
        """What the encoders receive, where the adapter tells and it is narrow enough to keep."""
        tell = getattr(self.adapter, "inputs", None)
        if tell is None or not self.sums:
            return {}
        found = {name: x.detach().float().cpu().flatten(1) for name, x in tell(batch).items()}
        return {name: x for name, x in found.items() if name in self.widths and x.shape[1] <= MAX_INPUT}

    def check_again(self, batch: Any) -> None:
        """InputError where the first batch has other features when the data are read again."""
        now = flat(checked_features(self.adapter, batch, self.widths, 0))[:_OPENING].detach().cpu().double()
        gap = (now - self.opening).square().mean() if now.shape == self.opening.shape else math.inf
        if not gap <= 1e-4 * float(self.opening.var(0, correction=0).mean()) + 1e-12 * self.opening.square().mean():
            raise InputError(
                "diagnose: the data begin with other features when they are read again (shuffled batches, random transforms "
                "or a random encoder); give a fixed order, such as DataLoader(..., shuffle=False)"
            )

    def flush(self) -> None:
        """Sum what is buffered."""
        if not self._buffer or self.chain is None:
            return
        x = torch.cat(self._buffer)
        self._buffer = []
        inputs = self.chain.inputs(x)
        if not all(bool(torch.isfinite(u).all()) for u in inputs):
            raise InputError("diagnose: a layer of the head gave NaN or infinite values for finite features; check it")
        self._add_rows(torch.cat(inputs, 1), dealt(self.groups, len(x), self.seed, "groups", self.flushes), inputs)
        self.flushes += 1

    @property
    def settled(self) -> bool:
        """Nothing waits in a buffer, so the state is complete."""
        return not self._buffer

    def _add_rows(self, rows: Tensor, places: Tensor, inputs: list[Tensor] | None) -> None:
        order = places.argsort(stable=True)
        counts = torch.bincount(places, minlength=self.groups).tolist()
        rows = rows[order].detach().cpu()
        sorted_inputs = [u[order] for u in inputs or ()]
        start = 0
        for group, count in enumerate(counts):
            if count:
                part = slice(start, start + count)
                self.moments.add(group, rows[part].float() if self.chain else rows[part].double())
                if self.chain is not None:
                    self.chain.add(group, [u[part].contiguous() for u in sorted_inputs])
            start += count

    def places(self, index: int, count: int) -> Tensor:
        """The group of each of the ``count`` rows of batch ``index`` where it is scored."""
        return dealt(self.groups, count, self.seed, "scores", index)

    @torch.no_grad()
    def _represent(self, features: Mapping[str, Tensor]) -> Tensor:
        return self.represent(features).detach().flatten(1)

    @torch.no_grad()
    def _is_head(self, modules: list[Any], x: Tensor, logits: Tensor) -> bool:
        if modules[0].weight.shape[1] != x.shape[1] or modules[0].weight.dtype != torch.float32:
            return False
        y = x.float()
        for module in modules:
            y = module(y.clone() if getattr(module, "inplace", False) else y)
        return y.shape == logits.shape and torch.allclose(
            y, logits.float(), rtol=1e-4, atol=1e-4 * float(logits.abs().max())
        )

    def to_state(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"reservoir": self.reservoir}
        if self.sums:
            parts |= {"moments": self.moments, "layers": self.layers}
        return {name: getattr(self, name) for name in _KEPT} | {name: part.to_state() for name, part in parts.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was written; the collector was started with the first batch of the same data."""
        if state["first"] != self.first or state["widths"] != self.widths:
            raise InputError(
                "diagnose: the first batch is not that of the unfinished diagnosis; use the same data in the same order "
                "(no shuffling), or delete the state to start over"
            )
        for name in _KEPT:
            setattr(self, name, state[name])
        if self.sums:
            self.moments.load_state(state["moments"])
            self.layers.load_state(state["layers"])
        self.reservoir.load_state(state["reservoir"])

    def active(self) -> np.ndarray:
        """1 for groups that have samples, 0 for others."""
        return np.array([float(s.n > 0) for s in self.moments.states])
