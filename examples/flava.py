"""EBR in FLAVA of Hugging Face transformers: heads on the token sequences of its image and text encoders.

Run: ``python examples/flava.py [--steps 40]``; needs ``pip install 'mmc-fast[examples]'``. A small configuration with
random weights and drawn pictures and captions: nothing is downloaded.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import FlavaConfig, FlavaModel

import mmc_fast
from mmc_fast.integrations import Site

VOCABULARY, WORDS, PIXELS, WIDTH = 40, 6, 16, 32


class Reader(nn.Module):
    """Which half of the picture is bright, and which colour is named? Each modality knows half of the answer."""

    def __init__(self) -> None:
        super().__init__()
        tower = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        self.flava = FlavaModel(
            FlavaConfig(
                image_config={**tower, "image_size": PIXELS, "patch_size": 4},
                text_config={**tower, "vocab_size": VOCABULARY, "max_position_embeddings": WORDS},
                multimodal_config=tower,
                hidden_size=WIDTH,
                projection_dim=16,
            )
        )
        self.answer = nn.Linear(WIDTH, 4)

    def forward(self, pixels: Tensor, words: Tensor) -> Tensor:
        out = self.flava(input_ids=words, pixel_values=pixels, attention_mask=torch.ones_like(words))
        return self.answer(out.multimodal_output.last_hidden_state[:, 0])


def draw(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy pictures ``[rows, 3, 16, 16]`` with one bright half, captions ``[rows, 6]`` with word 0 or 1, answers."""
    half = torch.randint(2, (rows,), generator=generator)
    colour = torch.randint(2, (rows,), generator=generator)
    pixels = 0.3 * torch.randn(rows, 3, PIXELS, PIXELS, generator=generator)
    bright = torch.arange(PIXELS) // (PIXELS // 2) == half[:, None]  # [rows, 16], lines of the bright half
    pixels += bright[:, None, :, None]
    words = torch.randint(2, VOCABULARY, (rows, WORDS), generator=generator)
    words[:, 1] = colour
    return pixels, words, 2 * half + colour


def train(steps: int = 40, seed: int = 0) -> dict[str, float]:
    """A few steps with EBR; the first and the last task loss and the last look at the game."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Reader()
    handle = mmc_fast.apply_ebr(
        model,
        at={
            "image": Site("flava.image_model", output="last_hidden_state"),
            "text": Site("flava.text_model", output="last_hidden_state"),
        },
        example=draw(2, generator)[:2],
        latent_dim=16,
        hidden_dim=32,
        psi_dims=(16,),
        residual=True,
        reversal=0.1,
    )
    print(handle)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    history, game = [], {}
    for step in range(steps):
        pixels, words, answer = draw(32, generator)
        task = F.cross_entropy(model(pixels, words), answer)
        loss = task + handle.losses().discrimination
        if step + 1 == steps:
            game = handle.game()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(task.detach()))
    return {"first_loss": history[0], "last_loss": history[-1], **game}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    torch.set_num_threads(1)
    result = train(parser.parse_args().steps)
    print(", ".join(f"{name} {value:.3f}" for name, value in result.items()))
