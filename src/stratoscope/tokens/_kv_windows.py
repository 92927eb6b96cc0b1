"""Where an attention's queries and keys stand, and what the last window of a text attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stratoscope.errors import InputError, SiteError
from stratoscope.models.lm import LM
from stratoscope.models.run import Run
from stratoscope.models.sites import Site
from stratoscope.tokens import _kv_blocks as kv


def last_windows(lm: LM, batch: Any, sizes: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Of each layer: the blocks before the last window, their scores by each probe, and what the
    window's queries attend to: weight (example, key)."""
    block, local, first = sizes
    kept: dict[Site, Tensor] = {}
    seen: list[dict[str, Any]] = []

    def finish(pattern: Tensor, run: Run) -> None:
        q, k = (kept.pop(site) for site in list(kept))
        place, key, real = places(run, q, k)
        window = place.div(local, rounding_mode="floor")
        at = window.masked_fill(~real, -1).amax(dim=1)
        inside = real & (window == at[:, None])
        held = kv.blocks(k, key, (at - 1) * local, first=first, block=block, groups=groups(q, k))
        rows = q.flatten(2).float()
        weight = (pattern.float().sum(dim=1) * inside[..., None]).sum(dim=1)
        seen.append({name: kv.scores(rows, inside, held, name) for name in kv.PROBES}
                    | {"held": held, "weight": weight, "width": rows.shape[2] ** 0.5})  # fmt: skip

    reads: dict[Site, list[Any]] = {}
    for q, k, scores in sites(lm):
        for site in (q, k):
            reads[site] = [lambda x, run, site=site: kept.__setitem__(site, x)]
        reads[lm.layout.resolve_one(f"layers.{scores.layer}.attn.pattern")] = [finish]
    with lm.taps.using(reads=reads):
        lm(batch)
    return seen


def places(run: Run, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the queries and of the keys, (example, query) and (example, key), and which
    queries are tokens. Raises SiteError where the cache has let keys go."""
    past = run.past if run.step else 0
    if run.fixed or k.shape[1] != past + q.shape[1]:
        raise SiteError(
            f"the cache holds {k.shape[1]} keys of {past + q.shape[1]} tokens: where a sliding "
            "window or a cache of fixed size lets keys go, there is nothing to retrieve from."
        )
    start = torch.zeros(len(q)) if run.start is None else torch.as_tensor(run.start)
    start = start.long().to(q.device)[:, None]
    key = torch.arange(k.shape[1], device=q.device) - start
    place = key[:, past:]
    real = place >= 0
    if run.step == 0 and run.lengths is not None:
        real &= place < run.lengths.to(q.device)[:, None]
    return place, key, real


def sites(lm: LM) -> list[tuple[Site, Site, Site]]:
    """q, k and scores of every layer. Raises SiteError for a model that reads both ways."""
    if not lm.family.towers[""].causal:
        raise SiteError(
            f"{lm.family.name} does not go on from a text: its tokens see later ones, and there "
            "are no past keys to retrieve."
        )
    return [
        tuple(
            lm.layout.resolve_one(f"layers.{layer}.attn.{point}") for point in ("q", "k", "scores")
        )
        for layer in range(lm.dims.layers)
    ]  # type: ignore[return-value]


def groups(q: Tensor, k: Tensor) -> int:
    return q.shape[2] // k.shape[2]


def by_block(weight: Tensor, held: kv.Blocks) -> Tensor:
    inside = weight * (held.member >= 0)
    sums = torch.zeros(held.size.shape, device=weight.device, dtype=weight.dtype)
    return sums.scatter_add(1, held.member.clamp_min(0), inside)


def existing(score: Tensor, held: kv.Blocks) -> Tensor:
    return score.expand(held.size.shape).masked_fill(held.size == 0, -torch.inf)


def part(wanted: Tensor, keys: Tensor) -> Tensor:
    """The share of each kind of what is wanted, (kind, example, key), at these keys."""
    return (wanted * keys).sum(dim=2) / wanted.sum(dim=2)


def spans(needle: Any, lengths: Sequence[int]) -> Tensor:
    """(example, key): 1 at the needle's positions; nowhere without one."""
    spans = torch.zeros(len(lengths), max(lengths))
    if needle is None:
        return spans
    if len(needle) != len(lengths):
        raise InputError(f"{len(needle)} needles for {len(lengths)} texts: give one for each.")
    for row, (begin, end), length in zip(spans, needle, lengths):
        if not 0 <= begin < end <= length:
            raise InputError(f"needle ({begin}, {end}) in a text of {length} tokens.")
        row[begin:end] = 1
    return spans
