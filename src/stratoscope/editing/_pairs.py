"""Pairs of texts, and what stands at sites in each: the two sides that a steering vector lies
between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.gradients import gradients
from stratoscope.engine.metric import Words, target
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site

_TOGETHER = 1024  # tokens that run at the same time


def sides(lm: LM, inputs: Any) -> tuple[Batch, Batch]:
    """The negative texts and the positive ones, read; in each the example is the pair."""
    if isinstance(inputs, Mapping):
        given = [inputs.get("negative"), inputs.get("positive")]
    else:
        rows = [
            (row.get("positive"), row.get("negative")) if isinstance(row, Mapping) else row
            for row in inputs
        ]
        for number, row in enumerate(rows):
            if isinstance(row, str) or len(row) != 2 or any(side is None for side in row):
                raise InputError(
                    f"pair {number} is {str(row)!r:.80}: give (positive, negative), or "
                    '{"positive": ..., "negative": ...}.'
                )
        given = [[negative for _, negative in rows], [positive for positive, _ in rows]]
    if any(side is None or not len(side) for side in given):
        raise InputError("no pair of texts: give at least one positive and one negative text.")
    negative, positive = (lm.batch(side) for side in given)
    if len(negative) != len(positive):
        raise InputError(
            f"{len(positive)} positive texts and {len(negative)} negative ones: they are read in "
            "pairs, so give as many of each."
        )
    return negative, positive


@torch.no_grad()
def read(
    lm: LM, batch: Batch, sites: Sequence[Site], positions: int | Sequence[int] | None
) -> dict[Site, Tensor]:
    """What stands at each site, one vector a text: (pair, *units)."""
    held: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for (part,) in _parts(lm, batch):
        seen = capture(lm, part, *sites, positions=positions)
        for site in sites:
            x = seen[site].float()
            if positions is None:
                x = _mean(x, _lengths(part, x)[:, None] > torch.arange(x.shape[1]))
            elif not isinstance(positions, int):
                x = x.mean(dim=1)
            held[site].append(x.cpu())
    return {site: torch.cat(pieces) for site, pieces in held.items()}


def weighted(
    lm: LM, pair: tuple[Batch, Batch], sites: Sequence[Site], answer: Words, foil: Words
) -> list[dict[Site, Tensor]]:
    """As `read` of all tokens, of both sides, each token weighted by what the exchange of the one
    side's vector for the other's does to logit(answer) - logit(foil), to first order.

    Tokens are counted from the end, as many as the shorter text has.
    """
    held: list[dict[Site, list[Tensor]]] = [{site: [] for site in sites} for _ in pair]
    asked = target(lm, pair[0], answer, foil, single="steering weighs tokens by one next token")
    begin = 0
    for parts in _parts(lm, *pair):
        own = asked.of(range(begin, begin + len(parts[0])))
        begin += len(parts[0])
        runs = [gradients(lm, part, sites, own.difference)[1:] for part in parts]
        for site in sites:
            lengths = [_lengths(part, run[0][site]) for part, run in zip(parts, runs)]
            both = torch.stack(lengths).amin(dim=0)
            (one, slope), (two, other) = (
                [_from_end(x[site].float().cpu(), own, int(both.max())) for x in run]
                for run, own in zip(runs, lengths)
            )
            real = both[:, None] > torch.arange(int(both.max()))
            weight = ((two - one) * (slope + other)).flatten(2).sum(dim=2).abs() * real
            moves = weight.sum(dim=1, keepdim=True) > 0  # else all tokens alike
            weight = torch.where(moves, weight, real.float())
            for side, x in zip(held, (one, two)):
                side[site].append(_mean(x, weight))
    return [{site: torch.cat(pieces) for site, pieces in side.items()} for side in held]


def _parts(lm: LM, *sides: Batch) -> list[tuple[Batch, ...]]:
    """Some texts of each side at a time; what brings more than tokens, all together."""
    if any(side.ids is None or side.extra or side.source is not None for side in sides):
        return [sides]
    rows = [[row[real].tolist() for row, real in zip(*side.text)] for side in sides]
    size = max(1, _TOGETHER // max(side.text[0].shape[1] for side in sides))
    cuts = [slice(begin, begin + size) for begin in range(0, len(rows[0]), size)]
    return [tuple(lm.batch(side[cut]) for side in rows) for cut in cuts]


def _lengths(batch: Batch, x: Tensor) -> Tensor:
    """(example,) on the host; of pictures all positions."""
    return torch.full((len(x),), x.shape[1]) if batch.mask is None else batch.host_lengths


def _from_end(x: Tensor, lengths: Tensor, count: int) -> Tensor:
    """(example, count, *units) the last token first; beyond a text's first, that one again."""
    index = (lengths[:, None] - 1 - torch.arange(count)).clamp_min(0)
    return x[torch.arange(len(x))[:, None], index]


def _mean(x: Float[Tensor, "example position *units"], weight: Tensor) -> Tensor:
    """The weighted mean over positions, (example, *units); weight: (example, position)."""
    weight = weight.to(x)
    share = weight / weight.sum(dim=1, keepdim=True)
    return torch.einsum("ep,ep...->e...", share, x)
