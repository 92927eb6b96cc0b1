"""Tokens as a person reads them: no sign is torn apart on its way to a page."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from stratoscope.lab import planted
from stratoscope.models import load, wrap
from stratoscope.models.text import JOINED, apart, joined, token_text, token_texts
from support.tiny import byte_level

TEXTS = [
    "你好,世界",
    "naïve café",
    "emoji 👩\u200d👩\u200d👧 ok",
    "مرحبا",
    "हिन्दी",
    "𝕳𝖊𝖑𝖑𝖔",
    "a\u200bzero",
    "\x00",
]


def test_a_token_as_a_person_reads_it() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a the€")["input_ids"]
    words = [token_text(tokenizer, i) for i in ids]
    assert words == ["a", " the", "<E2 82>", "<AC>"]  # alone, a part of a sign is its bytes
    assert token_text(None, 17) == "17"
    assert token_text(tokenizer, 10**6) == f"<{10**6}>"


def test_a_word_piece_keeps_its_sign() -> None:
    raw = Tokenizer(models.WordPiece({"[UNK]": 0, "em": 1, "##bed": 2}, unk_token="[UNK]"))
    raw.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert [token_text(tokenizer, i) for i in (1, 2)] == ["em", "##bed"]


def test_a_sentence_piece_shows_its_space() -> None:
    raw = Tokenizer(models.BPE({"▁the": 0, "re": 1, "▁": 2}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert [token_text(tokenizer, i) for i in (0, 1, 2)] == [" the", "re", " "]


@pytest.mark.parametrize("text", TEXTS)
def test_joined_tokens_are_the_text(text: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer(text)["input_ids"]
    shown = token_texts(tokenizer, ids)
    assert len(shown) == len(ids)
    assert joined(shown) == text
    assert all(sign in text for token in shown if token != JOINED for sign in token)


def test_the_first_token_of_a_sign_shows_all_of_it() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a the€.")["input_ids"]
    assert token_texts(tokenizer, ids) == ("a", " the", "€", JOINED, ".")


def test_a_sign_that_is_cut_off_is_shown_as_its_bytes() -> None:
    tokenizer = byte_level()
    ids = tokenizer("a€")["input_ids"]
    assert token_texts(tokenizer, ids[:2]) == ("a", "<E2 82>")
    assert token_texts(tokenizer, [ids[2], ids[0]]) == ("<AC>", "a")


def test_word_pieces_stand_apart_in_a_text() -> None:
    raw = Tokenizer(models.WordPiece({"[UNK]": 0, "em": 1, "##bed": 2, "it": 3}, unk_token="[UNK]"))
    raw.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert apart(tokenizer)
    assert not apart(byte_level())
    assert joined(token_texts(tokenizer, [1, 2, 3]), words=True) == "embed it"


def test_a_batch_s_text_is_the_prompt() -> None:
    p = planted.induction()
    assert wrap(p.model, p.tokenizer).batch(p.clean).coords()["example_text"][1] == [p.clean]


@pytest.mark.real
def test_real_tokenizers_show_chinese() -> None:
    batch = load("smollm2").batch("你好")
    assert batch.tokens == (("你", JOINED, "好", JOINED),)
    assert batch.coords()["example_text"][1] == ["你好"]
    assert load("minilm").batch("the emojis").texts == ("[CLS] the emojis [SEP]",)
