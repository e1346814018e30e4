"""The page of a diagnosis: its parts, its table, and in a browser; the view in a notebook."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from diagnose_models import example

from mmc_fast.diagnose import Diagnosis, diagnose
from mmc_fast.diagnose.page import overview
from mmc_fast.diagnose.plot import PLOTS
from mmc_fast.errors import InputError
from mmc_fast.testing import planted_head


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    return example()


class Balanced(HTMLParser):
    """Fails on tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs) -> None:
        if tag not in ("meta", "br", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page(found: Diagnosis, tmp_path) -> None:
    planted = planted_head(4, ignored=1)
    other = diagnose(planted, planted.batches(), resamples=20)
    page = found.save_html(tmp_path / "d.html", other).read_text(encoding="utf-8")
    for heading in ("Modalities", "Compared with the other diagnosis", "Behind the table"):
        assert f"<h2>{heading}" in page
    for summary in ("What the model loses", "What the head responds to", "Which neurons", "The fused", "All numbers"):
        assert f"<summary>{summary}" in page
    assert page.count("<svg ") == len(PLOTS)
    assert page.count("Cannot show.") >= 5
    assert "mathdefault" not in page, "labels of an axis are plain text"
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL).lower().split()
    parser = Balanced()
    parser.feed(page)
    assert not parser.open
    bare = diagnose(planted, planted.batches(), reliance=False, resamples=0)
    assert "What the model loses" not in bare.to_html()
    with pytest.raises(InputError, match="no score"):
        bare.plot("reliance")


def test_the_first_screen_is_the_table(found: Diagnosis) -> None:
    """One row per modality; bars and percentages are the measures over what the model gains; each verdict said once."""
    table = overview(found)
    assert table.columns == ["modality", "ability", "use", "need", "robustness", "verdict"]
    span, chance = found.value("score.all") - found.value("score.chance"), found.value("score.chance")
    for row, verdict in zip(table.rows, found.verdicts, strict=True):
        name = verdict.modality
        able = max(found.value(f"alone.{name}"), found.value(f"only.{name}")) - chance
        expected = [
            able / span,
            found.value(f"resampled_shapley.{name}") / span,
            found.value(f"need.{name}") / span,
            (found.value(f"only.{name}") - chance) / able,
        ]
        assert [cell.bar for cell in row[1:5]] == pytest.approx(expected)
        assert [cell.text for cell in row[1:5]] == [f"{v:.0%}".replace("-", "−") for v in expected]
        assert row[5].text.startswith(f"**{verdict.kind}**")
    page = found.to_html()
    assert page.index('<table class="cards">') < page.index("<details>")
    unnamed = re.findall(r"([^{}]*)\{[^}]*content: none", page)
    assert all('data-label="verdict"' in rule for rule in unnamed), "on a phone every value stands beside its name"
    visible = re.sub(r"<details>.*?</details>|<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)
    sentences = [s.strip() for s in re.split(r"[.:;]\s", visible) if len(s.split()) > 5]
    assert len(sentences) == len(set(sentences)), "no sentence stands twice on the first screen"
    assert len(visible.split()) < 200


def test_numbers_as_csv(found: Diagnosis) -> None:
    link = re.search(r'<a download="measures.csv" href="data:text/plain;charset=utf-8,([^"]*)"', found.to_html())
    rows = list(csv.DictReader(io.StringIO(unquote(link[1]))))
    assert [row["measure"] for row in rows] == list(found.measures)
    for row, m in zip(rows, found.measures.values(), strict=True):
        assert [float(v) if v else None for v in list(row.values())[1:]] == [m.value, m.error, m.low, m.high]


def test_in_a_notebook(found: Diagnosis) -> None:
    html = found._repr_html_()
    for verdict in found.verdicts:
        assert f"<strong>{verdict.kind}</strong>" in html
    parser = Balanced()
    parser.feed(html)
    assert not parser.open
    style = re.search(r"<style>(.*?)</style>", html)[1]
    selectors = re.findall(r"([^{}]+)\{", style)
    assert all(part.startswith(".mmc ") for s in selectors for part in s.split(",")), "no style for the page around it"


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_in_a_browser(found: Diagnosis, tmp_path, width: int) -> None:
    """It draws without a message in the console, without a name to resolve, and is nowhere wider than the screen."""
    if BROWSER is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    page, picture = tmp_path / "d.html", tmp_path / "d.png"
    page.write_text(found.to_html(), encoding="utf-8")
    done = browse(tmp_path, f"--window-size={width},1600", f"--screenshot={picture}", page.as_uri())
    assert picture.stat().st_size > 20_000, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "ERR_NAME_NOT_RESOLVED" not in done.stderr, done.stderr
    # A headless window is never narrower than 500 pixels, so the page is measured in a frame.
    inner = found.to_html().replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    page.write_text(inner.replace("<details>", "<details open>"), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="d.html" style="width:{width}px;height:900px"></iframe><script>f.onload=()=>'
        "document.title=`${f.contentDocument.documentElement.scrollWidth} wide`</script>",
        encoding="utf-8",
    )
    options = ["--allow-file-access-from-files", "--virtual-time-budget=3000", "--dump-dom"]
    dom = browse(tmp_path, *options, frame.as_uri()).stdout
    assert int(re.search(r"<title>(\d+) wide", dom)[1]) <= width


def browse(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    quiet = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
    ]
    resolve = "--host-resolver-rules=MAP * ~NOTFOUND"
    command = [BROWSER, *quiet, resolve, f"--user-data-dir={folder / 'profile'}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)
