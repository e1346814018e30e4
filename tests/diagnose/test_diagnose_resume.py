"""A diagnosis that was killed goes on and gives the same numbers."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
from typing import Any

import pytest
import torch
from diagnose_models import Attention, Toy, batches, chain
from torch import Tensor, nn

from mmc_fast._util.atomic import SaveFailed
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


def fraction_right(outputs: Tensor, labels: Tensor) -> float:
    return float((outputs.argmax(1) == labels).double().mean())


@pytest.mark.parametrize(
    ("labelled", "metric", "at"), [(False, None, ("collect", 3)), (True, fraction_right, ("score", 3))]
)
def test_without_labels_or_with_an_own_metric_it_goes_on_too(
    labelled: bool, metric: Any, at: tuple[str, int], generator: torch.Generator, tmp_path
) -> None:
    head, loader, state = chain(generator), batches(generator), tmp_path / "s.state"
    toy: Any = Toy(nn.ModuleList([head]))
    toy.fuse = lambda f: head(torch.cat(list(f.values()), 1))
    if not labelled:
        toy.labels = lambda batch: None
    options = {"resamples": 20, "metric": metric, "probes": False}
    expected = diagnose(toy, loader, **options)

    def kill(phase: str, done: int, total: int | None) -> None:
        if (phase, done) == at:
            raise Killed

    with pytest.raises(Killed):
        diagnose(toy, loader, state=state, save_every=0, progress=kill, **options)
    assert diagnose(toy, loader, state=state, **options) == expected


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
    good = state.read_bytes()
    fusion, another = Attention(generator), Attention(generator)  # no chain whose weights would be compared
    state.unlink()
    with pytest.raises(Killed):
        diagnose(Toy(fusion), loader, state=state, save_every=0, progress=kill)
    with pytest.raises(InputError, match="same data in the same order"):
        diagnose(Toy(another), loader, state=state)
    state.write_bytes(good)
    head_line, content = good.split(b"\n", 1)
    forged = torch.load(io.BytesIO(content), weights_only=True)

    def with_hash(value) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        found = buffer.getvalue()
        right = {"sha256": hashlib.sha256(found).hexdigest(), "size": len(found)}
        return json.dumps(json.loads(head_line) | right).encode() + b"\n" + found

    at = random.Random(3).randrange(len(head_line) + 1, len(good))
    sums = forged["collector"]
    for bad in (
        b"nonsense",
        b"{}\n" + content,
        good[:-1],
        good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :],
        with_hash({}) + b"more",
        with_hash([1, 2]),
        with_hash({"collector": {}}),
        with_hash(forged | {"scores": {}}),
        with_hash(forged | {"collector": sums | {"moments": []}}),
        with_hash(forged | {"collector": sums | {"reservoir": {"keys": torch.zeros(3), "columns": {}}}}),
    ):
        state.write_bytes(bad)
        with pytest.raises(InputError, match="delete it to start over") as error:
            diagnose(Toy(head, head), loader, state=state, probes=False)
        assert "\n" not in str(error.value)
        assert state.name in str(error.value)
    state.unlink()
    os.mkfifo(state)
    with pytest.raises(InputError, match="is a FIFO; a regular file is needed"):
        diagnose(Toy(head, head), loader, state=state)


def test_a_folder_that_is_removed_ends_the_diagnosis_loudly(generator: torch.Generator, tmp_path) -> None:
    head = chain(generator)
    state = tmp_path / "run" / "s.state"
    state.parent.mkdir()

    def remove(phase: str, done: int, total: int | None) -> None:
        shutil.rmtree(state.parent, ignore_errors=True)

    with pytest.raises(SaveFailed, match="was removed while a diagnosis kept its state there"):
        diagnose(Toy(head, head), batches(generator), state=state, save_every=0, progress=remove)
    assert not state.parent.exists()
