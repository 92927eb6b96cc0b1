"""`trace`: see any sites while the model runs, and nothing else.

    with trace(lm, "layers.*.resid_post", "layers.3.attn.z", positions=-1) as seen:
        lm("The capital of France is")
    seen["layers.3.attn.z"]             # (example, head, head_dim)
    seen.stack("layers.*.resid_post")   # (layer, example, dim)

`capture` does the three lines in one. The forward pass ends as soon as the last site has been seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stratoscope.engine.memory import available, predicted, refuse_above, working
from stratoscope.engine.select import (
    Positions,
    as_index,
    key_axis,
    position_index,
    run_at,
    take,
    with_gone,
)
from stratoscope.errors import InputError, SiteError
from stratoscope.models import finite
from stratoscope.models.lm import LM
from stratoscope.models.run import Each, Run
from stratoscope.models.sites import Site
from stratoscope.models.taps import StopForward


class Trace:
    """What was seen, by site. Each forward pass adds a step (generation runs many); indexing gives
    the last one."""

    def __init__(
        self, lm: LM, sites: list[Site], positions: Positions, *, grad: bool, stop: bool
    ) -> None:
        self.lm, self.sites, self.positions, self.grad, self.stop = lm, sites, positions, grad, stop
        self._steps: dict[Site, list[Tensor]] = {site: [] for site in sites}
        self._first = Run()  # as it was at step 0

    def __getitem__(self, site: str | Site) -> Tensor:
        """The tensor at a site, with the site's axes (a single int position drops its axis). Raises
        SiteError."""
        return self.steps(site)[-1]

    def steps(self, site: str | Site) -> list[Tensor]:
        """The tensors of every forward pass, first to last."""
        at = self.lm.layout.resolve_one(site)
        if at not in self._steps:
            raise SiteError(
                f"`{at}` was not traced; the trace holds {', '.join(map(str, self.sites[:6]))} ..."
            )
        if not self._steps[at]:
            raise SiteError(
                f"`{at}` was never reached: run the model inside the `with` block, with inputs "
                "that reach it"
                f" and without an edit that leaves its module out."
            )
        return self._steps[at]

    def release(self, site: Site) -> None:
        """Let go of a site's tensors, once they have been copied elsewhere."""
        self._steps[site].clear()

    def reached(self, site: Site) -> bool:
        """Whether any forward pass came by."""
        return bool(self._steps[site])

    def stack(self, pattern: str | Site) -> Tensor:
        """The sites of a pattern along a new first axis, layer: (layer, ...). Raises SiteError as
        `refuse_ragged` does."""
        self.refuse_ragged(pattern)
        return torch.stack([self[site] for site in self.lm.sites(pattern)])

    def refuse_ragged(self, pattern: str | Site) -> None:
        """Raises SiteError where the sites of a pattern differ in shape: one result cannot hold
        them."""
        sites = self.lm.sites(pattern)
        shapes = {site: tuple(self[site].shape) for site in sites}
        odd = next((site for site in sites if shapes[site] != shapes[sites[0]]), None)
        if odd is not None:
            raise SiteError(
                f"`{pattern}` cannot be stacked: the layers of this model differ in shape, "
                f"`{sites[0]}` is {shapes[sites[0]]} and `{odd}` {shapes[odd]}. Read layers of one "
                "shape, one by one."
            )

    def mean(self, site: str | Site) -> Tensor:
        """The site's mean over examples and real positions, padding left out: the reference of a
        mean ablation."""
        at, value = self.lm.layout.resolve_one(site), self[site]
        if "position" not in at.axes:
            raise InputError(
                f"`{at}` has axes {', '.join(at.axes)}: a mean over positions does not exist there."
            )
        real = run_at(at, self._first).mask
        if self.positions is None and real is not None:
            return value[real].mean(dim=0)
        return value.flatten(0, value.ndim - len(at.axes) + 1).mean(dim=0)

    def _read(self, site: Site, x: Tensor, run: Run) -> None:
        if not any(self._steps.values()):
            self._refuse_too_large(run)
        if run.step == 0:
            self._first = replace(run)
        newest = isinstance(self.positions, int) and self.positions == -1
        # else the position came with the prompt
        if run.step == 0 or self.positions is None or newest:
            self._steps[site].append(self._select(site, x, run))
        counts = {len(steps) for steps in self._steps.values()}
        if (
            self.stop
            and run.batch is not None
            and len(counts) == 1
            and sum(1 for _, reads in self.lm.taps.listening if reads) == 1
        ):
            raise StopForward

    def _select(self, site: Site, x: Tensor, run: Run) -> Tensor:
        along = {word: run_at(site, run, word) for word in ("position", "query", "key")}
        axis = next((i for i, word in enumerate(site.axes) if word in ("position", "query")), None)
        narrowed, keys = self.positions is not None and axis is not None, key_axis(site)
        x = x if keys is None else _whole(x, site, keys, along[site.axes[keys]])
        run = run if axis is None else along[site.axes[axis]]
        # else a user's own call, whose tensors stay as the user laid them out
        own = run.batch is not None or narrowed
        every = [i for i, word in enumerate(site.axes) if word in along]
        for moved in [keys] if run.step else every:
            start = None if moved is None else along[site.axes[moved]].start
            if start is not None and own and not (narrowed and moved == axis):
                index = (torch.arange(x.shape[moved]) + start.cpu()[:, None]) % x.shape[moved]
                x = take(x, moved, index)
        if narrowed:
            width, at = x.shape[axis], self.positions
            index = (
                torch.full((len(x), 1), width - 1)
                if run.step
                else position_index(at, run, len(x), width)
            )
            x = take(x, axis, index)
            x = x.squeeze(axis) if isinstance(at, int | Each) else x
        # a copy: the model may overwrite its tensor in place later, and a view would keep the whole
        # of it alive
        value = x if self.grad else x.detach().clone()
        if own and axis is not None and value.ndim == len(site.axes) and not run.step:
            known = None if narrowed and site.axes[axis] == "position" else run.lengths
            # `ablate` asks
            value.own_lengths = (
                [value.shape[axis]] * len(value) if known is None else known.tolist()
            )
        return value

    def _refuse_too_large(self, run: Run) -> None:
        if run.batch is None:
            return
        positions = None if self.positions is None else as_index(self.positions).shape[-1:].numel()
        needed = predicted(self.lm, self.sites, run.batch, positions) + working(
            self.lm, self.sites, run.batch
        )
        advice = "ask for fewer layers or sites, give `positions=`, or split the batch"
        refuse_above(
            needed, available(self.lm.model.device), f"capturing {len(self.sites)} sites", advice
        )


def _whole(x: Tensor, site: Site, axis: int, run: Run) -> Tensor:
    """Keys from the sequence's first position on, and none of the empty places of a cache of fixed
    size. What a sliding window has let go: nothing is read from there (pattern 0, score -inf), and
    keys and values are not there (NaN)."""
    if run.fixed and x.shape[axis] > run.past + run.new:
        x = x.narrow(axis, 0, run.past + run.new)
    gone = run.gone(x.shape[axis])
    fill = {"attn.pattern": 0.0, "attn.scores": -torch.inf}.get(site.point, torch.nan)
    return with_gone(x, axis, gone, fill) if gone else x


@contextmanager
def trace(
    lm: LM, *sites: str | Site, positions: Positions = None, grad: bool = False, stop: bool = True
) -> Iterator[Trace]:
    """Capture sites while the block runs the model.

    positions: which token positions to keep; -1 is each example's last real token; None keeps all.
    While generating,
    -1 is the newest token of every step, and other named positions are those of the prompt, seen at
    step 0 alone. Keys count from an example's first token at every step. A direct call of
    `lm.model` is read by its attention_mask: named positions are an example's own; without names,
    tensors are as the call laid them out. grad: keep the graph (else the block runs without
    gradients and values are detached). stop: end each forward pass after the last site, so that
    `lm(...)` returns None; a direct call of `lm.model` runs on. Raises SiteError for sites the
    model lacks, before anything runs, and MemoryRefusal when they would not fit.
    """
    if not sites:
        raise InputError("trace was given no site; name at least one, e.g. 'layers.*.resid_post'.")
    resolved = lm.layout.resolve(sites)
    seen = Trace(lm, resolved, positions, grad=grad, stop=stop)
    reads = {site: [lambda x, run, at=site: seen._read(at, x, run)] for site in resolved}
    with torch.set_grad_enabled(grad), lm.taps.using(reads=reads):
        yield seen


def capture(
    lm: LM, inputs: Any, *sites: str | Site, positions: Positions = None, grad: bool = False
) -> Trace:
    """One forward pass over the inputs with a `trace` of the sites; see there.

    Raises InputError for a value that is not a number: a trace shows it, a method must not measure
    with it.
    """
    batch = lm.batch(inputs)
    with trace(lm, *sites, positions=positions, grad=grad) as seen:
        lm(batch)
    values = {str(site): seen[site] for site in seen.sites if seen.reached(site)}
    finite.refuse(values, batch.mask if positions is None else None)
    return seen
