"""A language model of two million parameters (Llama architecture) that has read some Wikipedia and the Python manual.

Four layers of six heads, 2048 tokens, context 256. One row in four of its training is no text but a segment of random
tokens that repeats, so that it has reason to copy. `checkpoints/step-N`, spaced evenly in the logarithm, show how it
came about.

**What it does not show.** It sees about a million tokens: its English is broken and it knows no facts. That many repeated
rows were too few for induction heads in tiny-gpt-small; read `induction_accuracy` on the card before relying on them.
`lab.planted.induction` has them by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratoscope.lab.miniatures import _text
from stratoscope.lab.miniatures._train import Recipe

VERSION = 1
CHECKPOINTS = (0, 0.01, 0.03, 0.1, 0.3, 1)  # shares of all steps


def recipe(
    seed: int,
    say: Callable[[str], object],
    *,
    layers: int = 4,
    dim: int = 192,
    heads: int = 6,
    steps: int = 1200,
    batch: int = 4,
    repeats: int = 1,
    context: int = 256,
    rate: float = 3e-3,
    megabytes: float = 16.0,
) -> Recipe:
    """`repeats` of the `batch` rows of a step hold a repeated random segment; the others are text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    text = _text.corpus(say, megabytes=megabytes)
    config = LlamaConfig(
        vocab_size=len(text.tokenizer),
        hidden_size=dim,
        intermediate_size=8 * dim // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=dim**-0.5,  # the default, 0.02, is for wide models
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)

    def loss(model: Any, step: int, dice: torch.Generator) -> Tensor:
        ids, labels = _text.language_batch(text, batch, context, repeats, dice)
        return model(input_ids=ids, labels=labels, use_cache=False).loss

    def save(model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        text.tokenizer.save_pretrained(folder)

    return Recipe(
        model,
        loss,
        save,
        lambda model: _text.language_judge(text, context, lambda ids: model(ids, use_cache=False).logits),
        steps=steps,
        rate=rate,
        checkpoints=[round(share * steps) for share in CHECKPOINTS],
        data=text.data,
        notes=[
            f"Of every {batch} training rows {repeats} hold a random segment that repeats, learned from its second time on.",
            _text.seen(text, steps * (batch - repeats) * context),
        ],
    )
