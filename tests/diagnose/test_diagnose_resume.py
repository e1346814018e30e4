"""A diagnosis that was killed goes on and gives the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diagnose_models import Toy, batches, chain
from torch import Tensor, nn

from mmc_fast.diagnose import diagnose
from mmc_fast.errors import InputError


class Killed(Exception):
    pass


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("at", ["collect 3", "collect 9", "score 2", "score 7"])
def test_killed_and_resumed_gives_the_same_numbers(
    general: bool, at: str, generator: torch.Generator, tmp_path
) -> None:
    head = chain(generator, 2)
    loader = batches(generator, 700, 70, classes=2)
    toy = Toy(nn.ModuleList([head]), None if general else head)
    toy.fuse = lambda f: head(torch.cat(list(f.values()), 1))
    options = {"resamples": 20, "probes": True, "seed": 3}
    expected = diagnose(toy, loader, **options)
    state = tmp_path / "s.state"
    encoded: list[int] = []

    def kill(phase: str, done: int, total: int | None) -> None:
        if f"{phase} {done}" == at:
            raise Killed

    with pytest.raises(Killed):
        diagnose(toy, loader, state=state, save_every=0, progress=kill, **options)
    buffered = not general and at.startswith("collect")  # less than one flush: nothing is settled yet
    assert state.is_file() != buffered
    original = Toy.encode

    def counted(self: Toy, batch: Any) -> dict[str, Tensor]:
        encoded.append(1)
        return original(self, batch)

    toy.encode = counted.__get__(toy)
    got = diagnose(toy, loader, state=state, **options)
    assert got == expected
    assert not state.exists()
    if not buffered:
        assert len(encoded) < 24, "what was done is not done again"


def test_a_state_of_something_else_is_refused(generator: torch.Generator, tmp_path) -> None:
    head, other = chain(generator), chain(generator)
    loader = batches(generator)
    state = tmp_path / "s.state"

    def kill(phase: str, done: int, total: int | None) -> None:
        if phase == "score" and done == 3:
            raise Killed

    with pytest.raises(Killed):
        diagnose(Toy(head, head), loader, state=state, save_every=0, progress=kill)
    for call, message in (
        (lambda: diagnose(Toy(head, head), batches(generator), state=state), "same data in the same order"),
        (lambda: diagnose(Toy(other, other), loader, state=state), "same data in the same order|another head"),
        (lambda: diagnose(Toy(head, head), loader, state=state, seed=9), "other groups, seed"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    state.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="delete it to start over"):
        diagnose(Toy(head, head), loader, state=state)
