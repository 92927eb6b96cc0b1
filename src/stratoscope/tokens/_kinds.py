"""Words of a token's kind: what could stand in its place.

A token's kind is the tokens that are written alike (`engine.kinds`) and lie nearest to it in
embedding space. Special tokens (begin of text, turn marks, [MASK]) have no kind: they are never
exchanged.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stratoscope.engine.entry import ENTRY, evidence
from stratoscope.engine.kinds import Kind, kind
from stratoscope.engine.metric import Target
from stratoscope.engine.trace import capture
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.text import token_text

NEAR = 64  # how many neighbours are a token's kind
_LOOKED_AT = 4096  # neighbours whose kind is looked at: a large vocabulary is not read out whole


def special(lm: LM) -> set[int]:
    """Ids that are marks and not words: places of pictures, and the tokenizer's own."""
    names = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
    ids = (getattr(lm.model.config, name, None) for name in names)
    places = {token for token in ids if token is not None}
    if lm.tokenizer is None:
        return places
    return places | {*lm.tokenizer.all_special_ids, *lm.tokenizer.added_tokens_decoder}


def players(lm: LM, batch: Batch) -> Bool[Tensor, "example position"]:
    """Where a word stands that could be absent: what the model reads as a token's embedding, less
    special tokens."""
    marks = torch.tensor(sorted(special(lm)), dtype=torch.long, device=batch.ids.device)
    return evidence(batch) & ~torch.isin(batch.ids, marks)


@torch.no_grad()
def pools(lm: LM, ids: Iterable[int], near: int = NEAR) -> dict[int, Int[Tensor, " word"]]:
    """For each id, up to `near` tokens of its kind, nearest first; itself and special tokens left
    out."""
    table = lm.weight("embed").detach()
    length = table.float().norm(dim=1).clamp_min(1e-12)
    never = special(lm)
    by_token: dict[int, Int[Tensor, " word"]] = {}
    for token in dict.fromkeys(ids):
        close = (table @ table[token]).float() / length
        own = _kind(lm, token)
        near_words = []
        for other in close.topk(min(_LOOKED_AT, len(close))).indices.tolist():
            if (
                other == token
                or other >= lm.dims.vocab
                or other in never
                or _kind(lm, other) != own
            ):
                continue
            near_words.append(other)
            if len(near_words) == near:
                break
        by_token[token] = torch.tensor(near_words, dtype=torch.long)
    return by_token


@torch.no_grad()
def words(
    lm: LM, batch: Batch, count: int, seed: int, target: Target
) -> Int[Tensor, "draw example position"]:
    """The prompt's ids, each word exchanged for one of its kind, `count` times.

    At a position no word comes twice while its kind lasts. What is asked for is never put into its
    own prompt. The draws of an example do not depend on its batch. A word without a kind stays.
    """
    who, ids = players(lm, batch).cpu(), batch.ids.cpu()
    most = max([sum(map(len, pair)) for pair in target.tokens], default=2)
    kinds = pools(lm, ids[who].tolist(), NEAR + most)  # so many may be taken out
    rows = ids.repeat(count, 1, 1)
    for example in range(len(batch)):
        never = torch.tensor(
            [token for text in target.tokens[example] for token in text]
            if target.tokens
            else [int(target.answer[example]), int(target.foil[example])]
        )
        generator = torch.Generator().manual_seed(seed)
        for position in who[example].nonzero()[:, 0].tolist():
            pool = kinds[int(ids[example, position])]
            pool = pool[~torch.isin(pool, never)][:NEAR]
            if len(pool):
                shuffles = [
                    torch.randperm(len(pool), generator=generator)
                    for _ in range(-(-count // len(pool)))
                ]
                rows[:, example, position] = pool[torch.cat(shuffles)[:count]]
    return rows.to(batch.ids.device)


@torch.no_grad()
def entries(
    lm: LM, batch: Batch, rows: Int[Tensor, "draw example position"]
) -> Float[Tensor, "draw example position dim"]:
    """What enters layer 0 for each draw of `words`."""
    made = [
        capture(lm, Batch(row, batch.mask, batch.extra, batch.tokens, batch.image), ENTRY)[ENTRY]
        for row in rows
    ]
    return torch.stack(made)


def _kind(lm: LM, token: int) -> Kind | None:
    return None if lm.tokenizer is None else kind(token_text(lm.tokenizer, token))
