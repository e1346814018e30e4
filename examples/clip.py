"""EBR in CLIP of Hugging Face transformers: heads on the two projections, all in one call before the similarity.

Run: ``python examples/clip.py [--steps 40]``; needs ``pip install transformers``. A small configuration with random weights
and drawn pictures and captions: nothing is downloaded.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

import mmc_fast

VOCABULARY, WORDS, PIXELS, COLOURS = 40, 6, 16, 8


def build(seed: int) -> CLIPModel:
    torch.manual_seed(seed)
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = CLIPTextConfig(
        **tower, vocab_size=VOCABULARY, max_position_embeddings=WORDS, bos_token_id=38, eos_token_id=39, pad_token_id=37
    )
    vision = CLIPVisionConfig(**tower, image_size=PIXELS, patch_size=4)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24))


def draw(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Pictures ``[rows, 3, 16, 16]`` of one of eight brightness patterns, and captions that name it."""
    pattern = torch.arange(rows) % COLOURS
    pixels = 0.3 * torch.randn(rows, 3, PIXELS, PIXELS, generator=generator)
    signs = 2.0 * (pattern[:, None] >> torch.arange(3) & 1) - 1  # [rows, 3]
    words = torch.randint(COLOURS, 37, (rows, WORDS), generator=generator)
    words[:, 1], words[:, -1] = pattern, 39
    return {"input_ids": words, "pixel_values": pixels + signs[:, :, None, None]}


def train(steps: int = 40, seed: int = 0) -> dict[str, float]:
    """Contrastive training with EBR: the first and the last loss, and the adversarial training at the end."""
    model, generator = build(seed), torch.Generator().manual_seed(seed)
    handle = mmc_fast.apply_ebr(
        model, {"image": "visual_projection", "text": "text_projection"},
        latent_dim=16, hidden_dim=32, psi_dims=(16,), residual=True, reversal=0.1,
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history, game = [], {}
    for step in range(steps):
        task = model(**draw(COLOURS, generator), return_loss=True).loss
        loss = task + handle.losses().discrimination
        if step + 1 == steps:
            game = handle.adversarial()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(task.detach()))
    print(handle.explain())
    return {"first_loss": history[0], "last_loss": history[-1], **game}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    torch.set_num_threads(1)
    result = train(parser.parse_args().steps)
    print(", ".join(f"{name} {value:.3f}" for name, value in result.items()))
