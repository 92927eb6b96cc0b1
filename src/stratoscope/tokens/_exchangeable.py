"""What may stand in a token's place: the tokens of its kind whose embeddings are near, and where
nothing may.

Shared by the methods that exchange tokens.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stratoscope.engine.kinds import Kind
from stratoscope.engine.kinds import kind as kind_of
from stratoscope.models.lm import LM
from stratoscope.models.text import token_text


def near_ones(
    embedding: Float[Tensor, "vocab dim"], token: int, allowed: Bool[Tensor, " vocab"], size: int
) -> Int[Tensor, " near"]:
    """The `size` allowed tokens whose embeddings point most nearly where the token's does, itself
    left out."""
    others = allowed.clone()
    others[token] = False
    near = torch.cosine_similarity(embedding.float(), embedding[token][None].float(), dim=1)
    return near.masked_fill(~others, -torch.inf).topk(min(size, int(others.sum()))).indices


def pool(lm: LM, ids: Tensor, position: int, never: list[int], near: int) -> Tensor:
    """The ids that may be put at a position: of its token's kind; none where nothing may be
    exchanged."""
    kinds, word = kinds_of(lm), int(ids[position])
    none = torch.empty(0, dtype=torch.long)
    if position == len(ids) - 1 or kinds[word] is None or position in _template(lm, ids.tolist()):
        return none
    embedding = lm.weight("embed").detach()
    allowed = torch.tensor([kind == kinds[word] for kind in kinds])
    allowed[never] = False
    return near_ones(embedding, word, allowed.to(embedding.device), near).cpu()


def kinds_of(lm: LM) -> list[Kind | None]:
    """The kind of every token id; None for what is no word and no number, and for special
    tokens."""
    if lm.tokenizer is None:
        return [None] * lm.dims.vocab
    if lm.tokenizer not in _KINDS:
        special = {*lm.tokenizer.all_special_ids, *lm.tokenizer.added_tokens_decoder}
        every = [
            None if i in special else kind_of(token_text(lm.tokenizer, i))
            for i in range(lm.dims.vocab)
        ]
        _KINDS[lm.tokenizer] = [
            k if k and k.signs in ("letters", "digits") else None for k in every
        ]
    return _KINDS[lm.tokenizer]


_KINDS: WeakKeyDictionary[Any, list[Kind | None]] = WeakKeyDictionary()


def _template(lm: LM, ids: list[int]) -> set[int]:
    """The positions that a chat template wrote: what every conversation opens and ends with, and
    names of roles."""
    tokenizer = lm.tokenizer
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return set()
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    marks = [n for n, i in enumerate(ids) if i in special and i != tokenizer.bos_token_id]
    if not marks:
        return set()
    messages = [{"role": "user", "content": "x"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    usual = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = next((n for n, (a, b) in enumerate(zip(ids, usual)) if a != b), len(ids))
    end = next((n for n, (a, b) in enumerate(zip(ids[::-1], usual[::-1])) if a != b), len(ids))
    places = {*range(start), *range(len(ids) - end, len(ids))}
    for mark in marks:  # a role stands between a special token and the end of its line
        rest = range(mark + 1, len(ids))
        stop = next(
            (n for n in rest if ids[n] in special or "\n" in token_text(tokenizer, ids[n])),
            len(ids),
        )
        places |= set(range(mark, stop)) if stop - mark <= 4 else {mark}
    return places
