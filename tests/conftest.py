"""Set-up that every test shares: one thread, the folder of the benchmark data, a seed for each test."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

# The folder of the benchmark sets is hidden from every test but those that ask for a set by name (``needs_data``), so that
# all others run as they do where no data are.
# Parallel workers inherit the environment after it was hidden, so that the folder goes on under a name of the tests.
_FOLDER = Path(
    os.environ.pop("MMC_DATA", "")
    or os.environ.get("MMC_TESTS_DATA", "")
    or Path(__file__).resolve().parents[2] / "shared" / "data"
)
os.environ["MMC_TESTS_DATA"] = str(_FOLDER)

torch.set_num_threads(1)

# The bits of a test do not depend on a measurement; those of the choice (tests/ops/ebr/test_products.py) set what they need.
os.environ["MMC_GEMM"] = "tiles"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="the seed of every test that draws its inputs")


def pytest_configure(config: pytest.Config) -> None:
    """A verdict depends on the code alone: the same inputs in every run, unless a seed asks for others (`make fuzz` does)."""
    if config.getoption("--hypothesis-seed", None) is None:
        hypothesis.settings.register_profile("same", derandomize=True, database=None)
        hypothesis.settings.load_profile("same")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` run by themselves where torch sees a GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of its own for each test, the same in every run; with ``--seed N`` it is N."""
    given = request.config.getoption("--seed")
    value = zlib.crc32(request.node.nodeid.encode()) % 2**31 if given is None else given
    print(f"seed {value}: repeat with --seed {value}")
    return value


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A CPU generator at the drawn seed."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def needs_data(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``needs_data("avmnist")``: the folder of the benchmark sets, in which this one is; skips the test where it is not."""

    def folder(*names: str) -> Path:
        missing = [name for name in names if not (_FOLDER / f"{name}.npz").is_file()]
        if missing:
            pytest.skip(f"needs the data set {', '.join(missing)}: set MMC_DATA to the folder that holds it")
        monkeypatch.setenv("MMC_DATA", str(_FOLDER))
        return _FOLDER

    return folder
