"""Verbatim recall: how much less a text surprises the model when it, or something else, was read
before.

Paper: verbatim-memory

    surprisal[token] = -log2 p(token | opening, earlier, between, the text up to it)       in bits
    first[token]     = -log2 p(token | opening, the text up to it)
    repeat           = median surprisal / median first           0 recalls all, 1 nothing

Both medians are over the same tokens, those of the text that have a `first`; with `words` only
tokens with a letter or a digit (commas are as easy the first time), and without the first `skip`
of them, at which nobody can know yet that a list is repeated (the paper leaves one out). `counted`
says which. Texts are joined
without the tokens that a tokenizer puts around each (<s>), which stand once, before everything.

The paper's text is a list of nouns that a story repeats; here any text, and any `earlier` one: the
same (default), its words in another order, other words. The paper's x2 / x1 has the first list of
the same story as x1; a causal model cannot know yet what will follow, so that is `first` here.

null: the same text after random tokens in place of `earlier`, as many.
Reads as: what the model can fetch from its context. Does not show how: a copy and a gist both lower
surprisal, so compare orders (`earlier` permuted). The first token of a text that nothing precedes
has no surprisal and is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stratoscope.engine.pieces import before, pieces
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.results import dataset
from stratoscope.tokens._surprisal import nats, surprisal

NULL = "random tokens in place of the earlier text"


def bits(
    logits: Float[Tensor, "position vocab"], ids: Int[Tensor, " position"]
) -> Float[Tensor, " position"]:
    """-log2 p of ids[1:], each given what stands before it; NaN for the first, which nothing
    precedes."""
    return nats(logits, ids) / math.log(2)


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    earlier: Any = None,
    opening: str = "",
    between: str = "",
    words: bool = False,
    skip: int = 0,
    null: bool = True,
    seed: int = 0,
) -> xr.Dataset:
    """surprisal, first and null in bits, and whether a token is counted (example, position), NaN at
    padding; repeat and repeat_null (example).

    inputs: texts to be recalled. earlier: what was read before each (default the text itself).
    opening, between: what stands before the earlier text, and between the two. words, skip: which
    tokens the medians are over. null: False leaves null and repeat_null out, and saves nearly half
    of the work. seed: of the null.
    Raises InputError when there is not one earlier text for each, or all does not fit the context;
    SiteError for a model that is no causal language model.
    """
    texts = pieces(lm, inputs)
    batch = lm.batch(texts)
    read = texts if earlier is None else pieces(lm, earlier)
    if len(read) != len(texts):
        raise InputError(
            f"there are {len(texts)} texts and {len(read)} earlier ones: give one for each."
        )
    opened, pause = (pieces(lm, text)[0] if text else [] for text in (opening, between))
    start = [*before(lm), *opened]
    after = lambda old_texts: [  # noqa: E731
        [*start, *old, *pause, *text] for old, text in zip(old_texts, texts)
    ]
    runs = {"surprisal": after(read), "first": [[*start, *text] for text in texts]}
    if null:
        runs["null"] = after([_noise(lm, len(row), seed) for row in read])
    width = max(map(len, texts))
    values = {
        name: _ends(lm, rows, [len(text) for text in texts], width) for name, rows in runs.items()
    }
    # of all three: without an opening, the first token has no `first`
    counted_at = counted(lm.tokenizer, texts, words=words, skip=skip) & ~values["first"].isnan()
    middle = {name: _medians(x, counted_at) for name, x in values.items()}
    axes = {name: (("example", "position"), x) for name, x in values.items()}
    axes["counted"] = (("example", "position"), counted_at)
    for name, of in (("repeat", "surprisal"), ("repeat_null", "null")):
        if of in middle:
            axes[name] = (("example",), middle[of] / middle["first"])
    return dataset(
        axes,
        method="tokens.verbatim_recall",
        provenance=lm.provenance,
        settings={"opening": opening, "between": between, "words": words, "skip": skip},
        seed=seed,
        coords=batch.coords(),
        null_kind=NULL if null else None,
    )


def counted(
    tokenizer: Any, texts: Sequence[Sequence[int]], *, words: bool = False, skip: int = 0
) -> Bool[Tensor, "example position"]:
    """Which tokens count: all, or those with a letter or a digit, less the first `skip` of them."""
    counts = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.bool)
    for number, row in enumerate(texts):
        place = [
            n for n, token in enumerate(row) if not words or _spoken(tokenizer.decode([token]))
        ]
        counts[number, place[skip:]] = True
    return counts


def _spoken(token: str) -> bool:
    return any(map(str.isalnum, token))


def _medians(
    x: Float[Tensor, "example position"], counted_at: Bool[Tensor, "example position"]
) -> Float[Tensor, " example"]:
    """Each row's median: of an even number, the mean of the middle two (torch's own is the lower
    one). NaN for none."""
    return torch.stack(
        [
            row[here].quantile(0.5) if here.any() else row.new_tensor(torch.nan)
            for row, here in zip(x, counted_at)
        ]
    )


def _noise(lm: LM, count: int, seed: int) -> list[int]:
    """Random ids; the same for every text, so that a text's null does not depend on its
    neighbours."""
    return torch.randint(
        lm.dims.vocab, (count,), generator=torch.Generator().manual_seed(seed)
    ).tolist()


def _ends(
    lm: LM, rows: Sequence[Sequence[int]], lengths: Sequence[int], width: int
) -> Float[Tensor, "example position"]:
    """Bits of the last lengths[i] tokens of each row, padded with NaN."""
    bits = torch.full((len(rows), width), torch.nan)
    for number, (row, n, surprise) in enumerate(zip(rows, lengths, surprisal(lm, rows, lengths))):
        bits[number, :n] = surprise[len(row) - n : len(row)] / math.log(2)
    return bits
