"""Set-up that every test shares: one thread, the folder of the benchmark data, drawn seeds that can be repeated."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
if not os.environ.get("MMC_DATA") and _BESIDE.is_dir():
    os.environ["MMC_DATA"] = str(_BESIDE)

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=None, help="repeat the drawn tests with this seed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` run by themselves where torch sees a GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed drawn afresh for each test. pytest shows the printed line where the test fails."""
    given = request.config.getoption("--seed")
    value = random.SystemRandom().randrange(2**31) if given is None else given
    print(f"seed {value}: repeat with --seed {value}")
    return value


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A CPU generator at the drawn seed."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of the benchmark data sets that are not part of the package; skips where there is none."""
    folder = os.environ.get("MMC_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("the benchmark data sets are not here: set MMC_DATA to their folder")
    return Path(folder)
