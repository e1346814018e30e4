"""``EBRHead`` as a layer: names, weights of plain layers, sizes; and the published readings of ``EBRConfig``."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmc_fast.nn import EBRConfig, EBRHead


def test_mapping_in_mapping_out_and_none_for_an_absent_modality():
    head = EBRHead({"image": 3, "text": 2}, 4, 5, (6,))
    x = torch.randn(5, 3)
    source = torch.zeros(5, 2, dtype=torch.long)
    out = head({"text": None, "image": x}, source=source)
    assert list(out.recovered) == ["image", "text"]
    present = torch.tensor([[True, False]]).expand(5, 2)
    same = head([x, torch.full((5, 2), float("nan"))], present, source)
    for a, b in zip(out.recovered.values(), same.recovered, strict=True):
        assert torch.equal(a, b)
    assert out.recovered["text"].abs().sum() > 0  # decoded from the image's latent
    with pytest.raises(ValueError, match="expected \\['image', 'text'\\]"):
        head({"image": x})


def test_plain_layers_load_into_the_head_and_back(tmp_path):
    plain = nn.ModuleDict(
        {
            "encoders": nn.ModuleList(nn.Sequential(nn.Linear(d, 5), nn.ReLU(), nn.Linear(5, 4)) for d in (3, 2)),
            "decoders": nn.ModuleList(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, d)) for d in (3, 2)),
            "discriminator": nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)),
        }
    )
    head = EBRHead([3, 2], 4, 5, (6,))
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    head.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=True)
    x = [torch.randn(7, 3), torch.randn(7, 2)]
    out = head(x)
    for i in range(2):
        g = plain["encoders"][i](x[i])
        torch.testing.assert_close(out.latents[i], g)
        torch.testing.assert_close(out.recovered[i], plain["decoders"][i](g))
    plain.load_state_dict(head.state_dict(), strict=True)


def test_published_readings():
    paper, slides = EBRConfig.paper(), EBRConfig.slides()
    assert (paper.hidden_dim, paper.latent_dim, paper.psi_dims) == (1024, 512, (512, 256))
    assert (paper.schedule, paper.reconstruction, paper.reversal) == ("interleave", 0.0, 1.0)
    assert slides.reconstruction > 0
    assert EBRConfig.paper(hidden_dim=128).hidden_dim == 128
    for bad in ({"reversal": -1.0}, {"reversal": float("nan")}, {"schedule": "both"}, {"patience": 0}):
        with pytest.raises(ValueError, match="ebr"):
            EBRConfig(**bad)


def test_sizes_that_cannot_be_are_named():
    for bad in ({"dims": []}, {"dims": [3, 0]}, {"dims": [3], "latent_dim": 0}):
        with pytest.raises(ValueError, match="EBRHead: "):
            EBRHead(**bad)


def test_meta_device():
    """Sizes without values: no kernel runs, and shapes come out as anywhere else."""
    with torch.device("meta"):
        head = EBRHead({"a": 8, "b": 6}, latent_dim=5, hidden_dim=16, psi_dims=(7,))
        out = head({"a": torch.empty(4, 8), "b": torch.empty(4, 6)})
    out.discrimination_loss.backward()
    assert [tuple(r.shape) for r in out.recovered.values()] == [(4, 8), (4, 6)]
    assert out.latents.shape == (2, 4, 5)
    assert out.latents.is_meta
    assert head.encoders[0][0].weight.grad.shape == (16, 8)
