"""The diagnosis where the packages of its extra are not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmc_fast._util.extras import MissingExtra, require

BARE = """
import sys

class Missing:
    NAMES = ("sklearn", "scipy", "matplotlib", "jinja2", "safetensors", "pandas", "typer", "rich")

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.NAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import mmc_fast
from mmc_fast.testing import planted_head

planted = planted_head(4, num_samples=300)
found = mmc_fast.diagnose(planted, planted.batches(), probes=False, resamples=0)
assert found.verdicts[0].modality == "a"
assert type(found).from_json(found.to_json()) == found
assert not any(name.startswith("mmc_fast.experiments") for name in sys.modules)
for call in (
    lambda: mmc_fast.diagnose(planted, planted.batches()),
    lambda: mmc_fast.diagnose(planted, planted.batches(), resamples=0),
    lambda: found.plot("blocks"),
    lambda: found.to_html(),
):
    try:
        call()
    except ImportError as error:
        print(error)
"""


def test_the_core_of_it_works_and_what_is_missing_is_one_line() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", BARE], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    hint = "is not installed; run: pip install 'mmc-fast[diagnose]'"
    packages = ["scipy", "sklearn", "matplotlib", "matplotlib"]
    assert done.stdout.splitlines() == [f"{package} {hint}" for package in packages]


def test_an_error_inside_of_an_installed_package_is_not_called_missing(tmp_path, monkeypatch) -> None:
    (tmp_path / "broken_package.py").write_text("import a_package_that_is_nowhere\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_nowhere") as caught:
        require("broken_package", extra="diagnose")
    assert not isinstance(caught.value, MissingExtra)
    assert require("math", extra="diagnose").pi > 3
