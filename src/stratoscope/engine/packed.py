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
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache

from stratoscope.engine import outside
from stratoscope.engine.intervene import OPERATIONS, Intervention
from stratoscope.engine.linear import FastLinear
from stratoscope.engine.select import position_index
from stratoscope.models.attention import (
    looks_ahead,
    masked,
    repeat_heads,
    scores_of,
    seam,
    softmax_visible,
)
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.taps import Run, StopForward
from stratoscope.models.weights import row_independent

# sites whose tensor has one row for each position, so that cells can share a matrix and still be
# edited apart
PACKED_POINTS = frozenset(
    {
        "resid_pre",
        "resid_mid",
        "resid_post",
        "attn.q",
        "attn.k",
        "attn.v",
        "attn.z",
        "attn.out",
        "mlp.pre",
        "mlp.act",
    }
    | {"mlp.out", "mlp.router"}
)


@dataclass(frozen=True, eq=False)  # a job is itself: its changes hold tensors
class Job:
    """A cell on one example: it starts at `layer`, from position `first` on. packed=False: to be
    run naively."""

    cell: int
    example: int
    layer: int
    first: int
    changes: tuple[Intervention, ...]
    packed: bool


Changes = dict[str, list[tuple[Job, Intervention]]]  # by point, the changes made in one layer


@dataclass
class Base:
    """The base run: its metric, and for each layer what enters it, its keys and values, its mask
    and its arguments."""

    batch: Batch
    # what the metric is given: (example, vocab), or (example, dim) of a model without a read-out
    asked: Tensor
    metric: Tensor
    values: dict[Site, Tensor]
    causal: bool
    depth: int
    residual: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)  # (example, kv_head, position, head_dim)
    vals: list[Tensor] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)
    calls: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)
    shareable: bool = True
    width: int = 0  # positions, padding included
    lengths: list[int] = field(default_factory=list)  # of each example
    reads: list[int] = field(
        default_factory=list
    )  # the position of each example that the metric reads
    outer: list[Intervention] = field(
        default_factory=list
    )  # changes made outside the sweep: part of every cell

    def positions(self, change: Intervention, example: int) -> Tensor:
        """The positions that a change names in one example (padding included when it names
        none)."""
        return position_index(
            change.positions, Run(self.batch), len(self.batch), self.width, [example]
        )[example]


def read(lm: LM, resid: Tensor) -> Tensor:
    """(row, dim) final residuals -> (row, output); as they are for a model without a read-out (a
    bare encoder)."""
    return resid if lm.readout.kind == "vectors" else lm.readout(resid)


def answers(lm: LM, resid: Tensor, batch: Batch) -> Tensor:
    """(example, position, dim) final residuals -> (example, output): what the metric is given of
    each example."""
    if lm.readout.kind != "vectors":
        return lm.readout.of(resid, batch)
    return resid[torch.arange(len(batch)), lm.readout.positions(batch)]


def shareable(lm: LM, cell: Sequence[Intervention]) -> bool:
    """Whether a cell can be packed: only sites inside the main stack's layers that have one row for
    each position."""
    return all(
        c.site.tower == "" and c.site.layer is not None and c.site.point in PACKED_POINTS
        for c in cell
    )


def base_run(
    lm: LM, batch: Batch, sites: set[Site], metric: Callable[[Tensor, Tensor], Tensor]
) -> Base:
    """Run the base inputs once, keeping what packed cells start from and the base value at every
    changed site."""
    kept = {
        site
        for site in sites
        if site.tower == "" and site.layer is not None and site.point in PACKED_POINTS
    }
    tower, depth = lm.family.towers[""], lm.dims.layers
    entries = [Site("", layer, "resid_pre") for layer in range(depth)]
    last = Site("", depth - 1, "resid_post")
    base = Base(batch, torch.empty(0), torch.empty(0), {}, tower.causal, depth)
    reads = {site: [partial(_keep, base, site)] for site in {*kept, *entries, last}}
    anew = lm.readout.kind != "vectors" and outside.reads_out_anew(lm)
    if not (
        anew or any(heard for _, heard in lm.taps.listening)
    ):  # nobody waits for the logits of every position
        reads[last].append(_stop)
    with lm.taps.using(reads=reads):
        whole = outside.answers(lm, batch) if anew else lm(batch)
    base.asked = whole if anew else answers(lm, base.values[last], batch)
    base.metric = metric(base.asked, torch.arange(len(batch)))
    base.residual = [base.values[entry] for entry in entries]
    base.width = base.residual[0].shape[1]
    base.lengths = [base.width] * len(batch) if batch.mask is None else batch.lengths.tolist()
    outer, single = outside.changes(lm), lm.readout.single
    base.reads = lm.readout.positions(batch).tolist() if single else []
    base.shareable = (
        lm.layout.packable and single and not anew and outer is not None and shareable(lm, outer)
    )
    base.shareable = base.shareable and row_independent(lm.model)
    if tower.between and batch.extra:  # what is added between two layers is no part of either
        base.shareable = False
    if base.shareable:
        base.outer = outer or []
        _note_layers(lm, base, entries)
    return base


def _note_layers(lm: LM, base: Base, entries: Sequence[Site]) -> None:
    """A second pass, for keys, values and the layers' arguments.

    The values above come from the model's own kernel, as the user's captures do: only then is a
    replacement that changes nothing equal bit for bit.
    """
    with outside.unheard(lm), lm.taps.using(), ExitStack() as stack:
        for layer in lm.layout.layers[""]:
            hook = layer.register_forward_pre_hook(partial(_note_call, base), with_kwargs=True)
            stack.callback(hook.remove)
        attentions = [lm.layout.attention(entry) for entry in entries]
        stack.enter_context(
            seam(lm.model, {}, dict.fromkeys(attentions, partial(_note_attention, base)))
        )
        lm(base.batch)
    once = (
        len(base.calls) == len(base.keys) == base.depth
    )  # not so where a layer's attention is left out
    base.shareable = once and all(_can_gather(base, layer) for layer in range(base.depth))


def _keep(base: Base, site: Site, x: Tensor, run: Run) -> None:
    base.values[site] = x.detach().clone()


def _stop(x: Tensor, run: Run) -> None:
    raise StopForward


def _note_call(base: Base, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    base.calls.append(beside_the_stream(args, kwargs))


def beside_the_stream(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """What a layer is called with beside the stream; without a cache, to which other rows would be
    appended."""
    given = ("hidden_states", "use_cache", "cache", "layer_past")
    rest = tuple(None if isinstance(x, Cache) else x for x in args[1:])
    return rest, {k: x for k, x in kwargs.items() if k not in given and not isinstance(x, Cache)}


def _note_attention(
    base: Base,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float,
    cap: float | None,
    sinks: Tensor | None,
):
    base.keys.append(k)
    base.vals.append(v)
    base.masks.append(mask)
    base.causal = base.causal and not looks_ahead(mask)
    groups = q.shape[1] // k.shape[1]
    scores = masked(scores_of(q, repeat_heads(k, groups), scaling, cap), mask)
    pattern = softmax_visible(scores, None if sinks is None else sinks.reshape(1, -1, 1, 1))
    return (pattern @ repeat_heads(v, groups)).transpose(1, 2).contiguous()


def _can_gather(base: Base, layer: int) -> bool:
    """Whether every tensor the layer is called with is one of those `_gather` knows how to give to
    single rows, and its attention has one mask for all heads (BEiT adds a bias of relative
    positions to each head's)."""
    mask = base.masks[layer]
    if mask is not None and mask.shape[1] > 1:
        return False
    zero = torch.zeros(1, dtype=torch.long)
    args, kwargs = base.calls[layer]
    try:
        _gather((args, kwargs), base, layer, zero, zero)
    except ValueError:
        return False
    return True


def _gather(x: Any, base: Base, layer: int, example: Tensor, position: Tensor) -> Any:
    """A layer argument of the base run, for rows at (example, position). Raises ValueError for an
    unknown shape."""
    if isinstance(x, dict):
        return {name: _gather(value, base, layer, example, position) for name, value in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)(_gather(value, base, layer, example, position) for value in x)
    if not isinstance(x, Tensor):
        return x
    mask, width = base.masks[layer], base.width
    if mask is not None and x.shape == mask.shape and x.data_ptr() == mask.data_ptr():
        return None  # attention of packed rows masks by itself
    rows = (1, len(base.batch))
    if (
        x.ndim >= 3 and x.shape[-2] == width and x.shape[-3] in rows
    ):  # rotary cos and sin: (..., example, position, dim)
        return x[
            ..., example if x.shape[-3] > 1 else torch.zeros_like(example), position, :
        ].unsqueeze(-3)
    if x.ndim == 2 and x.shape[1] == width and x.shape[0] in rows:  # position ids
        return x[example if x.shape[0] > 1 else torch.zeros_like(example), position][None]
    if x.ndim == 1 and x.shape[0] == width:
        return x[position]
    raise ValueError(f"a layer argument of shape {tuple(x.shape)} cannot be given to single rows")


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
        self.groups: list[
            tuple[int, int, int, int]
        ] = []  # example, first position, first row, how many jobs

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
            chunks = zip(
                at.split(256), examples.split(256)
            )  # logits are wide: never for all jobs at once
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
            Site("", layer, point): [partial(self._edit, found)] for point, found in changes.items()
        }
        args, kwargs = _gather(
            self.base.calls[layer], self.base, layer, self.example, self.position
        )
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
        kept = torch.tensor(
            [self.start[job] + n for job, n in zip(ordered, own)], device=self.rows.device
        )
        self.rows, self.example, self.position = (
            self.rows[kept],
            self.example[kept],
            self.position[kept],
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
        found: Changes = {}
        for job in self.start:
            for change in job.changes:
                if change.site.layer == layer:
                    found.setdefault(change.site.point, []).append((job, change))
        return found

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
            if change.operation in ("replace", "add", "scale"):
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
        found = []
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
            query = query.unflatten(1, (-1, shared)).flatten(
                2, 3
            )  # job, kv_head, (shared, own), head_dim
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
            z = z.unflatten(2, (shared, -1)).permute(
                0, 3, 1, 2, 4
            )  # job, own, kv_head, shared, head_dim
            found.append(z.reshape(-1, q.shape[1], v.shape[-1]))
        return torch.cat(found)[None]


def _by_job(x: Tensor, rows: slice, jobs: int) -> Tensor:
    """(1, head, row, head_dim) -> the rows of one group as (job, head, own, head_dim)."""
    return x[0, :, rows].unflatten(1, (jobs, -1)).transpose(0, 1)
