"""Tiny random encoder-decoders, and inputs for them: sources and targets of unequal length."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as hf

from stratoscope.models import wrap
from support import tiny, zoo_encoders

T5 = {
    "vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2,
    "num_decoder_layers": 3, "num_heads": 4, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16, "decoder_start_token_id": 0, "pad_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
# an encoder and a decoder that differ in everything that may differ
BART = {
    "vocab_size": 96, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 4, "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
WHISPER = {k: v for k, v in BART.items() if k != "max_position_embeddings"} | {
    "num_mel_bins": 5, "max_source_positions": 9, "max_target_positions": 24,
    "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
Maker = Callable[[], tuple[Any, Any]]
MODELS: dict[str, Maker] = {
    "t5": lambda: (hf.T5ForConditionalGeneration, hf.T5Config(**T5)),
    "t5 gated": lambda: (
        hf.T5ForConditionalGeneration,
        # Transformers' generate makes a cache of as many layers as the encoder has
        hf.T5Config(
            **T5 | {"num_decoder_layers": 2},
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
    ),
    "mt5": lambda: (hf.MT5ForConditionalGeneration, hf.MT5Config(**T5)),
    "umt5": lambda: (hf.UMT5ForConditionalGeneration, hf.UMT5Config(**T5)),
    "bart": lambda: (hf.BartForConditionalGeneration, hf.BartConfig(**BART)),
    "mbart": lambda: (hf.MBartForConditionalGeneration, hf.MBartConfig(**BART)),
    "marian": lambda: (hf.MarianMTModel, hf.MarianConfig(**BART)),
    "pegasus": lambda: (hf.PegasusForConditionalGeneration, hf.PegasusConfig(**BART)),
    "m2m_100": lambda: (hf.M2M100ForConditionalGeneration, hf.M2M100Config(**BART)),
    "whisper": lambda: (hf.WhisperForConditionalGeneration, hf.WhisperConfig(**WHISPER)),
}
SOURCES = [[3, 14, 15, 92, 65, 35, 89], [79, 32, 38, 46], [26, 43, 33, 83, 27]]
SAID = [[5, 7, 11, 13, 17], [5, 7], [23, 29, 31]]


def model(name: str) -> Any:
    made = zoo_encoders.build(MODELS[name])
    if hasattr(made, "final_logits_bias"):
        with torch.no_grad():
            made.final_logits_bias.add_(torch.linspace(-1, 1, 96))
    return made


@cache
def lm(name: str) -> Any:
    """A wrapped instance: one for all tests, which leave it as it was."""
    return wrap(model(name))


def source(name: str) -> Any:
    if name != "whisper":
        return SOURCES
    generator = torch.Generator().manual_seed(1)
    return {"input_features": torch.randn(3, 5, 18, generator=generator)}


def batch(name: str) -> Any:
    return lm(name).batch(source(name), target=SAID)


def arguments(name: str, row: int | None = None) -> dict[str, Any]:
    """What Hugging Face's forward takes: all examples, right-padded, or one alone."""
    start = model(name).config.decoder_start_token_id
    rows = slice(None) if row is None else slice(row, row + 1)
    given = source(name)
    heard = (
        {"input_features": given["input_features"][rows]}
        if name == "whisper"
        else _padded(given[rows])
    )
    said = _padded([[start, *ids] for ids in SAID[rows]])
    return heard | {f"decoder_{key}": value for key, value in said.items()}


def _padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[1] * (width - len(row))] for row in rows])
    real = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
    return {"input_ids": ids, "attention_mask": real.long()}


def mask_of(key: str) -> str:
    return key.replace("input_ids", "attention_mask")


def left(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """A right-padded table, padded on the left."""
    return torch.stack([row.roll(int((own == 0).sum())) for row, own in zip(x, mask)])


gap = tiny.gap
