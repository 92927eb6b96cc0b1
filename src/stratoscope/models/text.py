"""Tokens as a person reads them: spaces kept, bytes joined over neighbouring tokens into the signs
they spell.

Byte-level tokenizers cut Chinese, Hindi or an emoji in the middle of a sign. Alone, such a token is
shown as its bytes (`<E4 BD>`); in a row of tokens the first of those that spell a sign together
shows all of it, the others `JOINED`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

JOINED = "←"  # what this token holds is shown with the token to its left
_LONGEST = (
    16  # tokens that may spell one group of signs together; after that, bytes are shown as bytes
)
_BROKEN = "\ufffd"  # what decoders write for bytes that are no sign


def token_text(tokenizer: PreTrainedTokenizerBase | None, token: int) -> str:
    """One token alone: leading space kept, part of a sign as its bytes; the id itself without a
    tokenizer."""
    if tokenizer is None:
        return str(token)
    piece: Any = tokenizer.convert_ids_to_tokens(int(token))
    if piece is None:
        return f"<{token}>"
    if piece.startswith("▁"):
        return piece.replace("▁", " ")
    text = str(tokenizer.decode([int(token)]))
    if _BROKEN in text:
        return _bytes(piece)
    return piece if not text or piece.startswith("##") else text


def token_texts(
    tokenizer: PreTrainedTokenizerBase | None, tokens: Sequence[int]
) -> tuple[str, ...]:
    """The tokens of one text, in order. Joined, they are the text, but for `JOINED` (see
    `joined`)."""
    alone = [token_text(tokenizer, token) for token in tokens]
    if tokenizer is None:
        return tuple(alone)
    texts: list[str] = []
    while len(texts) < len(tokens):
        begin = len(texts)
        end = _end_of_sign(tokenizer, tokens, begin)
        whole = alone[begin] if end == begin + 1 else str(tokenizer.decode(tokens[begin:end]))
        texts += [whole, *[JOINED] * (end - begin - 1)]
    return tuple(texts)


def joined(tokens: Sequence[str], *, words: bool = False) -> str:
    """The text that `token_texts` took apart; words: tokens are words or word pieces (see
    `apart`)."""
    shown = [token for token in tokens if token != JOINED]
    return " ".join(shown).replace(" ##", "") if words else "".join(shown)


def apart(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether a space stands between two tokens, as in BERT's word pieces: the tokens hold none."""
    return tokenizer is not None and tokenizer.convert_tokens_to_string(["a", "b"]) == "a b"


def _end_of_sign(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], begin: int) -> int:
    """Where the signs that begin with this token are whole; the next token where they never are."""
    for end in range(begin + 1, min(begin + _LONGEST, len(tokens)) + 1):
        if _BROKEN not in str(tokenizer.decode(tokens[begin:end])):
            return end
    return begin + 1


def _bytes(piece: str) -> str:
    """A byte-level piece as its bytes in hexadecimal; any other piece as it is."""
    if any(sign not in _BYTES for sign in piece):
        return piece
    return f"<{' '.join(f'{_BYTES[sign]:02X}' for sign in piece)}>"


def _byte_signs() -> dict[str, int]:
    """The sign that byte-level tokenizers (GPT-2's and all after it) write for each byte.

    Printable Latin-1 bytes stand for themselves, the others for the signs from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    signs = {chr(byte): byte for byte in printable}
    return signs | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_signs()
