"""The CUDA co-activation kernels: on the CPU through the emulation, compiled by nvcc where it is, refused without a GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mmc_fast.ops import dispatch as backends
from mmc_fast.ops.agop import cuda as _cuda
from mmc_fast.ops.agop import op as agop

ROOT = Path(__file__).resolve().parents[3]
COMPILER, NVCC = shutil.which("g++"), shutil.which("nvcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The test program of the kernels, with AddressSanitizer where the compiler has it."""
    program = tmp_path_factory.mktemp("cuda") / "test_cuda"
    source = ROOT / "csrc" / "test" / "test_cuda.cpp"
    plain = [COMPILER, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{source.parent}"]
    for extra in (SANITIZE, []):
        done = subprocess.run([*plain, *extra, source, "-o", program], capture_output=True, text=True)
        if done.returncode == 0:
            return program
        if extra and "cannot find" not in done.stderr:
            break
    raise AssertionError(done.stderr[-3000:])


@needs_compiler
def test_emulated_kernels_count_what_is_there(emulated, seed):
    done = subprocess.run([emulated, str(seed), "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.splitlines() == [f"seed {seed}", "all checks passed"]


@needs_compiler
@pytest.mark.parametrize(
    "broken", ["missing-barrier", "barrier-of-some", "barriers-in-two-places", "warp-in-two-places"]
)
def test_the_emulation_stops_broken_kernels(emulated, broken):
    done = subprocess.run([emulated, "broken", broken], capture_output=True, text=True)
    assert done.returncode == 70, done.stdout + done.stderr
    if broken != "missing-barrier":
        assert "diverge" in done.stderr


def compile_for(arch, out):
    flags = ["-std=c++17", "-O3", f"-arch=sm_{arch}", "-Xcompiler=-fPIC,-Wall,-Wextra", "-Werror", "all-warnings"]
    flags += ["-Xptxas", "-v,--warn-on-spills,--warning-as-error"]
    source = ROOT / "csrc" / "ops" / "agop" / "cuda" / "coactivation.cu"
    return subprocess.run([NVCC, *flags, "-c", source, "-o", out], capture_output=True, text=True)


@needs_nvcc
@pytest.mark.parametrize("arch", [80, *(pytest.param(a, marks=pytest.mark.slow) for a in (86, 89, 90, 100, 120))])
def test_nvcc_compiles_without_warnings_or_spills(arch, tmp_path):
    done = compile_for(arch, tmp_path / "out.o")
    assert done.returncode == 0, done.stderr[-3000:]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) == 5, "two counting and three packing kernels"
    assert set(spills) == {("0", "0")}


@needs_nvcc
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
def test_the_library_builds_and_names_what_is_missing(tmp_path, monkeypatch):
    flags = ["-DMMC_WITH_CUDA=1", "-DMMC_CUDA_ARCHITECTURES=80-real", "-DMMC_TESTS=OFF"]
    build = tmp_path / "b"
    for command in (["cmake", "-S", ROOT, "-B", build, *flags], ["cmake", "--build", build, "--target", "mmc_cuda"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (library,) = build.glob("libmmc_cuda.so")
    monkeypatch.setattr(_cuda, "_LIBRARY", library)
    _cuda._load.cache_clear()
    try:
        reason = _cuda.unusable_reason([torch.ones(2, 2)])
        assert reason is not None
        assert "GPU" in reason
        assert "not built" not in reason
    finally:
        _cuda._load.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
@pytest.mark.parametrize(("wish", "message"), [("1", "no nvcc was found"), ("yes", "allowed are auto, 0 and 1")])
def test_a_wish_that_cannot_be_met_fails_loudly(wish, message, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("g++", "c++", "cc", "gcc", "make", "cmake", "ld", "as", "ar", "ranlib", "nm"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    environment = {k: v for k, v in os.environ.items() if "CUDA" not in k} | {"PATH": str(tools)}
    command = [str(shutil.which("cmake")), "-S", str(ROOT), "-B", str(tmp_path / "b"), f"-DMMC_WITH_CUDA={wish}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert message in done.stderr


def test_without_a_gpu_the_backends_refuse_with_the_reason():
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("there is a GPU, or the interpreter is on: the backends are usable here")
    counts, flag = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    x, weight = torch.ones(3, 2), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run: .*(not built|no GPU|without CUDA)"):
        agop.relu_coactivation_update(x, weight, None, counts, flag, backend="cuda")
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run: .*(need a GPU|not installed)"):
        agop.relu_coactivation_update(x, weight, None, counts, flag, backend="triton")
    gram, total = torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"need a GPU|not installed"):
        agop.derivative_gram_update(x, weight, None, "gelu", gram, total, flag, backend="triton")
    with pytest.raises(RuntimeError, match=r"need a GPU|not installed"):
        agop.syrk_update(x, gram, backend="triton")
    with pytest.raises(RuntimeError, match=r"need a GPU|not installed"):
        agop.chain_gram_update(x, torch.ones(4, 2), weight, None, gram, backend="triton")
    with pytest.raises(RuntimeError, match="has no cuda backend"):
        agop.syrk_update(x, gram, backend="cuda")
    assert counts.sum() == 0
    assert gram.sum() == 0
    rows = backends.explain("relu_coactivation_update", x, weight)
    assert [row.backend for row in rows] == ["cpp", "triton", "cuda", "eager"]


@pytest.mark.parametrize("own", [False, True])
def test_chain_gram_update_in_eager_torch(own, generator):
    left = torch.randn(*((7,) if own else ()), 3, 5, generator=generator, dtype=torch.float64)
    inner, v = torch.randn(7, 5, generator=generator).double(), torch.randn(5, 4, generator=generator).double()
    outer = torch.randn(7, 4, generator=generator).double()
    gram = torch.zeros(4, 4, dtype=torch.float64)
    assert agop.chain_gram_update(left, inner, v, outer, gram) == "eager"
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for n in range(7):
        for r in range(3):
            row = ((left[n, r] if own else left[r]) * inner[n]) @ v * outer[n]
            expected += torch.outer(row, row)
    torch.testing.assert_close(gram, expected.triu())
    with pytest.raises(ValueError, match="do not fit"):
        agop.chain_gram_update(left, inner, v.t(), outer, gram)
    with pytest.raises(ValueError, match="outer has shape"):
        agop.chain_gram_update(left, inner, v, outer[:3], gram)
    with pytest.raises(ValueError, match="differ in dtype"):
        agop.chain_gram_update(left, inner.float(), v, outer, gram)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_counts_on_the_gpu(backend, dtype, generator):
    x = torch.randint(-3, 4, (1300, 70), generator=generator).to(dtype).cuda()
    weight = torch.randint(-3, 4, (131, 70), generator=generator).to(dtype).cuda()
    counts = torch.zeros(131, 131, dtype=torch.int64, device="cuda")
    flag = torch.zeros(1, dtype=torch.int64, device="cuda")
    assert agop.relu_coactivation_update(x, weight, None, counts, flag, backend=backend) == backend
    active = (x.double() @ weight.double().t() > 0).double()
    assert torch.equal(counts, (active.t() @ active).triu().long())
    assert flag.item() == 0
