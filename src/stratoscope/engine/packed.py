"""Packed execution, the inside of `sweep`: live rows of many cells go through the Hugging Face
layers as one matrix.

A row is one position of one cell on one example. Each layer is called once with all rows as (1,
row, dim); its other arguments (rotary angles and the like) are those of the base run, gathered row
by row. Attention keeps cells apart: every cell has the base run's keys and values with its own rows
written over them, and one call serves all cells of a layer. Of the last layer only the position is
finished that the metric reads.

Rows are sorted by the layer at which their cell begins, so that those of the cells that have begun
are always the first ones. All indices are made once for a wave: between the first layer and the
last nothing is done cell by cell, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stratoscope.engine.base import Base, gather, read
from stratoscope.engine.intervention import ALIKE, OPERATIONS
from stratoscope.engine.jobs import Alike, Jobs, Written, written
from stratoscope.engine.linear import FastLinear
from stratoscope.models.attention import masked, repeat_heads, scores_of, seam, softmax_visible
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.taps import Run, StopForward

_BEFORE_ATTENTION = ("attn.q", "attn.k", "attn.v")


class Wave:
    """Some packed jobs on their way through the layers."""

    def __init__(self, lm: LM, base: Base, jobs: Jobs, kinds: Sequence[Alike]) -> None:
        self.lm, self.base, self.jobs = lm, base, jobs
        device = base.residual[0].device
        sizes = torch.tensor(base.lengths)[jobs.example] - jobs.first
        start = sizes.cumsum(0) - sizes
        job = torch.repeat_interleave(torch.arange(len(jobs)), sizes)
        position = torch.arange(len(job)) - (start - jobs.first)[job]
        self.low = int(jobs.first.min())  # no cell asks before this position
        reads = torch.tensor(base.reads)[jobs.example]
        # for each row, and for each job, where it is found
        rows = torch.stack([job, position, jobs.example[job]])
        self.job, self.position, self.example = rows.to(device)
        # where a row stands among the keys of all jobs, and among the queries
        self.own = self.job * base.width + self.position
        self.asks = self.job * (base.width - self.low) + self.position - self.low
        each = torch.stack([start + reads - jobs.first, reads, jobs.example])
        self.read_row, self.reads, self.job_example = each.to(device)
        # how many jobs have begun, and how many rows they have, by layer
        begun = [int(n) for n in (jobs.layer[:, None] <= torch.arange(base.depth)).sum(dim=0)]
        ends = [0, *sizes.cumsum(0).tolist()]
        self.begun, self.live = begun, [ends[n] for n in begun]
        to_row = start - jobs.first
        self.changes = [_Changes(w, to_row, device) for w in written(base, jobs, kinds)]
        last = written(base, jobs, kinds, read_only=True)
        self.last_changes = [_Changes(w, None, device) for w in last]
        self.reads_all = bool((reads == base.width - 1).all())
        self.masks: dict[tuple, Tensor] = {}
        self.beside: dict[int, Tensor] = {}  # what layers are called with beside the stream
        # oneDNN, where it helps: a mode costs Python at every operation
        self.fast = device.type == "cpu" and lm.dims.dim >= 128
        # whether each job has come down to the row that is read, which alone ends the last layer
        self.read_only = False
        self.heard: tuple[Tensor, Tensor, Tensor] | None = None  # the last layer's q, k and v

    def run(self, metric: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(job,) the metric of every job."""
        lm, depth = self.lm, self.base.depth
        attentions = {
            lm.layout.attention(Site("", n, "attn.q")): partial(self._attention, n)
            for n in range(depth)
        }
        inside = {
            Site("", layer, change.kind.point)
            for change in self.changes
            for layer in change.parts
            if change.kind.point not in ("resid_pre", "resid_post")
        }
        edits = {site: [partial(self._edit, site)] for site in inside}
        start = int(self.jobs.layer.min())
        rows = self.base.residual[start].new_empty(0, lm.dims.dim)
        with lm.taps.only(), lm.taps.using(edits=edits), seam(lm.model, {}, attentions):
            for layer in range(start, depth):
                rows = self._join(layer, rows)
                self._change(layer, "resid_pre", rows)
                if layer == depth - 1:
                    rows = self._come_down(layer, rows)
                rows = self._layer(layer, rows)
                self._change(layer, "resid_post", rows)
            # logits are wide: never for all jobs at once
            with self._fast():
                return torch.cat(
                    [
                        metric(read(lm, some), example)
                        for some, example in zip(rows.split(256), self.jobs.example.split(256))
                    ]
                )

    def _join(self, layer: int, rows: Tensor) -> Tensor:
        """Add the clean rows of jobs that begin at this layer."""
        new = slice(len(rows), self.live[layer])
        if new.start == new.stop:
            return rows
        clean = self.base.residual[layer][self.example[new], self.position[new]]
        return torch.cat([rows, clean]) if len(rows) else clean

    def _layer(self, layer: int, rows: Tensor) -> Tensor:
        """The rows through a Hugging Face layer, with changes inside it."""
        call = self.base.calls[layer], self.base, layer
        if self.read_only:
            args, kwargs = gather(*call, self.job_example, self.reads)
        else:
            args, kwargs = gather(*call, self.example, self.position, self.live[layer], self.beside)
        with self._fast():
            out = self.lm.layout.layers[""][layer](rows[None], *args, **kwargs)
        return (out[0] if isinstance(out, tuple) else out)[0]

    def _come_down(self, layer: int, rows: Tensor) -> Tensor:
        """Go through the layer as far as its attention, for keys and values; then keep only the row
        that each job reads."""
        self.heard = None
        with suppress(StopForward):
            self._layer(layer, rows)
        self.read_only = True
        return rows[self.read_row]

    def _fast(self) -> AbstractContextManager[Any]:
        return FastLinear() if self.fast else nullcontext()

    # --- changes ----------------------------------------------------------------------------------

    def _edit(self, site: Site, x: Tensor, run: Run) -> Tensor:
        if self.read_only and site.point in _BEFORE_ATTENTION:
            return x  # what was heard is used
        x = x.clone()
        self._change(int(site.layer), site.point, x[0])
        return x

    def _change(self, layer: int, point: str, x: Tensor) -> None:
        """Make the changes in place on x (row, ...), those of one site in their order."""
        changes = self.last_changes if self.read_only else self.changes
        here = [c for c in changes if c.kind.point == point and layer in c.parts]
        for rank in sorted({rank for c in here for rank in c.parts[layer]}):
            for change in here:
                change.make(layer, rank, x)

    # --- attention --------------------------------------------------------------------------------

    def _attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *how: Any) -> Tensor:
        """What the seam calls: the first time in the last layer it only listens, the second time it
        uses what it heard."""
        if self.read_only and self.heard is not None:
            q, k, v = self.heard
        elif layer == self.base.depth - 1:
            self.heard = q, k, v
            raise StopForward
        return self._attend(layer, q, k, v, *how)

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
        the one that each job reads."""
        jobs, live, width = self.begun[layer], slice(self.live[layer]), self.base.width
        own = (self.own[live],)
        example = self.job_example[:jobs]
        key, value = (
            clean[layer]
            .transpose(1, 2)
            .flatten(1)[example]
            .reshape(jobs * width, x.shape[1], x.shape[3])
            .index_put_(own, x[0].transpose(0, 1))
            .unflatten(0, (jobs, width))
            .transpose(1, 2)
            for clean, x in ((self.base.keys, k), (self.base.vals, v))
        )
        if self.read_only:
            query = q[0][:, self.read_row].transpose(0, 1)[:, :, None]
            asks = slice(None)
        else:
            places = width - self.low
            asks = self.asks[live]
            query = q.new_zeros(jobs * places, q.shape[1], q.shape[3])
            query[asks] = q[0].transpose(0, 1)
            query = query.unflatten(0, (jobs, places)).transpose(1, 2)
        z = self._heads(layer, query, key, value, scaling, softcap, sinks)
        return z.transpose(1, 2).flatten(0, 1)[asks][None].contiguous()

    def _heads(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """(job, head, query, head_dim), of all jobs in one call."""
        shared, asked = query.shape[1] // key.shape[1], query.shape[2]
        if softcap is None and sinks is None:
            causal = self.base.order[layer] == "causal" and asked == key.shape[2]
            hidden = None if causal else self._hidden(layer, query)
            if query.is_cuda and (hidden is not None or query.dtype == torch.float32):
                # no fused kernel there repeats heads by itself
                key, value = repeat_heads(key, shared), repeat_heads(value, shared)
            grouped = query.shape[1] > key.shape[1]
            return scaled_dot_product_attention(
                query, key, value, hidden, is_causal=causal, scale=scaling, enable_gqa=grouped
            )
        # query heads that share a key/value head are laid one after another as more queries of it
        query = query.unflatten(1, (-1, shared)).flatten(2, 3)
        hidden = self._hidden(layer, query)
        hidden = None if hidden is None else hidden.repeat(1, 1, shared, 1)
        if sinks is not None:
            sinks = sinks.reshape(-1, shared, 1, 1).expand(-1, -1, asked, 1).flatten(1, 2)
        scores = masked(scores_of(query, key, scaling, softcap), hidden)
        return (softmax_visible(scores, sinks) @ value).unflatten(2, (shared, asked)).flatten(1, 2)

    def _hidden(self, layer: int, query: Tensor) -> Tensor | None:
        """(job or 1, 1, query, key) what is added to scores: -inf, or nearly, where a key is not
        seen; None where all are. Made once for layers whose masks are one tensor."""
        order, mask = self.base.order[layer], self.base.masks[layer]
        if order == "all" or (self.read_only and order == "causal" and self.reads_all):
            return None
        name = (order or id(mask), self.read_only)
        if name not in self.masks:
            if order == "causal":
                mask = query.new_full((self.base.width,) * 2, -torch.inf).triu(1)[None, None]
            assert mask is not None
            if mask.dtype == torch.bool:
                mask = query.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
            each = len(mask) > 1
            if self.read_only:
                example = self.job_example if each else torch.zeros_like(self.job_example)
                self.masks[name] = mask[example, 0, self.reads][:, None, None]
            else:
                mask = mask[:, :, self.low :]
                self.masks[name] = mask[self.job_example] if each else mask
        mask = self.masks[name]
        return mask[: len(query)] if len(mask) > 1 else mask


class _Changes:
    """Changes of one kind in one wave, on the device: the rows they write and what they write."""

    def __init__(self, found: Written, to_row: Tensor | None, device: torch.device) -> None:
        """to_row: (job,) what makes a position of a job its row; None where each has one row."""
        kind = self.kind = found.alike
        row = found.job if to_row is None else found.position + to_row[found.job]
        self.unit = None if kind.unit is None else kind.unit[found.change].to(device)
        self.value, self.at = kind.values[0], torch.empty(0)
        if kind.operation in ALIKE:
            used, change = found.change.unique(return_inverse=True)
            value = kind.value(used, device)
            _, examples, places, *_ = value.shape
            example = kind.row[found.example] if examples > 1 else 0
            at = (change * examples + example) * places + (found.place if places > 1 else 0)
            self.value = value.flatten(0, 2)
            row, self.at = torch.stack([row, at]).to(device)
        self.row = row.to(device)
        # which of them belong to a layer and a rank
        self.parts: dict[int, dict[int, slice]] = {}
        end = 0
        keys = torch.stack([found.layer, found.rank], dim=1).unique_consecutive(
            return_counts=True, dim=0
        )
        for (layer, rank), count in zip(*(x.tolist() for x in keys)):
            self.parts.setdefault(layer, {})[rank] = slice(end, end := end + count)

    def make(self, layer: int, rank: int, x: Tensor) -> None:
        """Make those of one layer and rank in place on x (row, ...)."""
        if (part := self.parts[layer].get(rank)) is None:
            return
        row, value = self.row[part], self.value
        if self.kind.operation in ALIKE:
            value = value[self.at[part]]
        place: tuple[Tensor, ...] = (row,)
        if self.unit is not None:
            place = row[:, None], self.unit[part] % x.shape[1]
        x[place] = OPERATIONS[self.kind.operation](x[place], value).to(x.dtype)
