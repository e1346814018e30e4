"""Independent random streams derived from one run seed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, *names: object) -> int:
    """63-bit seed of the stream called ``names``: the first bits of SHA-256 over seed and names."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator for the stream called ``names``; streams with other names are independent of it."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))


@contextmanager
def seeded_init(seed: int, *names: object) -> Iterator[None]:
    """Seed layer initialisation, which reads the global generator, and put that generator back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, *names))
        yield
