"""A language model of two million parameters (Llama architecture) that has read some Wikipedia and
the Python manual.

Four layers of five heads, 2048 tokens, context 256. `checkpoints/step-N`, spaced evenly in the
logarithm, show how it came about. Embeddings learn ten times as fast as the rest: at one rate for
all it stayed behind a table of bigrams, whose loss is on the card.

**What it does not show.** It sees three million tokens: its English is broken and it knows no
facts. It has no induction heads (`induction_accuracy` on the card); rows of repeated random tokens
did not give them in the time there is. `lab.planted.induction` has them by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratoscope.engine.train import Recipe
from stratoscope.lab.miniatures import _text

VERSION = 2
# to its end, seed 0, one thread: how long it took, and how well it does
TRAINED = (
    "15 CPU minutes (8 on two cores): 2.00 bits a byte, a table of bigrams 2.31; copies no random"
    " list (0.000)"
)
CHECKPOINTS = (0, 0.01, 0.03, 0.1, 0.3, 1)  # shares of all steps


def recipe(
    seed: int,
    say: Callable[[str], object],
    *,
    layers: int = 4,
    dim: int = 160,
    heads: int = 5,
    steps: int = 1500,
    batch: int = 8,
    context: int = 256,
    rate: float = 2e-3,
    megabytes: float = 16.0,
) -> Recipe:
    """Windows of text, `batch` a step, from any place."""
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
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)

    def loss(model: Any, step: int, generator: torch.Generator) -> Tensor:
        ids = _text.windows(text.train, batch, context, generator)
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def save(model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        text.tokenizer.save_pretrained(folder)

    return Recipe(
        model,
        loss,
        save,
        lambda model: _text.language_judge(
            text, context, lambda ids: model(ids, use_cache=False).logits
        ),
        steps=steps,
        rate=rate,
        embedding_rate=10 * rate,
        checkpoints=[round(share * steps) for share in CHECKPOINTS],
        data=text.data,
        notes=[_text.seen(text, steps * batch * context)],
    )
