"""Shares of the register-only loop: what counts as one, and that no product is faster than the loop."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from mmc_fast.ops import native

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))

import bench_products


@pytest.mark.skipif(native.current_isa() not in bench_products.FLAGS, reason="no AVX2 or AVX-512, or no native library")
@pytest.mark.skipif(shutil.which("g++") is None, reason="the loop is compiled by g++")
def test_no_product_is_faster_than_the_loop():
    peak, found = bench_products.shares([(0, 192, 192, 192), (2, 64, 64, 8)], rounds=5)
    assert peak > 0
    assert all(0 < share < 1.2 for row in found for share in row), (peak, found)
    assert found[0][0] > found[1][0]  # a long sum comes nearer to the loop than one of eight


def test_a_slower_loop_makes_larger_shares(monkeypatch):
    monkeypatch.setattr(bench_products, "register_rate", lambda: lambda: 1e3)
    monkeypatch.setattr(bench_products, "mm_seconds", lambda *shape: 4.0)
    timer = type("Library", (), {"time_product": staticmethod(lambda number, order, m, n, k, blas: 1.0 + blas)})
    monkeypatch.setattr(bench_products.native, "native", lambda: timer)
    peak, found = bench_products.shares([(0, 10, 10, 10)], rounds=2)
    assert (peak, found) == (1e3, [[2.0, 1.0, 0.5]])
