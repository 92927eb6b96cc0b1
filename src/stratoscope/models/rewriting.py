"""The trial in which the stream is rewritten through its parts, so that each is as large as it."""

from __future__ import annotations

from collections.abc import Container, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stratoscope.errors import SiteError
from stratoscope.models.batch import Batch
from stratoscope.models.check import Check, Pair, fact, stop
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.taps import Run


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
        rewritable = [
            layer
            for layer in here
            if (at := Site(name, layer, "mlp.out")) in seen and _writes(seen, at)
        ]
        run = _Rewriting(
            lm,
            name,
            [layer for layer in here if layer >= min(rewritable, default=0)],
            seen,
            tolerance,
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
        edits: dict[Site, list[Any]] = {}
        for layer in self.layers:
            for point, edit in (("mlp.pre", self._shut), ("mlp.out", self._write)):
                if self.at(layer, point) in self.seen:
                    edits[self.at(layer, point)] = [partial(edit, self.at(layer, point))]
            for mixer in _writes(self.seen, self.at(layer, "")):
                edits[mixer] = [partial(self._write, mixer)]
        return edits

    def reads(self, last: Site) -> dict[Site, list[Any]]:
        points = ("resid_pre", "resid_mid", "mlp.act", "resid_post")
        sites = [
            s for layer in self.layers for p in points if (s := self.at(layer, p)) in self.seen
        ]
        reads: dict[Site, list[Any]] = {site: [partial(self._keep, site)] for site in sites}
        if self.tower in ("", self.lm.family.source):  # a vision tower is not sure to come first
            reads[last].append(stop)
        return reads

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


def _writes(seen: Container[Site], at: Site) -> list[Site]:
    """What a layer's token mixing adds to the stream: attention, another mixer, or both side by
    side; and what it reads from another tower."""
    points = ("attn.out", "mix.out", "cross.out")
    return [site for p in points if (site := Site(at.tower, at.layer, p)) in seen]
