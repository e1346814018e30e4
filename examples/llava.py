"""EBR in LLaVA of Hugging Face transformers: image tokens and word tokens are the rows, other in number.

Run: ``python examples/llava.py [--steps 30]``; needs ``pip install transformers``. A small configuration with random weights
and drawn pictures and captions: nothing is downloaded.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import mmc_fast

IMAGE_TOKEN, PATCHES, PIXELS, COLOURS = 31, 4, 8, 4


def build(seed: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    tower = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    vision = CLIPVisionConfig(**tower, num_hidden_layers=2, image_size=PIXELS, patch_size=4, projection_dim=32)
    text = LlamaConfig(**tower, num_hidden_layers=1, num_key_value_heads=2, vocab_size=32, max_position_embeddings=32)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=PATCHES)
    return LlavaForConditionalGeneration(config)


def draw(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A picture of one brightness, its four tokens, then two words: a filler and the name of the brightness."""
    colour = torch.randint(COLOURS, (rows,), generator=generator)
    pixels = 0.2 * torch.randn(rows, 3, PIXELS, PIXELS, generator=generator) + colour[:, None, None, None] - 1.5
    filler = torch.randint(COLOURS, 30, (rows, 1), generator=generator)
    words = torch.cat([torch.full((rows, PATCHES), IMAGE_TOKEN), filler, colour[:, None]], 1)
    labels = words.masked_fill(torch.arange(PATCHES + 2) <= PATCHES, -100)  # only the last word counts
    return {"input_ids": words, "pixel_values": pixels, "labels": labels, "attention_mask": torch.ones_like(words)}


def train(steps: int = 30, seed: int = 0) -> dict[str, float]:
    """A few steps with EBR: the first and the last loss, and the adversarial training at the end."""
    model, generator = build(seed), torch.Generator().manual_seed(seed)
    handle = mmc_fast.apply_ebr(
        model, {"image": "model.multi_modal_projector", "text": "model.language_model.embed_tokens"},
        dims={"image": 32, "text": 32}, latent_dim=16, hidden_dim=32, psi_dims=(16,), residual=True, reversal=0.1,
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history, game = [], {}
    for step in range(steps):
        batch = draw(16, generator)
        with handle.present({"text": batch["input_ids"] != IMAGE_TOKEN}):  # the places of image tokens are no words
            task = model(**batch).loss
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
    parser.add_argument("--steps", type=int, default=30)
    torch.set_num_threads(1)
    result = train(parser.parse_args().steps)
    print(", ".join(f"{name} {value:.3f}" for name, value in result.items()))
