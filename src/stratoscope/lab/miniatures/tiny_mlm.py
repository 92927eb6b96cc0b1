"""A masked language model (ModernBERT architecture) with tiny-gpt's text and tokens, and about its
size.

Four layers, the first and last of them global, context 128. A third of the tokens is hidden in
training; of these 80 % are replaced by `<|mask|>`, 10 % by a random token, and 10 % are left.

**What it does not show.** It has seen about two million tokens: it knows words that go together,
and little else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from stratoscope.engine.train import Recipe
from stratoscope.lab.miniatures import _text

VERSION = 1
# to its end, seed 0, one thread: how long it took, and how well it does
TRAINED = "10 CPU minutes: 18 % of masked tokens"


def recipe(
    seed: int,
    say: Callable[[str], object],
    *,
    layers: int = 4,
    dim: int = 192,
    heads: int = 6,
    steps: int = 900,
    batch: int = 16,
    context: int = 128,
    rate: float = 3e-3,
    hidden: float = 0.3,
    megabytes: float = 16.0,
) -> Recipe:
    """hidden: the share of tokens to be found again."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    text = _text.corpus(say, megabytes=megabytes)
    config = ModernBertConfig(
        vocab_size=len(text.tokenizer),
        hidden_size=dim,
        intermediate_size=8 * dim // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        global_attn_every_n_layers=3,
        local_attention=64,
        initializer_range=dim**-0.5,
        **dict.fromkeys(
            ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0
        ),
    )

    def loss(model: Any, step: int, generator: torch.Generator) -> Tensor:
        ids = _text.windows(text.train, batch, context, generator)
        hidden_at, seen = masked(ids, text.tokenizer, hidden, generator)
        return nn.functional.cross_entropy(_logits_at(model, seen, hidden_at), ids[hidden_at])

    def save(model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        text.tokenizer.save_pretrained(folder)

    def judge(model: Any) -> dict[str, float]:
        """Every seventh token is hidden, and replaced by the mask."""
        ids = text.held[: min(32768, len(text.held)) // context * context].long().view(-1, context)
        hidden_at = (torch.arange(ids.numel()) % 7 == 3).view_as(ids)
        logits_of = [
            _logits_at(model, row.masked_fill(at, _mask(text.tokenizer)), at)
            for row, at in _parts(ids, hidden_at)
        ]
        logits, truth = torch.cat(logits_of), ids[hidden_at]
        right = (logits.argmax(-1) == truth).float().mean().item()
        return {"loss": nn.functional.cross_entropy(logits, truth).item(), "accuracy": right}

    return Recipe(
        ModernBertForMaskedLM(config),
        loss,
        save,
        judge,
        steps=steps,
        rate=rate,
        data=text.data,
        notes=[
            "Judged with every seventh token masked.",
            _text.seen(text, steps * batch * context),
        ],
    )


def masked(
    ids: Int[Tensor, "example token"], tokenizer: Any, share: float, generator: torch.Generator
) -> tuple[Bool[Tensor, "example token"], Int[Tensor, "example token"]]:
    """Which tokens are asked for, and what is shown: of those asked for 80 % masks, 10 % random
    tokens, 10 % themselves."""
    hidden_at = torch.rand(ids.shape, generator=generator) < share
    kind = torch.rand(ids.shape, generator=generator)
    other = torch.randint(2, len(tokenizer), ids.shape, generator=generator)
    shown = torch.where(
        kind < 0.8, torch.full_like(ids, _mask(tokenizer)), torch.where(kind < 0.9, other, ids)
    )
    return hidden_at, torch.where(hidden_at, shown, ids)


def _logits_at(model: Any, ids: Tensor, hidden_at: Tensor) -> Tensor:
    """(asked token, vocab) logits; the read-out runs on these tokens only."""
    return model.decoder(model.head(model.model(input_ids=ids).last_hidden_state[hidden_at]))


def _parts(*rows: Tensor) -> zip:
    return zip(*(part.split(32) for part in rows))


def _mask(tokenizer: Any) -> int:
    return tokenizer.mask_token_id
