"""Loss by transition: which tokens are hard to predict, by what kind of token they are and what
kind stands before.

Paper: function-tokens

    function            = the most frequent tokens of a corpus, as many as cover `share` of its
                        occurrences (paper: 40 %)
    surprisal[position] = -ln p(token | the text before it)                              in nats
    loss[transition]    = mean surprisal over the predictions of that kind
    loss_share[transition], prediction_share[transition] = its part of all surprisal, and of all
        predictions

A transition is from the kind of the token before to that of the token predicted, such as
function->content. Tokens are taken as the model has them: a piece inside a word is a token like any
other, and a frequent piece is a function token.

null: the label of the token *before* dealt out anew to token types, which together occur as often;
what is predicted keeps its label. So it is not beaten by rare tokens being hard: it asks whether it
matters which token stands before.
Reads as: where the loss is, and whether that is more than the number of such predictions. Does not
show that a kind of token causes anything, or that what follows a function token is learned from it:
a word's first piece is harder than its other pieces, and follows function tokens more often.
`words=True` counts only predictions that begin a word, in the null as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stratoscope.errors import InputError
from stratoscope.models.batch import right_padded
from stratoscope.models.lm import LM
from stratoscope.results import dataset
from stratoscope.tokens._surprisal import real_rows, surprisal

AXES = {
    "transition": "from the kind of one token to the kind of the next, such as function->content"
}
TRANSITIONS = ("content->content", "content->function", "function->content", "function->function")
NULL = "the label of the token before, dealt out anew to token types that together occur as often"


def function_tokens(counts: Int[Tensor, " vocab"], share: float = 0.4) -> Int[Tensor, " function"]:
    """Ids of the most frequent tokens, most frequent first: the fewest that cover `share` of all
    occurrences.

    The token with which the share is reached is one of them. Of equally frequent ones the lower id
    comes first. Raises InputError unless 0 < share <= 1 and something was counted.
    """
    if not 0 < share <= 1 or counts.min() < 0 or counts.sum() == 0:
        raise InputError(
            f"share={share} of {int(counts.sum())} occurrences: give a share above 0, up to 1, and "
            "counts."
        )
    order = counts.argsort(descending=True, stable=True)
    wanted = math.ceil(share * int(counts.sum()) * (1 - 1e-12))  # an integer, and 0.07 of 100 is 7
    return order[: int((counts[order].cumsum(0) < wanted).sum()) + 1]


def kinds(before: Bool[Tensor, "*axes"], after: Bool[Tensor, "*axes"]) -> Int[Tensor, "*axes"]:
    """Number of the transition in TRANSITIONS, from whether the two tokens are function tokens."""
    return 2 * before.long() + after.long()


def begins_a_word(before: str, after: str) -> bool:
    """Whether a token does not go on with letters or digits after letters or digits."""
    return not (before[-1:].isalnum() and after[:1].isalnum())


def by_transition(
    loss: Float[Tensor, " prediction"], kind: Int[Tensor, " prediction"]
) -> dict[str, Float[Tensor, " transition"]]:
    """loss: the mean of each kind, NaN where there is none; count; loss_share and prediction_share,
    which sum to 1."""
    count = torch.bincount(kind, minlength=len(TRANSITIONS)).double()
    total = torch.bincount(kind, weights=loss.double(), minlength=len(TRANSITIONS))
    shares = {"loss_share": total / total.sum(), "prediction_share": count / count.sum()}
    return {"loss": total / count, "count": count, **shares}


def dealt(
    counts: Int[Tensor, " vocab"], occurrences: int, generator: torch.Generator
) -> Bool[Tensor, " vocab"]:
    """Random token types that occur `occurrences` times together, or a little less: each that still
    fits, in random order."""
    types = counts.nonzero()[:, 0]
    types = types[torch.randperm(len(types), generator=generator)]
    taken, left = [], occurrences
    for token, often in zip(types.tolist(), counts[types].tolist()):
        if often <= left:
            taken.append(token)
            left -= often
    chosen = torch.zeros(len(counts), dtype=torch.bool)
    chosen[taken] = True
    return chosen


def null(
    loss: Float[Tensor, " prediction"],
    before: Int[Tensor, " prediction"],
    after: Int[Tensor, " prediction"],
    function: Bool[Tensor, " vocab"],
    *,
    draws: int,
    seed: int,
) -> dict[str, Float[Tensor, "draw transition"]]:
    """`by_transition` of each draw, with the labels of the tokens before dealt out anew."""
    generator = torch.Generator().manual_seed(seed)
    counts, occurrences = (
        torch.bincount(before, minlength=len(function)),
        int(function[before].sum()),
    )
    labels = (dealt(counts, occurrences, generator) for _ in range(draws))
    losses = [by_transition(loss, kinds(label[before], function[after])) for label in labels]
    return {
        name: torch.stack([one[name] for one in losses])
        for name in ("loss", "loss_share", "prediction_share")
    }


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    function: Sequence[int],
    words: bool = False,
    draws: int = 100,
    seed: int = 0,
) -> xr.Dataset:
    """surprisal in nats and kind, a word of TRANSITIONS (example, position), NaN and "" for each
    text's first token.

    Over all texts, (transition): loss in nats, count, loss_share, prediction_share; and null_loss,
    null_loss_share (draw, transition). function: ids of the function tokens, such as
    `function_tokens` finds in the counts of a corpus. words: count only predictions that begin a
    word; the others have a surprisal, and the kind "". draws, seed: of the null. Raises InputError
    when `function` is empty or holds what is no id, when no text has a second token to count, or
    for words of a model without a tokenizer; SiteError for a model that is no causal language
    model.
    """
    label = _labels(function, lm.dims.vocab)
    if words and lm.tokenizer is None:
        raise InputError("words=True: without a tokenizer nobody knows where a word begins.")
    batch = lm.batch(inputs)
    rows = real_rows(batch)
    loss = surprisal(lm, rows)
    ids = right_padded(rows, 0)
    before, after, here = ids[:, :-1], ids[:, 1:], ~loss[:, 1:].isnan()
    for row, tokens in enumerate(batch.tokens if words else ()):
        first = [begins_a_word(*pair) for pair in pairwise(tokens)]
        here[row, : len(first)] &= torch.tensor(first, dtype=torch.bool, device=here.device)
    if not here.any() or draws < 1:
        raise InputError(
            "nothing to compare: give a text of two tokens or more (with words=True, one that "
            "begins a second word), and draws of 1 or more."
        )
    kind = kinds(label[before], label[after])
    losses = by_transition(loss[:, 1:][here], kind[here])
    null_of = null(loss[:, 1:][here], before[here], after[here], label, draws=draws, seed=seed)
    named = [
        ["", *(TRANSITIONS[k] if real else "" for k, real in zip(*row))]
        for row in zip(kind.tolist(), here.tolist())
    ]
    return dataset(
        {
            "surprisal": (("example", "position"), loss),
            "kind": (("example", "position"), named),
            **{name: (("transition",), values) for name, values in losses.items()},
            **{
                f"null_{name}": (("draw", "transition"), null_of[name])
                for name in ("loss", "loss_share")
            },
        },
        method="tokens.transition_loss",
        provenance=lm.provenance,
        settings={"function": label.nonzero()[:, 0].tolist(), "words": words, "draws": draws},
        seed=seed,
        coords={**batch.coords(), "transition": (("transition",), list(TRANSITIONS))},
        loss_unit="nats",
        null_kind=NULL,
    )


def _labels(function: Sequence[int], vocab: int) -> Bool[Tensor, " vocab"]:
    ids = [int(i) for i in function]
    if wrong := [i for i in ids if not 0 <= i < vocab]:
        raise InputError(
            f"function token {wrong[0]} is no token id: this model's ids run from 0 to {vocab - 1}."
        )
    if not ids:
        raise InputError(
            "function holds no token ids: give those of the function tokens (see "
            "`function_tokens`)."
        )
    label = torch.zeros(vocab, dtype=torch.bool)
    label[ids] = True
    return label
