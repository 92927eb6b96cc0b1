"""How often each token follows each other in a corpus, and the distribution that this makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.store.fitted import Fitted

WEIGHT = 0.9  # of pairs, in the mean with single tokens


@dataclass(frozen=True, eq=False, kw_only=True)
class Bigrams(Fitted):
    """Counts of pairs, kept for those that occur.

    start (vocab + 1): the pairs of token t are those from start[t] to start[t + 1]. following,
    count (pair): which token follows, how often. single (vocab): how often each token occurs alone,
    one more for each, as shares.
    """

    start: Int[Tensor, " edge"]
    following: Int[Tensor, " pair"]
    count: Float[Tensor, " pair"]
    single: Float[Tensor, " vocab"]

    def __call__(self, ids: Int[Tensor, "*axes"]) -> Float[Tensor, "*axes vocab"]:
        """What comes next after each token: 0.9 of the pairs' shares and 0.1 of the single tokens';
        after a token that nothing followed, the single tokens' alone."""
        tokens, place = ids.unique(return_inverse=True)
        return self.rows(tokens.cpu()).to(ids.device)[place]

    def rows(self, tokens: Int[Tensor, " token"]) -> Float[Tensor, "token vocab"]:
        begin, often = self.start[tokens], self.start[tokens + 1] - self.start[tokens]
        row = torch.arange(len(tokens)).repeat_interleave(often)
        inside = torch.arange(len(row)) - (often.cumsum(0) - often)[row]
        pair = begin[row] + inside
        pairs = torch.zeros(len(tokens), len(self.single))
        pairs[row, self.following[pair]] = self.count[pair]
        total = pairs.sum(dim=1, keepdim=True)
        mixed = WEIGHT * pairs / total.clamp_min(1) + (1 - WEIGHT) * self.single
        return torch.where(total > 0, mixed, self.single)


def count(lm: LM, texts: Any) -> Bigrams:
    """The bigrams of texts, or of rows of token ids, as the model's tokenizer cuts them.

    Raises InputError where no token follows another.
    """
    return counted(lm, rows_of(lm, texts))


def counted(lm: LM, rows: Sequence[Sequence[int]]) -> Bigrams:
    """`count` of rows of ids that are read already."""
    vocab = lm.dims.vocab
    kept = [torch.tensor(row) for row in rows]
    pairs = torch.cat([row[:-1] * vocab + row[1:] for row in kept])
    if not len(pairs):
        raise InputError(
            f"{len(rows)} texts of one token each: no token follows another. Give longer ones."
        )
    found, often = pairs.unique(return_counts=True)
    single = torch.bincount(torch.cat(kept), minlength=vocab).double() + 1
    start = torch.bincount(found // vocab, minlength=vocab).cumsum(0)
    return Bigrams(
        start=torch.cat([start.new_zeros(1), start]),
        following=found % vocab,
        count=often.float(),
        single=(single / single.sum()).float(),
        settings={"tokens": sum(map(len, kept))},
        seed=None,
        provenance=lm.provenance,
    )


def rows_of(lm: LM, texts: Any) -> list[list[int]]:
    """Each text's token ids, without padding."""
    ids, real = lm.batch(texts).text
    return [row[here].tolist() for row, here in zip(ids, real)]
