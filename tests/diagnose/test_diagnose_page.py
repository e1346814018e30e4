"""The page of a diagnosis: its parts, and in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from diagnose_models import example

from mmc_fast.diagnose import Diagnosis, diagnose
from mmc_fast.errors import InputError
from mmc_fast.testing import planted_head


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    return example()


def test_page(found: Diagnosis, tmp_path) -> None:
    planted = planted_head(4, ignored=1)
    other = diagnose(planted, planted.batches(), resamples=20)
    page = found.save_html(tmp_path / "d.html", other).read_text(encoding="utf-8")
    for heading in (
        "Verdict",
        "Compared",
        "What the head responds to",
        "What the model loses",
        "Which neurons",
        "The fused",
    ):
        assert f"<h2>{heading}" in page
    assert page.count("<svg ") == 9
    assert page.count("Cannot show.") >= 5
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL).lower().split()
    bare = diagnose(planted, planted.batches(), reliance=False, resamples=0)
    assert "What the model loses" not in bare.to_html()
    with pytest.raises(InputError, match="no score"):
        bare.plot("reliance")


@pytest.mark.slow
def test_the_page_in_a_browser(found: Diagnosis, tmp_path) -> None:
    """It draws, without a message in the console and without a name to resolve."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    page, picture = found.save_html(tmp_path / "d.html"), tmp_path / "d.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1100,3000"]
    quiet = ["--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--disable-component-update"]
    done = subprocess.run(
        [browser, *options, *quiet, f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", page.as_uri()],
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert picture.stat().st_size > 20_000, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "ERR_NAME_NOT_RESOLVED" not in done.stderr, done.stderr
