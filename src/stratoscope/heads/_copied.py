"""How many words a head copies: those whose own logit is among the largest that it writes."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def copied(
    out: Float[Tensor, "word head dim"],
    unembed: Float[Tensor, "vocab dim"],
    own: Int[Tensor, " word"],
    top: int,
    some: int = 2048,
) -> Float[Tensor, "kind=2 head"]:
    """Share of words whose own logit is in the top; share of the other words that are (NaN if there
    are none). A tie across the limit is a miss: a silent head copies nothing.

    out: what heads write when they read each word alone. some: of so many tokens, spread over the
    vocabulary, the limit is a lower bound of that of all. Where no word is above it nothing is
    copied, and most rows need no more than that.
    """
    words, column = own.unique(return_inverse=True)
    rows = out.flatten(0, 1)
    named = rows @ unembed[words].T
    few = unembed[:: max(1, len(unembed) // max(some, top + 1))]
    is_open = named.amax(dim=1) > _limit(rows @ few.T, top)
    hit = torch.zeros_like(named)
    for at in is_open.nonzero()[:, 0].split(1024):
        logits = rows[at] @ unembed.T
        hit[at] = (logits[:, words] > _limit(logits, top)[:, None]).to(hit)
    hit = hit.unflatten(0, out.shape[:2])
    score = hit.gather(2, column[:, None, None].expand(-1, out.shape[1], 1))[..., 0]
    others = (hit.sum(dim=2) - score) / (len(words) - 1 if len(words) > 1 else torch.nan)
    return torch.stack([score.mean(dim=0), others.mean(dim=0)])


def _limit(logits: Float[Tensor, "row vocab"], top: int) -> Float[Tensor, " row"]:
    """What a logit must exceed to be in the top."""
    return logits.topk(min(top + 1, logits.shape[1])).values[:, -1]
