"""The site and the README: code blocks run in order, examples of docstrings too, and all pages together stay short."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mmc_fast

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
APPENDICES = DOCS / "results"  # generated
Names = dict[str, Any]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


PAGES = [p for p in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))) if APPENDICES not in p.parents and blocks(p)]


# What a reader has at hand where a page begins with a model of theirs.


class TwoModalities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image_encoder, self.audio_encoder = nn.Linear(20, 64), nn.Linear(12, 48)
        self.classifier = nn.Linear(112, 10)

    def forward(self, image, audio):
        return self.classifier(torch.cat([self.image_encoder(image), self.audio_encoder(audio)], 1))


def own_model() -> Names:
    batches = [(torch.randn(256, 20), torch.randn(256, 12), torch.randint(10, (256,)))]
    names: Names = {"torch": torch, "model": TwoModalities().eval(), "batches": batches, "labels": batches[0][-1]}
    return names | {"image": torch.randn(256, 64), "audio": torch.randn(256, 48), "classifier": nn.Linear(112, 10)}


def own_fusion() -> Names:
    features = {"z_image": torch.randn(8, 256, requires_grad=True), "z_text": torch.randn(8, 768, requires_grad=True)}
    fusion = nn.Linear(1024, 3)
    return features | {"task_loss": torch.sum, "fusion": lambda r: fusion(torch.cat(list(r.values()), 1))}


GIVEN: dict[str, Callable[[], Names]] = {"README": own_model, "index": own_model, "ebr": own_fusion}


# What must have come out, beyond the absence of errors and what `print(...)  # text` promises.


def check_readme(names: Names) -> None:
    assert Path("diagnosis.html").stat().st_size > 1000
    parameters = [*names["head"].parameters(), *names["classifier"].parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
    assert names["logits"].shape == (256, 10)
    assert names["gop"].shape == (112, 112)


def check_quickstart(names: Names) -> None:
    assert names["before"] < 0.75 < 0.95 < names["after"]
    kinds = [{v.modality: v.kind for v in names[found].verdicts} for found in ("diagnosis", "again")]
    assert kinds == [{"image": "relied on", "audio": "collapsed"}, {"image": "relied on", "audio": "relied on"}]


def check_diagnose(names: Names) -> None:
    """What was planted is found, and nothing else is accused."""
    assert {name for name, kind in names["kinds"].items() if kind == "collapsed"} == {"fou"}
    assert "misleading" not in names["kinds"].values()
    assert mmc_fast.Diagnosis.from_json("digits.json") == names["diagnosis"]
    assert names["found"].settings["absence"] == "model"
    assert names["found"].value("score.all") > 0.7
    assert names["random"].settings["agop"] == "vector-Jacobian products"
    assert {v.kind for v in names["random"].verdicts} == {"undecided"}


def check_layer(names: Names) -> None:
    assert names["z_image"].grad.abs().sum() > 0


CHECKS: dict[str, Callable[[Names], None]] = {
    "README": check_readme,
    "quickstart": check_quickstart,
    "diagnose": check_diagnose,
    "ebr": check_layer,
}


@pytest.mark.parametrize("page", PAGES, ids=[p.stem for p in PAGES])
def test_code_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    text = "".join(blocks(page))
    for package in ("transformers", "lightning"):
        if f"from {package} import" in text or f"integrations.{package}" in text:
            pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: Names = {"__name__": "page", **GIVEN.get(page.stem, dict)()}
    for number, block in enumerate(blocks(page), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
        printed = capsys.readouterr().out
        for promised in re.findall(r"^ *print\(.*\)  # (.*?)(?: \.\.\.)?$", block, re.MULTILINE):
            assert promised in printed, f"{page.name}, block {number}"
    CHECKS.get(page.stem, lambda names: None)(names)


def test_python_on_a_page_is_marked_as_such():
    """Blocks without a language are commands and output; Python hidden there would never run."""
    for page in (ROOT / "README.md", *DOCS.rglob("*.md")):
        fences = re.findall(r"^```(\S*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        for language, text in fences:
            if language != "python":
                assert not re.search(r"^(import|from) \w+|^\w+ = \w+\(", text, re.MULTILINE), (page.name, text)


# The API pages

LISTED = [
    name
    for page in sorted((DOCS / "api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
]


def resolve(name: str) -> Any:
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def test_every_public_name_has_a_place_on_the_site():
    modules = ("nn", "integrations", "diagnose", "experiments.data", "experiments.training")
    public = {mmc_fast.__getattr__(name) for name in mmc_fast._LAZY if name not in ("agop", "diagnose")}
    for module in map(importlib.import_module, (f"mmc_fast.{m}" for m in modules)):
        members = [getattr(module, name) for name in module.__all__]
        public |= {m for m in members if inspect.isclass(m) or inspect.isfunction(m)}
    listed = {id(resolve(name)) for name in LISTED}
    missing = [m.__qualname__ for m in public if id(m) not in listed]
    assert set(missing) <= {"MultimodalModel"}  # what load_run gives


@pytest.mark.parametrize("name", LISTED)
def test_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each says what it is; functions say what they take, give and raise; examples run."""
    found = resolve(name)
    text = inspect.getdoc(found) or ""
    assert text, f"{name} has no docstring"
    parameters = inspect.signature(found).parameters if inspect.isfunction(found) else {}
    if len(parameters) > 2:
        assert "Args:" in text or all(f"``{p}``" in text for p in parameters), f"{name}: what are its arguments?"
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    importlib.import_module("mmc_fast.experiments.training")
    names: Names = {"mmc_fast": mmc_fast, "torch": torch, "nn": nn}
    test = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    failures: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=failures.append)
    assert not failures, "".join(failures)


@pytest.mark.parametrize("name", ["nn.EBRHead", "functional.ebr_step", "functional.grad_reverse", "agop", "diagnose",
    "AGOPAccumulator", "AGOPResult", "ModelAdapter", "Diagnosis", "apply_ebr", "explain", "load_ebr",
    "experiments.data.load", "experiments.training.train", "experiments.training.TrainConfig"])  # fmt: skip
def test_what_users_call_has_an_example(name: str):
    found = resolve(f"mmc_fast.{name}")
    if inspect.ismodule(found):
        found = getattr(found, name)
    assert ">>> " in inspect.getdoc(found)


def words(page: Path) -> int:
    """Words of a page outside of its code blocks and generated tables."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    text = re.sub(r"<!-- (\w+)(: start)? -->.*?<!-- (end of \1|\1: end) -->", "", text, flags=re.DOTALL)
    return sum(bool(re.search(r"\w", word)) for word in text.split())


def test_pages_stay_short():
    count = {str(p.relative_to(DOCS)): words(p) for p in DOCS.rglob("*.md") if APPENDICES not in p.parents}
    assert sum(count.values()) <= 25_000, sorted(count.items(), key=lambda item: -item[1])
