"""Trials of a family: what must happen when a run is changed, beside the sums that every run must
show (`prove`).

The last token is taken away, attention silenced, padding left out; `rewriting` is one more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stratoscope.models.attention import seam
from stratoscope.models.batch import Batch
from stratoscope.models.check import Check, Pair, fact, gap, stop
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.weights import row_independent

PADDING = "a prompt beside a longer one == the prompt alone"


def causality(lm: LM, batch: Batch, seen: dict[Site, Tensor], tolerance: float) -> list[Check]:
    """Whether earlier positions feel the last token, as the family says: `sweep` relies on it.

    Where one prompt begins another this is seen in the one run: is the longer one's beginning what
    the shorter is? Else the last position of the stream is changed. At each position the difference
    counts by the stream there: a first token that is a hundred times as large must not hide the
    others.
    """
    first, last = Site("", 0, "resid_pre"), Site("", lm.dims.layers - 1, "resid_post")
    if last not in seen or seen[last].shape[1] < 2:
        return []
    whole = torch.full((len(seen[last]),), seen[last].shape[1], device=seen[last].device)
    lengths = whole if batch.mask is None else batch.lengths
    pair = _beginning(batch)
    if pair is not None:
        short, long = pair
        n = int(lengths[short])
        one, other = seen[last][long, :n], seen[last][short, :n]
    elif int(lengths.max()) < 2:
        return []
    else:
        rows, at = torch.arange(len(seen[last]), device=lengths.device), lengths - 1
        after: list[Tensor] = []

        def change(x: Tensor, run: object) -> Tensor:
            return torch.index_put(x, (rows, at), 3 * x[rows, at].roll(1, dims=-1))

        # both by one kernel: rounding must not pass for hearing
        for edits in {}, {first: [change]}:
            with lm.taps.using(edits, {last: [lambda x, run: after.append(x.clone()), stop]}):
                lm(batch)
        steps = torch.arange(seen[last].shape[1], device=lengths.device)
        other, one = (x[steps < at[:, None]] for x in after)
    felt = (one - other).float().norm(dim=-1) / other.float().norm(dim=-1).clamp_min(1e-6)
    causal = lm.family.towers[""].causal
    return [
        fact(
            "causal" if causal else "bidirectional",
            last,
            bool(felt.max() <= tolerance / 10) == causal,
            tolerance,
        )
    ]


def _beginning(batch: Batch) -> tuple[int, int] | None:
    """Two examples (shorter, longer) of which one begins the other, and whose decoders hear the
    same, or None."""
    if batch.ids is None or len(batch) < 2:
        return None
    rows = [ids[:n].tolist() for ids, n in zip(batch.ids, batch.lengths.tolist())]
    for short, one in enumerate(rows):
        for long, other in enumerate(rows):
            if len(one) < len(other) and other[: len(one)] == one and _alike(batch, short, long):
                return short, long
    return None


def _alike(batch: Batch, one: int, other: int) -> bool:
    if batch.source is None:
        return True
    heard = batch.source.forward_arguments().values()
    return all(torch.equal(x[one], x[other]) for x in heard)


def padding(lm: LM, batch: Batch, seen: dict[Site, Tensor]) -> list[Pair]:
    """The shortest prompt of a batch, alone: padding must not reach it. Not asked of layers that
    round by all rows."""
    last = Site("", lm.dims.layers - 1, "resid_post")
    if (
        ((batch.ids is None or bool(batch.extra)) and not batch.signal)
        or not batch.padded
        or last not in seen
        or not row_independent(lm.model)
    ):
        return []
    row = int(batch.lengths.argmin())
    alone: list[Tensor] = []
    with lm.taps.using(reads={last: [lambda x, run: alone.append(x.clone()), stop]}):
        lm(batch.example(row))
    return [(PADDING, last, seen[last][row, : alone[0].shape[1]], alone[0][0])]


def mixing(lm: LM, batch: Batch, tolerance: float) -> list[Check]:
    """Whether positions hear of one another beside the attention function, as the family says:
    `sweep` packs rows if not.

    With attention silenced, another first token reaches no other position, and no mask, unless
    something else carries it.
    """
    depth = lm.dims.layers
    every = [Site("", n, "attn.q") for n in range(depth)]
    if batch.source is not None:  # cells of a decoder are not packed, whatever mixes
        return []
    if batch.mask is None or batch.mask.shape[1] < 2 or any(lm.layout.lack(site) for site in every):
        return []
    first, last = Site("", 0, "resid_pre"), Site("", depth - 1, "resid_post")
    pair = batch
    if batch.ids is not None and not batch.extra:  # alike but for the first position
        row = batch.ids[:1, : min(int(batch.lengths[0]), 4)]
        pair = lm.batch(row.expand(2, -1)) if row.shape[1] > 1 else batch
    masks: list[Tensor] = []
    ends: list[Tensor] = []

    def silent(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *how: Any) -> Tensor:
        masks.append(q.new_zeros(1) if mask is None else mask)
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])

    def change(x: Tensor, run: object) -> Tensor:
        rows = slice(None) if pair is batch else slice(1, 2)
        x = x.clone()
        x[rows, :1] = 3 * x[rows, :1].roll(1, dims=-1)
        return x

    modules = dict.fromkeys((lm.layout.attention(site) for site in every), silent)
    reads = {last: [lambda x, run: ends.append(x[:, 1:].clone()), stop]}
    for edits in ({}, {first: [change]}) if pair is batch else ({first: [change]},):
        with lm.taps.using(edits, reads), seam(lm.model, {}, modules):
            lm(pair)
    if pair is batch:
        pairs = list(zip(masks[:depth] + ends[:1], masks[depth:] + ends[1:]))
    else:
        pairs = [(x[0], x[-1]) for x in (*masks, *ends)]
    same = all(
        x.shape == y.shape and bool(torch.isclose(x, y, tolerance, tolerance).all())
        for x, y in pairs
    )
    mixes = any(lm.layout.tower(site).mixes for site in every)
    # what is called mixed without need is only swept more slowly
    return [fact("nothing but attention mixes positions", last, same or mixes, tolerance)]


def reading(lm: LM, batch: Batch, seen: dict[Site, Tensor], tolerance: float) -> list[Check]:
    """Whether cross-attention reads the tower that the family says, position by position: a change
    of what its last layer gives at one position changes the keys and values of that position and of
    no other, and no query of the first layer."""
    source = lm.family.source
    points = [s for s in seen if s.point in ("cross.q", "cross.k", "cross.v")]
    if not source or not points:
        return []
    last = Site(source, lm.layout.dims[source].layers - 1, "resid_post")
    after: dict[Site, Tensor] = {}
    reads = {s: [lambda x, run, s=s: after.__setitem__(s, x.clone())] for s in points}

    def change(x: Tensor, run: object) -> Tensor:
        return torch.cat([3 * x[:, :1].roll(1, dims=-1), x[:, 1:]], dim=1)

    with lm.taps.using({last: [change]}, reads):
        lm(batch)
    facts = []
    for site in points:
        if site.point == "cross.q":
            moved, still = [], [(after[site], seen[site])] if site.layer == 0 else []
        else:
            moved = [(after[site][:, :1], seen[site][:, :1])]
            still = [(after[site][:, 1:], seen[site][:, 1:])]
        same = all(gap("", site, *pair, tolerance).holds for pair in still)
        other = all(not gap("", site, *pair, tolerance).holds for pair in moved)
        facts.append(fact("cross-attention reads the source", site, same and other, tolerance))
    return facts


def apart(lm: LM, batch: Batch, seen: dict[Site, Tensor]) -> Iterator[Pair]:
    """Where a gate stands between pattern @ v and z: a head that attends to nothing changes its own
    z and no other's."""
    for at in [s for s in seen if s.point == "attn.pattern" and lm.layout.tower(s).gated]:
        after: list[Tensor] = []
        z = replace(at, point="attn.z")
        first = torch.zeros(1, dtype=torch.long, device=seen[at].device)
        edits = {at: [lambda x, run, first=first: x.index_fill(1, first, 0)]}
        with lm.taps.using(edits, {z: [lambda x, run, after=after: after.append(x.clone())]}):
            lm(batch)
        yield "a head's pattern reaches its own z only", z, after[0][:, :, 1:], seen[z][:, :, 1:]
        own = (after[0] - seen[z])[:, :, :1]
        yield (
            "a head's pattern reaches its own z",
            z,
            own.norm().clamp_max(1e-3) * 1e3,
            torch.ones_like(own.norm()),
        )
