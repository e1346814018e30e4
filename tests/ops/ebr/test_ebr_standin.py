"""What the Triton backend does on the host, by a stand-in for the driver: compilations, launches, calls."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from triton_standin import standin

from mmc_fast.nn import EBRHead

BATCHES = (512, 511, 384, 256, 320, 400, 448, 128, 64, 100, 96, 37, 1, 640, 704, 1000, 208, 16, 2048, 4100)


def trained(head: EBRHead, batch: int, **call: Tensor) -> Callable[[], None]:
    features = [torch.zeros(batch, d, requires_grad=True) for d in head.dims]
    upstream = [torch.zeros(batch, d) for d in head.dims]
    one, lambda_ = torch.ones(()), torch.tensor(0.5)

    def step() -> None:
        out = head(features, reversal=lambda_, **call)
        outputs = [*out.recovered, out.discrimination_loss, out.reconstruction_loss]
        torch.autograd.grad(outputs, [*features, *head.parameters()], [*upstream, one, one])

    return step


@pytest.mark.parametrize(
    ("dims", "hidden", "latent", "psi"),
    [([128] * 4, 1024, 512, (512, 256)), ([74, 35, 300, 33], 66, 131, (9, 7)), ([16] * 5, 16, 16, (16,))],
)
def test_another_batch_size_compiles_nothing(dims, hidden, latent, psi):
    head = EBRHead(dims, latent, hidden, psi, backend="triton", normalize=True)
    with standin() as recorder:
        trained(head, 50)()
        first = len(recorder.compiled)
        for batch in BATCHES:
            trained(head, batch)()
        assert len(recorder.compiled) == first, Counter(name for name, _ in recorder.compiled)


def test_work_on_the_host():
    """Launches, and calls of functions (Python's and C's), of a step with four modalities: as few as were counted once."""
    head = EBRHead([128] * 4, 512, 1024, (512, 256), backend="triton")
    with standin() as recorder:
        step = trained(head, 8)
        step()
        first = list(recorder.launches)
        found = count(step)
    assert recorder.launches == 2 * first
    assert len(first) == 14
    assert found["call"] <= 1700
    assert found["c_call"] <= 1500


def test_modalities_cost_the_host_little():
    found = []
    for m in (2, 12):
        with standin():
            step = trained(EBRHead([16] * m, 16, 16, (16,), backend="triton"), 8)
            step()
            found.append(sum(count(step).values()))
    assert found[1] < 3.5 * found[0]


def count(step: Callable[[], None]) -> Counter[str]:
    found: Counter[str] = Counter()

    def seen(frame, event, argument) -> None:
        if event in ("call", "c_call"):
            found[event] += 1

    threading.setprofile(seen)
    sys.setprofile(seen)
    try:
        step()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return found


@pytest.mark.parametrize(
    ("name", "given"),
    [("present", torch.empty(4, 2, dtype=torch.bool, device="meta")), ("source", torch.empty(4, 2, 2, device="meta")),
     ("normalizer", torch.empty(2, device="meta"))],
)  # fmt: skip
def test_a_tensor_on_another_device_is_refused(name, given):
    head = EBRHead([3, 5], 4, 6, (), backend="eager")
    with pytest.raises(TypeError, match=rf"{name} is on meta but features\[0\] is on cpu; move it there"):
        head([torch.ones(4, 3), torch.ones(4, 5)], **{name: given})
