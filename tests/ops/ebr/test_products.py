"""How the EBR step multiplies: the rule on a table without a clock, the cache of measured rates, what explain says."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from ebr_oracle import NO_NATIVE, actual, draw_case

import mmc_fast
from mmc_fast.experiments.tasks import Classification
from mmc_fast.experiments.training.runfolder import RunFolder
from mmc_fast.ops import native as library
from mmc_fast.ops.ebr import products

pytestmark = pytest.mark.skipif(bool(NO_NATIVE), reason=f"no native EBR step: {NO_NATIVE}")


class Table:
    """A timer without a clock: 100 Gflop/s by tiles; the BLAS ``factor`` times as fast where ``favours(order, m, n, k)``."""

    def __init__(self, favours, factor: float = 2.0) -> None:
        self.favours, self.factor, self.calls = favours, factor, 0

    def __call__(self, number: int, order: int, m: int, n: int, k: int, blas: bool) -> float:
        self.calls += 1
        speed = self.factor if blas and self.favours(order, m, n, k) else 0.5 if blas else 1.0
        return 2e-11 * m * n * k / speed


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Nothing known, an empty cache folder, the choice left to the rates, and a table in the place of the clock."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(products, "_known", {})
    table = Table(lambda order, m, n, k: False)
    monkeypatch.setattr(library.native(), "time_product", lambda *a: table(*a))
    library.native().forget_ways()
    with library.forced_ways("auto"):
        yield table
    library.native().forget_ways()


def chosen(bits: int, order: int, m: int, n: int, k: int) -> bool:
    return bool(bits >> library.native().product_class(order, m, n, k) & 1)


RULES = {
    "long ones": lambda order, m, n, k: 2 * m * n * k >= 2**22,
    "weight gradients": lambda order, m, n, k: order == 2,
    "few rows": lambda order, m, n, k: m < 16 and m <= min(n, k),
    "forward, no short side, very long": lambda order, m, n, k: (
        order == 0 and min(m, n, k) >= 16 and m * n * k >= 2**25
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_shape_goes_the_way_that_is_faster_for_its_class(rule, seed):
    rng, favours = random.Random(seed), RULES[rule]
    bits = products.classes_by_blas(products.measure("float32", Table(favours)))
    for _ in range(400):
        order, m, n, k = rng.randrange(3), *(max(1, round(2 ** rng.uniform(0, 11))) for _ in range(3))
        short = min(m, n, k)
        if short < 16 and (2 * m * n * k >= 2**26 or [m, n, k].count(short) > 1):
            continue  # no rate of its own; two short sides
        assert chosen(bits, order, m, n, k) == favours(order, m, n, k), (order, m, n, k)


def test_a_little_faster_is_not_enough():
    everywhere = lambda order, m, n, k: True  # noqa: E731
    assert products.classes_by_blas(products.measure("float32", Table(everywhere, 1.02))) == 0
    assert products.classes_by_blas(products.measure("float32", Table(everywhere, 1.04))) == 2**48 - 1


def test_a_way_without_a_rate_is_the_slower_one():
    for rate in (0.01, 1.5, 300.0):
        assert products.Rate(0, 1, 1, 1, None, rate).by_blas
        assert not products.Rate(0, 1, 1, 1, rate, None).by_blas


def test_a_way_that_is_far_too_slow_is_not_timed_at_length():
    def slow(number, order, m, n, k, blas):  # as bfloat16 without instructions for it
        return 2.0 * m * n * k / (1e9 if blas else 1e11)

    rates = products.measure("bfloat16", slow)
    assert {r.blas is None for r in rates if r.m * r.n * r.k == 256 * 1024 * 512} == {True}
    assert products.classes_by_blas(rates) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_choice_reaches_the_products(measured, dtype, seed):
    """Long sums round differently by each way; a class that goes by the BLAS changes the bits of its products alone."""
    case = draw_case(seed, dtype, m=2, widths=[1500], hidden_dim=64, latent_dim=32, psi_dims=(32,), batch=40,
                     mask="all", source="own")  # fmt: skip
    number, forward = str(dtype).removeprefix("torch."), library.native().product_class(0, 40, 64, 1500)
    found = []
    for bits in (0, 1 << forward):
        library.native().set_ways(0, 1, 0)
        library.native().set_ways(products.NUMBERS.index(number), 1, bits)
        found.append(actual(case, "cpp")[0]["latents"])
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=0.1 if dtype == torch.bfloat16 else 1e-3, atol=0.05)


def first_step() -> None:
    draw = draw_case(1, torch.float32, m=2, widths=[5], hidden_dim=6, latent_dim=4, psi_dims=(3,), batch=7)
    actual(draw, "cpp")


def test_measured_once_and_read_afterwards(measured, tmp_path):
    first_step()
    assert measured.calls == 2 * 39
    (file,) = tmp_path.rglob("products-*.json")
    products._known.clear()
    library.native().forget_ways()
    first_step()
    assert measured.calls == 2 * 39
    kept = json.loads(file.read_text())
    foreign = json.dumps(kept | {"key": kept["key"] | {"threads": 99}})
    for damage in (foreign, "", "{}", json.dumps({"key": {}, "rates": [[0, 1, 1, 1, 2.0, "x"]]}), '{"rates": NaN}'):
        file.write_text(damage)
        products._known.clear()
        library.native().forget_ways()
        before = measured.calls
        first_step()
        assert measured.calls == before + 2 * 39, damage
        assert len(json.loads(file.read_text())["rates"]) == 39


def test_rates_of_another_number_thread_count_processor_or_limit_have_files_of_their_own(monkeypatch):
    def file(number="float32", threads=1):
        return products._file(products._key(number, threads))

    files = [file(number, threads) for number in products.NUMBERS for threads in (1, 2)]
    with library.forced_isa("base"):
        files += [file()] * (library.supported_isas() != ["base"])
    for place, value in ((products._LIMITS[0], "AVX2"), ("XDG_CACHE_HOME", "/elsewhere")):
        with monkeypatch.context() as patch:
            patch.setenv(place, value)
            files.append(file())
    assert len(set(files)) == len(files)
    assert file() == files[0]


@pytest.mark.parametrize("slowed", ["short products", "both ways", "the BLAS"])
def test_what_a_busy_machine_shows_decides_nothing_and_is_not_kept(measured, tmp_path, monkeypatch, slowed):
    """On one thread the BLAS is faster everywhere. Two threads on a busy machine show products of milliseconds; that two
    are slower over short products is no sign of it."""

    def table(number, order, m, n, k, blas):
        alone, several = 2.0 * m * n * k / (200e9 if blas else 100e9), torch.get_num_threads() > 1
        if slowed == "short products":
            return alone * (2 if several and m * n * k < 2**22 else 1)
        return alone + 5e-3 * (several and (slowed == "both ways" or blas))

    monkeypatch.setattr(library.native(), "time_product", table)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first_step()
        said = mmc_fast.explain("ebr_step", torch.zeros(1, 1))[0].reason
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert library.native().ways(0, 2, False) == 2**48 - 1
    assert bool(list(tmp_path.rglob("products-*.json"))) == (slowed == "short products")
    assert ("this machine is busy" in said) == (slowed != "short products")


@pytest.mark.parametrize("place", ["missing/deep", "a file"])
def test_a_cache_folder_that_cannot_be_written_changes_nothing(measured, tmp_path, monkeypatch, place):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first_step()
        said = mmc_fast.explain("ebr_step", torch.zeros(1, 1))[0].reason
    assert ("in memory only" in said) == (place == "a file")


def test_processes_that_measure_at_once_on_one_core(tmp_path):
    program = (
        "import os, torch; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); torch.set_num_threads(1)\n"
        "from mmc_fast.nn import EBRHead; EBRHead([8, 8], 4, 8, (4,), backend='cpp')([torch.ones(3, 8)] * 2)\n"
        "from mmc_fast.ops.ebr import products; print(products.stored()['by_blas'])"
    )
    environ = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "MMC_GEMM": "auto"}
    root = Path(__file__).resolve().parents[3]
    begun = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", program], cwd=root, env=environ, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0].decode().strip() for process in begun]
    assert [process.returncode for process in begun] == [0, 0]
    (file,) = tmp_path.rglob("*products-*")
    rates = [products.Rate(*row) for row in json.loads(file.read_text())["rates"]]
    assert f"{products.classes_by_blas(rates):#x}" in said


def test_a_choice_forced_against_the_rates_shows_in_explain(measured):
    x = torch.zeros(1, 1)
    free = mmc_fast.explain("ebr_step", x)[0].reason
    assert "39 of 39 classes by tiles" in free
    assert "tiles 100, BLAS 50" in free
    assert "speak against" not in free
    with library.forced_ways("blas"):
        assert "all by BLAS (MMC_GEMM=blas); the measured rates speak against 39" in (
            mmc_fast.explain("ebr_step", x)[0].reason
        )
    with library.forced_ways("tiles"):
        assert "speak against" not in mmc_fast.explain("ebr_step", x)[0].reason


def test_deterministic_algorithms_take_fixed_ways(measured):
    measured.favours = lambda *shape: True
    assert products.stored()["by_blas"] == f"{2**48 - 1:#x}"
    torch.use_deterministic_algorithms(True)
    try:
        assert products.stored()["by_blas"] == "0x0"
        assert "fixed: deterministic algorithms" in mmc_fast.explain("ebr_step", torch.zeros(1, 1))[0].reason
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_was_stored_is_repeated(measured):
    measured.favours = RULES["weight gradients"]
    kept = products.stored()
    library.native().forget_ways()
    products._known.clear()
    measured.favours = RULES["long ones"]
    products.restore(json.loads(json.dumps(kept)))
    assert products.stored() == kept
    with library.forced_ways("tiles"):
        assert products.stored()["by_blas"] == "0x0"
    with pytest.raises(mmc_fast.errors.InputError, match="no stored choice"):
        products.restore({"number": "float32", "threads": 1, "by_blas": "all"})


def test_a_resumed_run_multiplies_as_it_began(measured, tmp_path):
    measured.favours = RULES["weight gradients"]
    data = {"name": "d", "fingerprint": "0", "dims": {"a": 1}, "metric": "accuracy"}
    data["task"] = Classification.of(2).to_dict()
    identity = {"config": {}, "seed": 1, "data": data, "evaluate_on": ["test"], "device": "cpu"}
    RunFolder.open(tmp_path / "run", identity, resume=False).close()
    began = products.stored()
    library.native().forget_ways()
    products._known.clear()
    measured.favours = RULES["long ones"]
    RunFolder.open(tmp_path / "run", identity, resume=True).close()
    assert products.stored() == began


def test_an_unknown_way_is_told(monkeypatch):
    with pytest.raises(ValueError, match="'fast'; allowed are auto, tiles and blas"), library.forced_ways("fast"):
        pass
    monkeypatch.setenv("MMC_GEMM", "fast")
    with pytest.raises(mmc_fast.errors.InputError, match="MMC_GEMM: unknown way"):
        library.load.__wrapped__()
