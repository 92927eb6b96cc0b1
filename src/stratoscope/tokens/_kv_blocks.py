"""Past keys in blocks, a probe for them, and which of them a window of queries reads.

Positions are an example's own: 0 is its first token, whatever the padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PROBES = ("activation", "mean", "last", "max")


class Blocks(NamedTuple):
    """Keys before `edge` in blocks; a block past it has size 0. representative: the mean key, all
    heads in one row."""

    representative: Float[Tensor, "example block feature"]
    size: Int[Tensor, "example block"]
    member: Int[Tensor, "example key"]  # the block of each key, or -1


def blocks(
    k: Float[Tensor, "example key kv_head head_dim"],
    place: Int[Tensor, "example key"],
    edge: Int[Tensor, " example"],
    *,
    first: int,
    block: int,
    groups: int,
) -> Blocks:
    """Blocks of `block` keys from position `first` to the edge; a kv head's keys stand once for
    each of the `groups` query heads that read them. place: the position of each key."""
    member = torch.where(
        (place >= first) & (place < edge[:, None]),
        (place - first).div(block, rounding_mode="floor"),
        -1,
    )
    held, count = member >= 0, max(1, -(-(k.shape[1] - first) // block))
    rows = k.repeat_interleave(groups, dim=2).flatten(2).float() * held[..., None]
    index = member.clamp_min(0)
    sums = rows.new_zeros(len(k), count, rows.shape[2])
    sums.scatter_add_(1, index[..., None].expand_as(rows), rows)
    size = torch.zeros(len(k), count, dtype=torch.long, device=k.device)
    size.scatter_add_(1, index, held.long())
    return Blocks(sums / size.clamp_min(1)[..., None], size, member)


def activation_bias(
    q: Float[Tensor, "example query feature"], inside: Bool[Tensor, "example query"]
) -> Float[Tensor, "example query"]:
    """phi: how far each query is from the window's mean, in its variances, summed over dimensions;
    -inf outside the window. A dimension that does not vary counts for nothing."""
    share = (inside / inside.sum(dim=1, keepdim=True).clamp_min(1))[..., None]
    away = q - (q * share).sum(dim=1, keepdim=True)
    variance = (away.square() * share).sum(dim=1, keepdim=True)
    phi = torch.where(variance > 0, away.square() / variance, 0.0).sum(dim=2)
    return phi.masked_fill(~inside, -torch.inf)


def scores(
    q: Float[Tensor, "example query feature"],
    inside: Bool[Tensor, "example query"],
    held: Blocks,
    probe: str,
) -> Float[Tensor, "example block"]:
    """probe . representative, -inf where there is no key; "max" is the best of all queries."""
    known = held.representative
    if probe == "max":
        every = (q @ known.transpose(1, 2)).masked_fill(~inside[..., None], -torch.inf)
        found = every.amax(dim=1)
    else:
        weights = {
            "activation": lambda: activation_bias(q, inside).softmax(dim=1),
            "mean": lambda: inside / inside.sum(dim=1, keepdim=True),
            "last": lambda: _last(inside),
        }[probe]()
        found = torch.einsum("eq,eqf,ebf->eb", weights.to(q), q, known)
    return found.masked_fill(held.size == 0, -torch.inf)


def read(
    score: Float[Tensor, "example block"], held: Blocks, room: Int[Tensor, " example"]
) -> Bool[Tensor, "example key"]:
    """The keys of the best blocks, as many whole ones as there is room for, best first."""
    order = score.argsort(dim=1, descending=True, stable=True)
    sizes = held.size.gather(1, order)
    fits = (sizes.cumsum(dim=1) <= room[:, None]) & (sizes > 0)
    best = torch.zeros_like(fits).scatter(1, order, fits)
    return best.gather(1, held.member.clamp_min(0)) & (held.member >= 0)


def entropy(score: Float[Tensor, "example block"]) -> Float[Tensor, " example"]:
    """Of the softmax of the scores over the blocks there are, in nats; 0 without a block."""
    none = (score == -torch.inf).all(dim=1, keepdim=True)
    p = torch.where(none, 0.0, score.masked_fill(none, 0.0).softmax(dim=1))
    return -torch.special.xlogy(p, p).sum(dim=1)


def by_entropy(
    entropies: Float[Tensor, "layer example"], total: int
) -> Int[Tensor, "layer example"]:
    """`total` keys shared out among layers in proportion to their entropies, alike where all are 0;
    they sum to `total` exactly."""
    parts = entropies.double()
    parts = torch.where(parts.sum(dim=0) > 0, parts, torch.ones_like(parts))
    exact = total * parts / parts.sum(dim=0)
    down = exact.floor()
    left = total - down.sum(dim=0)
    order = (exact - down).argsort(dim=0, descending=True, stable=True).argsort(dim=0, stable=True)
    return (down + (order < left)).long()


def _last(inside: Bool[Tensor, "example query"]) -> Bool[Tensor, "example query"]:
    """The last query of each window."""
    place = torch.arange(inside.shape[1], device=inside.device)
    last = (inside * (place + 1)).argmax(dim=1, keepdim=True)
    return (place == last) & inside
