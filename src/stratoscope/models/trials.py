"""Trials of a family: what must happen when a run is changed, beside the sums that every run must
show (`prove`).

The stream is rewritten through its parts, the last token taken away, attention silenced, padding
left out.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stratoscope.errors import SiteError
from stratoscope.models.attention import seam
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.taps import Run, StopForward
from stratoscope.models.weights import row_independent

Pair = tuple[str, Site, Tensor, Tensor]  # an invariant, its place, what it says, what the model has
PADDING = "a prompt beside a longer one == the prompt alone"


@dataclass(frozen=True)
class Check:
    """One invariant at one place: largest absolute difference (over the largest value) and relative
    norm."""

    name: str
    place: str
    absolute: float
    relative: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.absolute <= self.tolerance and self.relative <= self.tolerance


def gap(name: str, place: Site, got: Tensor, expected: Tensor, tolerance: float) -> Check:
    """How far `got` is from `expected`: of its largest value, and of its norm. What is not a number
    fails."""
    missed, scale = (got - expected).float(), expected.float()
    absolute = float(missed.abs().max() / scale.abs().max().clamp_min(1e-6))
    relative = float(missed.norm() / scale.norm().clamp_min(1e-6))
    return Check(name, str(place), absolute, relative, tolerance)


def fact(name: str, place: Site, holds: bool, tolerance: float) -> Check:
    error = 0.0 if holds else torch.inf
    return Check(name, str(place), error, error, tolerance)


def rewritten(
    lm: LM, batch: Batch, seen: dict[Site, Tensor], tolerance: float
) -> tuple[list[Pair], list[Check]]:
    """The stream rewritten through its parts: each part is made to write what turns the stream
    round by one dimension.

    A sum over one run hides a part that is small beside the stream; here every part is as large as
    the stream, so a factor between a part and the stream shows at any precision. The same pass
    shuts every neuron (mlp.pre far below zero; a gate's other half would not), and tells whether an
    MLP hears the attention before it.
    """
    pairs, facts = [], []
    for name, tower in lm.family.towers.items():
        here = sorted(s.layer for s in seen if s.tower == name and s.point == "resid_post")
        if not here:
            continue
        both = [
            layer
            for layer in here
            if (at := Site(name, layer, "mlp.out")) in seen and _writes(seen, at)
        ]
        run = _Rewriting(
            lm, name, [layer for layer in here if layer >= min(both, default=0)], seen, tolerance
        )
        last = Site(name, here[-1], "resid_post")
        try:
            with lm.taps.using(run.edits(), run.reads(last)):
                lm(batch)
        except SiteError:  # a layer scale of zero: the stream cannot be changed there
            continue
        pairs += run.pairs()
        if tower.residual != "post-norm" and run.order is not None:
            facts.append(
                fact(
                    f"attention and MLP are {tower.residual}", run.order[0], run.hears(), tolerance
                )
            )
    return pairs, facts


class _Rewriting:
    """One pass in which every part of a tower writes what turns the stream round."""

    def __init__(
        self, lm: LM, tower: str, layers: list[int], seen: dict[Site, Tensor], tolerance: float
    ) -> None:
        self.lm, self.tower, self.layers, self.seen, self.tolerance = (
            lm,
            tower,
            layers,
            seen,
            tolerance,
        )
        self.now: dict[Site, Tensor] = {}  # what this pass showed
        self.order: tuple[Site, Tensor] | None = (
            None  # the first MLP beside attention, and what it computed here
        )
        self.deaf = (
            False  # that MLP computes the same for every token (it was pruned): it tells no order
        )

    def at(self, layer: int, point: str) -> Site:
        return Site(self.tower, layer, point)

    def edits(self) -> dict[Site, list[Any]]:
        found: dict[Site, list[Any]] = {}
        for layer in self.layers:
            for point, edit in (("mlp.pre", self._shut), ("mlp.out", self._write)):
                if self.at(layer, point) in self.seen:
                    found[self.at(layer, point)] = [partial(edit, self.at(layer, point))]
            for mixer in _writes(self.seen, self.at(layer, "")):
                found[mixer] = [partial(self._write, mixer)]
        return found

    def reads(self, last: Site) -> dict[Site, list[Any]]:
        points = ("resid_pre", "resid_mid", "mlp.act", "resid_post")
        sites = [
            s for layer in self.layers for p in points if (s := self.at(layer, p)) in self.seen
        ]
        found: dict[Site, list[Any]] = {site: [partial(self._keep, site)] for site in sites}
        if self.tower in ("", self.lm.family.source):  # a vision tower is not sure to come first
            found[last].append(_stop)
        return found

    def _keep(self, site: Site, x: Tensor, run: Run) -> None:
        self.now[site] = x.clone()

    def _shut(self, site: Site, x: Tensor, run: Run) -> Tensor:
        self._first(site, x)
        return torch.full_like(x, -100)

    def _first(self, site: Site, x: Tensor) -> None:
        if self.order is None and not self.deaf and _writes(self.seen, site):
            before = self.seen[site]
            self.deaf = bool((before - before[:1, :1]).norm() <= self.tolerance * before.norm())
            self.order = None if self.deaf else (site, x.clone())

    def hears(self) -> bool:
        """Whether the first MLP computed something else, as it must where it comes after
        attention."""
        site, x = self.order  # type: ignore[misc]
        # not to the bit: where a picture comes first, its tower ran under another kernel
        same = bool((x - self.seen[site]).norm() <= self.tolerance * self.seen[site].norm())
        return same == (self.lm.family.towers[self.tower].residual == "parallel")

    def _write(self, site: Site, x: Tensor, run: Run) -> Tensor:
        layer = int(site.layer)
        if site.point == "mlp.out":
            self._first(site, x)
        start, turns = self.now[self.at(layer, "resid_pre")], self._turns(layer)
        before = turns.index(site.point)
        if self.lm.family.towers[self.tower].residual == "post-norm":
            middle = self._before(layer, before)
            return _turned(middle) - middle
        return (_turned(start, before + 1) - _turned(start, before)).to(x.dtype)

    def _before(self, layer: int, part: int) -> Tensor:
        """The stream of a post-norm layer before its part of that number: each is followed by a
        norm."""
        middle = self.now.get(self.at(layer, "resid_mid"))
        if part and part == len(self._turns(layer)) - 1 and middle is not None:
            return middle
        x = self.now[self.at(layer, "resid_pre")]
        for norm in self.lm.layout.norms(self.at(layer, ""))[:part]:
            x = norm(_turned(x))
        return x

    def _turns(self, layer: int) -> list[str]:
        """The parts that write in a layer, in order: each turns the stream one dimension
        further."""
        mixers = [site.point for site in _writes(self.seen, self.at(layer, ""))]
        return mixers + (["mlp.out"] if self.at(layer, "mlp.out") in self.seen else [])

    def pairs(self) -> Iterator[Pair]:
        norms = self.lm.family.towers[self.tower].norms
        for layer in self.layers:
            post, turns = self.at(layer, "resid_post"), self._turns(layer)
            start = self.now[self.at(layer, "resid_pre")]
            expected = _turned(start, len(turns))
            if self.lm.family.towers[self.tower].residual == "post-norm":
                parts = len(turns) == len(norms or ())
                if norms is None or not parts or self.at(layer, "resid_mid") not in self.now:
                    continue
                last = self.lm.layout.norms(post)[-1]
                expected = last(_turned(self.now[self.at(layer, "resid_mid")]))
            yield "what the parts write is what is added", post, self.now[post], expected
            act = self.at(layer, "mlp.act")
            if act in self.now and self.at(layer, "mlp.pre") in self.seen:
                x, activation = self.now[act], self.lm.layout.tower(act).activation
                shut = torch.full_like(x, -100) if activation else torch.zeros_like(x)
                closed = (
                    self.lm.layout.layer(act).get_submodule(activation)(shut)
                    if activation
                    else shut
                )
                yield "mlp.act shuts when mlp.pre is far below zero", act, x, closed


def _turned(x: Tensor, by: int = 1) -> Tensor:
    return x.roll(by, dims=-1)


def _stop(x: Tensor, run: Run) -> None:
    raise StopForward


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
            with lm.taps.using(edits, {last: [lambda x, run: after.append(x.clone()), _stop]}):
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
    with lm.taps.using(reads={last: [lambda x, run: alone.append(x.clone()), _stop]}):
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
    reads = {last: [lambda x, run: ends.append(x[:, 1:].clone()), _stop]}
    for edits in ({}, {first: [change]}) if pair is batch else ({first: [change]},):
        with lm.taps.using(edits, reads), seam(lm.model, {}, modules):
            lm(pair)
    if pair is batch:
        found = list(zip(masks[:depth] + ends[:1], masks[depth:] + ends[1:]))
    else:
        found = [(x[0], x[-1]) for x in (*masks, *ends)]
    same = all(
        x.shape == y.shape and bool(torch.isclose(x, y, tolerance, tolerance).all())
        for x, y in found
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
    found = []
    for site in points:
        if site.point == "cross.q":
            moved, still = [], [(after[site], seen[site])] if site.layer == 0 else []
        else:
            moved = [(after[site][:, :1], seen[site][:, :1])]
            still = [(after[site][:, 1:], seen[site][:, 1:])]
        same = all(gap("", site, *pair, tolerance).holds for pair in still)
        other = all(not gap("", site, *pair, tolerance).holds for pair in moved)
        found.append(fact("cross-attention reads the source", site, same and other, tolerance))
    return found


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


def _writes(seen: Container[Site], at: Site) -> list[Site]:
    """What a layer's token mixing adds to the stream: attention, another mixer, or both side by
    side; and what it reads from another tower."""
    points = ("attn.out", "mix.out", "cross.out")
    return [site for p in points if (site := Site(at.tower, at.layer, p)) in seen]
