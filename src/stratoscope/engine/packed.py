"""Packed execution, the inside of `sweep`: live rows of many cells go through the Hugging Face
layers as one matrix.

A row is one position of one cell on one example. Each layer is called once with all rows as (1,
row, dim); its other arguments (rotary angles and the like) are those of the base run, gathered row
by row. Attention keeps cells apart: a cell's queries see the base run's keys and values before its
first changed position, and its own from there on. Of the last layer only the position is finished
that the metric reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stratoscope.engine.base import Base, Job, gather, read
from stratoscope.engine.intervention import ALIKE, OPERATIONS, Intervention
from stratoscope.engine.linear import FastLinear
from stratoscope.models.attention import masked, scores_of, seam, softmax_visible
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.taps import Run, StopForward

Changes = dict[str, list[tuple[Job, Intervention]]]  # by point, the changes made in one layer


class Wave:
    """Some packed jobs on their way through the layers.

    Rows of a job are contiguous, from its first position to its end, and jobs of one example that
    begin at the same position are neighbours: their attention is one call.
    """

    def __init__(self, lm: LM, base: Base, jobs: Sequence[Job]) -> None:
        self.lm, self.base, self.jobs = lm, base, jobs
        self.lengths = base.lengths
        self.start: dict[Job, int] = {}  # first row of each live job
        # whether each job has come down to the row that is read, which alone ends the last layer
        self.read_only = False
        self.heard: list[Tensor] | None = None  # the last layer's q, k and v of all rows
        self.rows = base.residual[0].new_empty(0, lm.dims.dim)
        self.example = self.position = torch.empty(0, dtype=torch.long, device=self.rows.device)
        # example, first position, first row, how many jobs
        self.groups: list[tuple[int, int, int, int]] = []

    def run(self, metric: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(job,) the metric of every job."""
        lm, depth = self.lm, self.base.depth
        attentions = {
            lm.layout.attention(Site("", n, "attn.q")): partial(self._attention, n)
            for n in range(depth)
        }
        with lm.taps.only(), lm.taps.using(), seam(lm.model, {}, attentions):
            for layer in range(min(job.layer for job in self.jobs), depth):
                self._join([job for job in self.jobs if job.layer == layer])
                changes = self._changes(layer)
                self._change(self.rows, changes.pop("resid_pre", ()))
                after = changes.pop("resid_post", ())
                if layer == depth - 1:
                    self._come_down(layer, changes)
                self.rows = self._layer(layer, changes)
                self._change(self.rows, after)
            at = torch.tensor([self.start[job] for job in self.jobs], device=self.rows.device)
            examples = torch.tensor([job.example for job in self.jobs])
            # logits are wide: never for all jobs at once
            chunks = zip(at.split(256), examples.split(256))
            with FastLinear():
                return torch.cat(
                    [metric(read(lm, self.rows[rows]), example) for rows, example in chunks]
                )

    def _first(self, job: Job) -> int:
        """The position of a job's first row."""
        return self.base.reads[job.example] if self.read_only else job.first

    def _size(self, job: Job) -> int:
        return self.lengths[job.example] - job.first

    def _join(self, jobs: Sequence[Job]) -> None:
        """Add the clean rows of jobs that begin at this layer, and put neighbours together."""
        if not jobs:
            return
        residual, device = self.base.residual[jobs[0].layer], self.rows.device
        parts, at = [self.rows], len(self.rows)
        for job in jobs:
            parts.append(residual[job.example, job.first : self.lengths[job.example]])
            self.start[job] = at
            at += self._size(job)
        ordered = sorted(self.start, key=lambda job: (job.example, job.first))
        old = torch.cat(
            [torch.arange(self.start[job], self.start[job] + self._size(job)) for job in ordered]
        )
        self.rows = torch.cat(parts)[old.to(device)]
        positions = [torch.arange(job.first, self.lengths[job.example]) for job in ordered]
        self.position = torch.cat(positions).to(device)
        self.example = torch.cat(
            [torch.full_like(x, job.example) for x, job in zip(positions, ordered)]
        ).to(device)
        self.groups, at = [], 0
        for (example, first), group in groupby(ordered, key=lambda job: (job.example, job.first)):
            begin = at
            for job in (members := list(group)):
                self.start[job] = at
                at += self._size(job)
            self.groups.append((example, first, begin, len(members)))

    def _layer(self, layer: int, changes: Changes) -> Tensor:
        """The rows through a Hugging Face layer, with changes inside it."""
        edits = {
            Site("", layer, point): [partial(self._edit, by_point)]
            for point, by_point in changes.items()
        }
        args, kwargs = gather(self.base.calls[layer], self.base, layer, self.example, self.position)
        with self.lm.taps.using(edits=edits) if edits else ExitStack(), FastLinear():
            out = self.lm.layout.layers[""][layer](self.rows[None], *args, **kwargs)
        return (out[0] if isinstance(out, tuple) else out)[0]

    def _come_down(self, layer: int, changes: Changes) -> None:
        """Go through the layer as far as its attention, for keys and values; then keep only the row
        that each job reads."""
        before = {
            point: changes.pop(point)
            for point in ("attn.q", "attn.k", "attn.v")
            if point in changes
        }
        self.heard = []
        with suppress(StopForward):
            self._layer(layer, before)
        ordered = sorted(self.start, key=self.start.__getitem__)
        own = [self.base.reads[job.example] - job.first for job in ordered]
        staying = torch.tensor(
            [self.start[job] + n for job, n in zip(ordered, own)], device=self.rows.device
        )
        self.rows, self.example, self.position = (
            self.rows[staying],
            self.example[staying],
            self.position[staying],
        )
        self.start, self.read_only = {job: row for row, job in enumerate(ordered)}, True

    def _attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
        """What the seam calls: the first time in the last layer it only listens, the second time it
        uses what it heard."""
        if self.read_only and self.heard is not None:
            q, k, v = self.heard
        elif self.heard is not None:
            self.heard = [q, k, v]
            raise StopForward
        return self._attend(layer, q, k, v, *how)

    def _changes(self, layer: int) -> Changes:
        by_point: Changes = {}
        for job in self.start:
            for change in job.changes:
                if change.site.layer == layer:
                    by_point.setdefault(change.site.point, []).append((job, change))
        return by_point

    def _edit(self, changes: Sequence[tuple[Job, Intervention]], x: Tensor, run: Run) -> Tensor:
        x = x.clone()
        self._change(x[0], changes)
        return x

    def _change(self, x: Tensor, changes: Sequence[tuple[Job, Intervention]]) -> None:
        """Make the changes in place on x (row, ...)."""
        count = len(self.base.batch)
        for job, change in changes:
            index = self.base.positions(change, job.example)
            first = self._first(job)
            end = first + 1 if self.read_only else self.lengths[job.example]
            here = ((index >= first) & (index < end)).nonzero()[:, 0]
            at = (self.start[job] + index[here] - first).to(x.device)
            if change.units is not None:
                units = torch.as_tensor(list(change.units)).to(x.device) % x.shape[1]
                place: tuple[Tensor, ...] = (at[:, None], units[None])
            else:
                place = (at,)
            chosen = x[place]
            value = change.value
            if change.operation in ALIKE:
                examples = list(range(count)) if change.examples is None else list(change.examples)
                shape = (len(examples), len(index), *chosen.shape[1:])
                value = torch.broadcast_to(value, shape)[
                    examples.index(job.example), here.to(value.device)
                ]
            x[place] = OPERATIONS[change.operation](chosen, value).to(x.dtype)

    def _attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        _: Tensor | None,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of packed rows. q (1, head, row, head_dim) -> (1, row, head, head_dim), or of
        the one that each job reads.

        Query heads that share a key/value head are laid one after another as more queries of that
        head.
        """
        outputs = []
        shared, mask = q.shape[1] // k.shape[1], self.base.masks[layer]
        for example, first, begin, jobs in self.groups:
            end = self.lengths[example]
            rows = slice(begin, begin + jobs * (end - first))
            key, value = (
                torch.cat(
                    [
                        clean[layer][example, :, :first].expand(jobs, -1, -1, -1),
                        _by_job(own, rows, jobs),
                    ],
                    dim=2,
                )
                for clean, own in ((self.base.keys, k), (self.base.vals, v))
            )
            own = self.base.reads[example] - first
            asks = slice(own, own + 1) if self.read_only else slice(None)
            query = _by_job(q, rows, jobs)[:, :, asks]
            # job, kv_head, (shared, own), head_dim
            query = query.unflatten(1, (-1, shared)).flatten(2, 3)
            hidden = None
            if mask is not None:
                hidden = mask[example if mask.shape[0] > 1 else 0, 0, first:end, :end][asks].repeat(
                    shared, 1
                )
            if softcap is None and sinks is None:
                z = scaled_dot_product_attention(query, key, value, attn_mask=hidden, scale=scaling)
            else:
                sink = None
                if sinks is not None:
                    sink = (
                        sinks.reshape(-1, shared, 1, 1)
                        .expand(-1, -1, query.shape[2] // shared, 1)
                        .flatten(1, 2)
                    )
                z = (
                    softmax_visible(masked(scores_of(query, key, scaling, softcap), hidden), sink)
                    @ value
                )
            # job, own, kv_head, shared, head_dim
            z = z.unflatten(2, (shared, -1)).permute(0, 3, 1, 2, 4)
            outputs.append(z.reshape(-1, q.shape[1], v.shape[-1]))
        return torch.cat(outputs)[None]


def _by_job(x: Tensor, rows: slice, jobs: int) -> Tensor:
    """(1, head, row, head_dim) -> the rows of one group as (job, head, own, head_dim)."""
    return x[0, :, rows].unflatten(1, (jobs, -1)).transpose(0, 1)
