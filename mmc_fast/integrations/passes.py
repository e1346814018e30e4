"""``Pass``: what the heads of a model have done in one forward, and what waits for the rest of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .deferred import Context
from .losses import EBRLosses, Record
from .site import Site


class Settings(NamedTuple):
    """What context managers of the handle set: masks by modality, a source, or rows that sites give as they are."""

    masks: list[Tensor | None] | None = None
    source: Tensor | None = None
    given: list[Tensor] | None = None


class Waiting(NamedTuple):
    """Features of one site that wait for those of the others."""

    site: Site
    features: Tensor  # as the site gave them
    rows: Tensor  # [B, ..., d], in the dtype of the head
    present: Tensor | None
    context: Context
    version: int | None


class Pass:
    """One forward of the model, or (``scope``) several that count together."""

    def __init__(self, reversal: float | Tensor, settings: Settings, grad: bool, compiled: bool, scope: bool) -> None:
        self.reversal, self.settings = reversal, settings
        self.compiled, self.scope = compiled, scope
        self.wants_grad = self.grad = grad  # of the pass, and of the forward that runs
        self.depth = 0  # forwards of the whole model that are running
        self.taken = False  # the losses were asked for
        self.records: list[Record] = []
        self.means: list[tuple[EBRLosses, list[Record]]] = []  # of the calls for all heads, with what they are over
        self.discrimination: list[Tensor] = []  # sums over samples, of the calls for one
        self.reconstruction: list[Tensor] = []
        self.losses: tuple[int, EBRLosses] | None = None
        self.ran: dict[int, int] = {}  # modality -> calls in this forward
        self.called: dict[str, int] = {}  # module -> calls in this forward
        self.pending: dict[int, Waiting] = {}
        self.values: dict[int, Tensor] = {}  # what sites whose head has run give to the model
        self.contexts: dict[int, Context] = {}
        self.lent: set[int] = set()  # those that the model may have changed
        self.at_fusion = False
        self.alone: str | None = None  # why no head waits for others; "" where they do
        self.together = False  # one call of the op served all heads

    def counts(self) -> bool:
        """Whether rows count that are given now: in a step with gradients, those of a look without do not."""
        return not self.scope or torch.is_grad_enabled() or not self.wants_grad
