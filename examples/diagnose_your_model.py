"""Diagnose a model that is not ours, wired by the names of its modules: LXMERT of Hugging Face transformers.

Run: ``python examples/diagnose_your_model.py [--steps 60] [--html page.html]``; needs ``pip install 'mmc-fast[diagnose]' transformers``. A small
configuration with random weights, trained for some steps on drawn regions and questions: nothing is downloaded.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LxmertConfig, LxmertForQuestionAnswering

import mmc_fast

REGIONS, WORDS, VISUAL, WIDTH, ANSWERS, VOCABULARY = 3, 5, 8, 16, 3, 30


def build(seed: int) -> LxmertForQuestionAnswering:
    """Language and vision towers, cross-attention between them, an answer head."""
    torch.manual_seed(seed)
    config = LxmertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_attention_heads=2, intermediate_size=32, max_position_embeddings=WORDS,
        l_layers=1, r_layers=1, x_layers=1, visual_feat_dim=VISUAL, visual_pos_dim=4, num_qa_labels=ANSWERS,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return LxmertForQuestionAnswering(config)


def draw(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The second word gives the answer away; the regions show it too, less clearly."""
    answer = torch.randint(ANSWERS, (rows,), generator=generator)
    words = torch.randint(ANSWERS, VOCABULARY, (rows, WORDS), generator=generator)
    words[:, 1] = answer
    regions = torch.randn(rows, REGIONS, VISUAL, generator=generator)
    regions[:, :, :ANSWERS] += 1.5 * F.one_hot(answer, ANSWERS)[:, None]
    boxes = torch.rand(rows, REGIONS, 4, generator=generator)
    return {"input_ids": words, "visual_feats": regions, "visual_pos": boxes, "labels": answer}


def diagnose(steps: int = 60, seed: int = 0) -> mmc_fast.Diagnosis:
    """Train a little, then ask what the fusion uses."""
    model = build(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = draw(32, generator)
        labels = batch.pop("labels")
        loss = F.cross_entropy(model(**batch).question_answering_score, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    # The names come from `[name for name, _ in model.named_modules()]`.
    adapter = mmc_fast.ModelAdapter(
        model, features={"language": "lxmert.embeddings", "vision": "lxmert.encoder.visn_fc"}, head="answer_head"
    )
    return mmc_fast.diagnose(adapter, [draw(64, generator) for _ in range(8)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--html", help="write the page to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = diagnose(arguments.steps)
    print(found.summary())
    if arguments.html:
        print(f"Page: {found.save_html(arguments.html)}")
