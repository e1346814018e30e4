"""The Triton EBR kernels with their shipped tiles in the guarded interpreter: values against float64, launches, bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton_guard
from ebr_oracle import actual

pytest.importorskip("triton")
from mmc_fast.kernels import common as configs
from mmc_fast.kernels.ebr import launch as ebr
from mmc_fast.kernels.ebr import narrow_launch as ebr_narrow_launch
from mmc_fast.kernels.ebr import wide_launch as ebr_wide_launch
from triton_cases import NARROW_PSI, WIDE_PSI, compare, gradients, poison, random_case, small_call

from mmc_fast import functional
from mmc_fast.nn import EBRHead
from mmc_fast.ops.ebr import triton as _ebr_triton


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    poison(monkeypatch)


@pytest.mark.parametrize("part", range(5))
def test_narrow_against_float64(seed, part):
    case = random_case(seed + part, NARROW_PSI, **({"m": 3, "batch": 129, "mask": "some"} if part == 0 else {}))
    watch = compare(case, seed, slices=1 if part == 0 else None)
    assert len(watch.launches) <= 1 + 3


@pytest.mark.parametrize("source", ["integers", "weights"])
def test_narrow_with_a_source(seed, source):
    compare(random_case(seed, NARROW_PSI, source=source, m=3, batch=33, mask="some"), seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_in_low_precision(seed, dtype):
    compare(random_case(seed, NARROW_PSI, dtype), seed)


@pytest.mark.parametrize("latent", [33, 127])
@pytest.mark.parametrize("source", ["own", "weights"])
def test_narrow_in_tf32(seed, latent, source):
    """Its tiles differ, and rows and weights of backward are two launches."""
    case = random_case(seed, NARROW_PSI, source=source, m=2, batch=33, latent_dim=latent)
    torch.set_float32_matmul_precision("high")
    try:
        watch = compare(case, seed)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert any("fp32:tf32" in launch.dot_flops for launch in watch.launches)


@pytest.mark.parametrize("part", range(5))
def test_wide_against_float64(seed, part, wide):
    compare(random_case(seed + part, WIDE_PSI, **({"m": 3, "batch": 129} if part == 0 else {})), seed)


@pytest.mark.parametrize("source", ["integers", "weights"])
def test_wide_with_a_source(seed, source, wide):
    compare(random_case(seed, WIDE_PSI, source=source, m=3, batch=33, mask="some"), seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_in_low_precision(seed, dtype, wide):
    compare(random_case(seed, WIDE_PSI, dtype), seed)


def test_sizes_that_only_the_wide_path_takes(seed):
    """Wide for what it is, not because a test said so; more modalities; several tiles in every direction."""
    case = random_case(seed, ((70, 40),), m=2, latent_dim=131, hidden_dim=66, batch=33, widths=(65,))
    watch = compare(case, seed)
    assert all(launch.name.startswith("ebr_wide") for launch in watch.launches)
    assert len(watch.launches) <= 7 + 14
    for psi, latent in (((9, 193), 17), ((), 150)):  # the end of the discriminator takes several blocks of units
        compare(random_case(seed, (psi,), m=2, batch=33, widths=(3, 17), hidden_dim=9, latent_dim=latent), seed)
    compare(random_case(seed, ((9, 8, 7),), m=5, batch=17, widths=(3, 17), hidden_dim=9, latent_dim=17), seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("latent", [63, 127])
def test_narrow_in_several_tiles_of_every_width(seed, dtype, latent):
    case = random_case(seed, ((63,),), dtype, m=2, latent_dim=latent, hidden_dim=65, batch=65, widths=(129,))
    assert all(launch.name.startswith("ebr_narrow") for launch in compare(case, seed).launches)


def test_deterministic_mode_repeats_every_bit(seed, path, monkeypatch):
    head, features = small_call(seed, batch=70)
    monkeypatch.setattr(ebr_narrow_launch, "_SLICES", 9)  # several slabs to a modality
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for order in range(2):
            with triton_guard.watch(seed=order) as watch:
                runs.append(gradients(head, features))
    finally:
        torch.use_deterministic_algorithms(False)
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)
    for launch in watch.launches:
        assert launch.atomics in (0, launch.programs + 1), f"{launch.name} adds floats atomically"
    with triton_guard.watch():
        for one, two in zip(runs[0], gradients(head, features), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_reversal_is_read_from_the_device_and_zero_cuts(seed, path):
    head, features = small_call(seed)
    strength = torch.tensor(0.0)

    def encoder_grads(value: float) -> torch.Tensor:
        strength.fill_(value)
        loss = head(features, reversal=strength).discrimination_loss
        grads = torch.autograd.grad(loss, [head.encoders[0][0].weight, head.discriminator[0].weight])
        return grads

    base, psi = encoder_grads(1.0)
    assert base.norm() > 0
    doubled, psi_doubled = encoder_grads(-2.0)
    torch.testing.assert_close(doubled, -2 * base, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(psi_doubled, psi, rtol=1e-5, atol=1e-7)
    assert torch.equal(encoder_grads(0.0)[0], torch.zeros_like(base))
    with torch.no_grad():  # an infinite weight of the discriminator must not become 0 * inf
        head.discriminator[2].weight[0, 0] = float("inf")
    assert torch.equal(encoder_grads(0.0)[0], torch.zeros_like(base))


def test_a_nan_reaches_its_row_and_no_other(seed, path):
    head, features = small_call(seed, m=3)
    with torch.no_grad():
        features[1][7, 3] = float("nan")
        out = head(features)
    bad = [torch.isnan(r).any(1) for r in out.recovered]
    assert bad[1].nonzero().flatten().tolist() == [7]
    assert not bad[0].any()
    assert not bad[2].any()
    assert torch.isnan(out.discrimination_loss)


def test_recompute_and_no_grad_and_an_empty_batch(seed, path):
    head, features = small_call(seed)
    kept = gradients(head, features)
    with torch.no_grad():
        silent = head(features)
    loud = head(features)
    assert torch.equal(silent.latents, loud.latents)
    assert torch.equal(silent.discrimination_loss, loud.discrimination_loss)
    head.recompute = True
    for one, two in zip(kept, gradients(head, features), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    none = [f.detach()[:0].requires_grad_() for f in features]
    out = head(none)
    assert out.discrimination_loss == 0
    assert out.reconstruction_loss == 0
    for p in gradients(head, none)[2:]:
        assert torch.equal(p, torch.zeros_like(p))


def test_the_operator_keeps_its_contract(seed, path):
    head, features = small_call(seed)
    params = [p.detach().requires_grad_() for p in head.parameters()]
    args = (features, None, None, torch.tensor(0.5), None, params, True, True, False, "triton")
    torch.library.opcheck(torch.ops.mmc_fast.ebr_step.default, args, test_utils=("test_schema", "test_faketensor"))


def figure_head(dims: list[int], hidden: int, latent: int, psi: tuple[int, ...], batch: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    head = EBRHead(dims, latent_dim=latent, hidden_dim=hidden, psi_dims=psi, backend="triton")
    return head, [torch.randn(batch, d, generator=generator).requires_grad_() for d in dims]


def step_under_watch(head: EBRHead, features) -> triton_guard.Watch:
    """One step with gradients of everything recovered and of both losses, as in training."""
    with triton_guard.watch() as watch:
        out = head(features)
        cotangents = [torch.ones_like(r) for r in out.recovered]
        outputs = [*out.recovered, out.discrimination_loss, out.reconstruction_loss]
        one = torch.ones(())
        torch.autograd.grad(outputs, [*features, *head.parameters()], [*cotangents, one, one])
    return watch


def bytes_at(monkeypatch, batch: int, counted: tuple[int, int], dims: list[int], *sizes) -> tuple[float, list[str]]:
    """Bytes of a step, and its launches. Every term is linear in the batch, so two small ones tell the large one.

    Tiles as large as numpy likes them: what is counted once a launch does not depend on them.
    """
    rows = min(counted)
    narrow = configs.NarrowTile(rows, 256, 128)
    monkeypatch.setattr(ebr_narrow_launch, "ebr_narrow_tile", lambda *key: narrow)
    wide_tile = configs.WideTile(rows, 512, 512, 4, 1, rows, 512, 512, 4, 255)
    monkeypatch.setattr(ebr_wide_launch, "ebr_wide_tile", lambda *key: wide_tile)
    watches = [step_under_watch(*figure_head(dims, *sizes, n, seed=0)) for n in counted]
    low, high = (watch.global_bytes for watch in watches)
    total = low + (high - low) * (batch - counted[0]) / (counted[1] - counted[0])
    print({n: launch.global_bytes / 1e6 for n, launch in enumerate(watches[1].launches)}, total / 1e6)
    return total, [launch.name for launch in watches[0].launches]


@pytest.mark.slow
def test_launches_and_bytes_of_the_narrow_case(monkeypatch):
    """m 5, d 128, h 256, k 64, psi (64), batch 4096: eager PyTorch moves 877 MB in 154 launches."""
    total, names = bytes_at(monkeypatch, 4096, (32, 64), [128] * 5, 256, 64, (64,))
    assert names == ["ebr_narrow_fwd_kernel", "ebr_narrow_bwd_kernel", "ebr_narrow_finish_kernel"]
    head, _ = figure_head([128] * 5, 256, 64, (64,), 1, seed=0)
    memset = 4 * sum(p.numel() for p in head.parameters())
    assert total + memset <= 0.12 * 877e6


@pytest.mark.slow
def test_launches_and_bytes_of_the_wide_case(monkeypatch):
    """The paper's widths, m 4, batch 512: eager PyTorch moves 424 MB in 125 launches."""
    total, names = bytes_at(monkeypatch, 512, (16, 32), [128] * 4, 1024, 512, (512, 256))
    assert len(names) == 5 + 4
    assert total <= 0.5 * 424e6


def test_functional_takes_a_modality_that_is_absent(seed):
    head, features = small_call(seed, m=3, batch=9)
    heads = [list(seq.parameters()) for seq in (*head.encoders, *head.decoders)]
    psi = list(head.discriminator.parameters())
    results = [
        functional.ebr_step([features[0], None, features[2]], heads[:3], heads[3:], psi, backend=name)
        for name in ("triton", "eager")
    ]
    torch.testing.assert_close(results[0].latents, results[1].latents, rtol=1e-4, atol=1e-5)
    assert results[0].latents[1].abs().sum() == 0
    torch.testing.assert_close(results[0].discrimination_loss, results[1].discrimination_loss)


@pytest.mark.parametrize("source", ["own", "integers", "weights"])
def test_no_number_of_a_step_is_read_by_the_host(seed, path, source, monkeypatch):
    """What a CUDA graph needs: sizes come from shapes; λ and the denominators stay tensors."""
    case = random_case(seed, NARROW_PSI, m=2, batch=17, mask="some", source=source, reversal=1.0)
    monkeypatch.setattr(_ebr_triton, "check_source_range", lambda *args: None)  # on the CPU alone

    def refuse(self, *args):
        raise AssertionError("the host reads a tensor of the step")

    originals = {name: getattr(torch.Tensor, name) for name in HOST_READS}
    launch = {name: getattr(ebr, name) for name in ("forward", "backward")}

    def watched(function):
        def call(*args, **kwargs):
            for name in HOST_READS:
                setattr(torch.Tensor, name, refuse)
            try:
                return function(*args, **kwargs)
            finally:
                for name, original in originals.items():
                    setattr(torch.Tensor, name, original)

        return call

    for module in (ebr_narrow_launch, ebr_wide_launch):
        for name in ("ebr_narrow_fwd_kernel", "ebr_narrow_bwd_kernel", "ebr_narrow_finish_kernel", *WIDE_KERNELS):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, _Nothing())
    for name, function in launch.items():
        monkeypatch.setattr(ebr, name, watched(function))
    actual(case, "triton")


HOST_READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")
WIDE_KERNELS = tuple(name for name in vars(ebr_wide_launch) if name.startswith("ebr_wide") and name.endswith("_kernel"))


class _Nothing:
    """A kernel whose launch does nothing: its interpreter would read tensors, which a GPU's launch does not."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("what", ["present", "features"])
def test_offsets_past_32_bits(seed, path, what, monkeypatch):
    """A row of the mask, or of the features, lies more than 2³¹ elements past the first. The gap is never touched."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(
        GridExecutor, "_restore_args_dev", lambda *args: None
    )  # it copies whole storages onto themselves
    head, features = small_call(seed)
    head.half()
    rows = [f.detach()[:2].half() for f in features]
    present = torch.tensor([[True, False], [True, True]])
    try:
        if what == "present":
            space = torch.from_numpy(np.zeros(2**31 + 64, np.bool_))
            far = space.as_strided((2, 2), (2**31 + 32, 1))
            present = far.copy_(present)
        else:
            space = torch.from_numpy(np.zeros(2**31 + 64, np.float16))
            rows[0] = space.as_strided(rows[0].shape, (2**31 + 16, 1)).copy_(rows[0])
    except MemoryError:
        pytest.skip("4 GiB of address space are not to be had")
    wanted = [r.contiguous().requires_grad_() for r in rows]
    given = [r.requires_grad_() for r in rows]
    truth = head(wanted, present=present.clone())
    got = head(given, present=present)
    torch.testing.assert_close(got.latents, truth.latents)
    for one, two in zip(got.recovered, truth.recovered, strict=True):
        torch.testing.assert_close(one, two)
    sums = [sum(r.float().sum() for r in out.recovered) + out.discrimination_loss for out in (truth, got)]
    for one, two in zip(torch.autograd.grad(sums[0], wanted), torch.autograd.grad(sums[1], given), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-3)
