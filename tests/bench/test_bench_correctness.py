"""A wrong candidate is never timed, and neither eager nor a right candidate is refused for rounding or a kink."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "bench").is_dir():
    pytest.skip("the benches are part of the source tree only", allow_module_level=True)
sys.path.insert(0, str(ROOT / "bench"))

import bench_agop  # noqa: E402
import bench_ebr  # noqa: E402
import correctness  # noqa: E402
from correctness import Errors, away_from_kinks, errors, refused  # noqa: E402

EBR_ROW = bench_ebr.Row("tiny", 2, 5, 7, 4, (6, 3), 9, ("ours", "ours_half", "eager", "stacked", "floor"))
AGOP_ROW = bench_agop.Row("tiny", 300, 6, 9, 3, ("ours", "closed_form", "sum_trick", "forward"), ())


def test_samples_are_drawn_away_from_kinks(generator):
    layer = nn.Linear(3, 4)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 2), nn.ReLU()).double()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    drawn = []

    def draw(count: int) -> torch.Tensor:
        x = torch.randn(count, 3, generator=generator)
        for i in range(0, count, 2):  # every other sample: unit i mod 4 at its kink, as far as float32 goes
            unit = i % 4
            w, b = weight[unit], bias[unit]
            x[i] -= ((x[i].double() @ w + b) / (w @ w) * w).float()
        drawn.append(x)
        return x

    found = away_from_kinks(model, model, draw, 40)
    planted = torch.cat([x[::2] for x in drawn])
    assert found.shape == (40, 3)
    assert not (found[:, None] == planted[None]).all(2).any()
    hidden = found.double() @ weight.t() + bias
    for z in (hidden, model[2](hidden.relu()).detach()):
        assert float(z.abs().min()) > 0.5 * correctness.MARGIN * float(z.square().mean().sqrt())


def test_a_sample_seen_in_several_rows_is_judged_by_all_of_them():
    model = nn.ReLU()
    x = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]] + [[1.0, 1.0]] * 9)
    found = away_from_kinks(model, lambda s: model(torch.cat([s[:, :1], s[:, 1:]])), lambda n: x[:n], 4)
    assert torch.equal(found, torch.ones(4, 2))


def test_samples_that_all_lie_at_a_kink_end_the_search():
    model = nn.ReLU()
    with pytest.raises(RuntimeError, match="4 of 4 samples"):
        away_from_kinks(model, model, lambda n: torch.zeros(n, 2), 4)


def test_errors_of_the_whole_and_of_each_tensor():
    truth = [torch.tensor([3.0, 4.0]), torch.zeros(2), torch.tensor(12.0), torch.ones(3)]
    found = errors([torch.tensor([3.0, 4.5]), torch.tensor([0.3, 0.4]), torch.tensor(12.0), torch.ones(3)], truth)
    assert found.each == pytest.approx((0.1, 0.5, 0.0, 0.0))
    assert found.whole == pytest.approx((0.25 + 0.25) ** 0.5 / (25 + 144 + 3) ** 0.5)
    for wrong in (None, torch.ones(2)):
        assert errors([*truth[:3], wrong], truth).each[3] == float("inf")
    assert not errors([*truth[:3], torch.full((3,), torch.nan)], truth).whole < 1


@pytest.mark.parametrize(
    ("found", "eager", "verdict"),
    [
        ((2e-7, 3e-7), (1.5e-7, 1.5e-7), None),
        ((9e-4, 9e-4), (9e-4, 9e-4), None),  # a kink that moved eager refuses nobody
        ((1e-6, 1e-6), (0.0, 0.0), "off by 1.0e-06"),
        ((1e-3, 1e-3), (2e-7, 2e-7), "off by 1.0e-03"),
        ((2e-7, 1e-4), (2e-7, 2e-7), "in tensor 0"),
        ((float("nan"), float("nan")), (2e-7, 2e-7), "off by nan"),
        ((1e-1, 1e-1), (6e-2, 6e-2), "eager is off by 6.0e-02"),
    ],
)
def test_a_candidate_is_judged_beside_eager(found, eager, verdict):
    why = refused("ours", Errors(found[0], found[1:]), Errors(eager[0], eager[1:]), torch.float32)
    assert (why is None) if verdict is None else (verdict in str(why))


def test_right_candidates_of_the_ebr_step_pass():
    bench_ebr.check(bench_ebr.Job(EBR_ROW), EBR_ROW.candidates)


def scaled_loss(out):
    recovered, discrimination, reconstruction = out
    return recovered, discrimination * 1.0001, reconstruction


def lost_reversal(out):
    """The value of the discrimination loss with the gradient of its negative."""
    recovered, discrimination, reconstruction = out
    return recovered, 2 * discrimination.detach() - discrimination, reconstruction


def one_entry(out):
    recovered, discrimination, reconstruction = out
    first = recovered[0].clone()
    first[0, 0] += 1e-3 * first.detach().norm()
    return [first, *recovered[1:]], discrimination, reconstruction


def no_gradient(out):
    recovered, discrimination, reconstruction = out
    return recovered, discrimination, reconstruction.detach().requires_grad_()


@pytest.mark.parametrize("wrong", [scaled_loss, lost_reversal, one_entry, no_gradient])
@pytest.mark.parametrize("name", ["ours", "stacked"])
def test_a_wrong_candidate_of_the_ebr_step_is_refused(wrong, name, monkeypatch):
    right = bench_ebr.Job.step

    def step(job, candidate):
        run = right(job, candidate)
        return (lambda features: wrong(run(features))) if candidate == name else run

    monkeypatch.setattr(bench_ebr.Job, "step", step)
    with pytest.raises(SystemExit, match=f"tiny: {name} is off by .*; no speed is reported"):
        bench_ebr.check(bench_ebr.Job(EBR_ROW), EBR_ROW.candidates)


def test_right_candidates_of_the_agop_pass():
    bench_agop.check(AGOP_ROW)


@pytest.mark.parametrize("name", ["ours", "closed_form"])
def test_a_wrong_candidate_of_the_agop_is_refused(name, monkeypatch):
    right = bench_agop.candidates

    def candidates(row):
        runs = right(row)
        run = runs[name]
        return runs | {name: lambda: run() * (1 + 2e-5)}

    monkeypatch.setattr(bench_agop, "candidates", candidates)
    with pytest.raises(SystemExit, match=f"tiny: {name} is off by 2.0e-05"):
        bench_agop.check(AGOP_ROW)


def test_a_row_is_measured_from_check_to_ratios():
    row = bench_ebr.Row("tiny", 2, 5, 7, 4, (6, 3), 9, ("ours", "eager"), (("ours", "eager", 1.0),))
    result = bench_ebr.measure(row, rounds=1, seconds=0.0)
    (ratio,) = result["ratios"]
    times = result["milliseconds"]
    assert ratio["value"] == pytest.approx(times["ours"] / times["eager"])
    assert isinstance(result["load"], list)
    other = bench_agop.measure(bench_agop.Row("tiny", 64, 6, 9, 3, ("ours", "forward"), (("ours", "forward", 1.0),)), 1)
    assert other["ratios"][0]["ratio"] == "ours / forward"
