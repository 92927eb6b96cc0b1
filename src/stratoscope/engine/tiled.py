"""Whole runs side by side: the batch once for each of several cells, in one forward pass.

What packed execution cannot share runs so. Row for row a model says of a tiled batch what it says
of the batch alone, to rounding; where that is not certain, cells run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from stratoscope.engine import outside
from stratoscope.engine.base import Base, answers
from stratoscope.engine.intervene import Intervention
from stratoscope.engine.trace import capture
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.taps import Run
from stratoscope.models.weights import row_independent


def side_by_side(lm: LM, base: Base, rows: int) -> int:
    """How many cells one pass takes, of at most `rows` rows: one where an outer change, a user's
    hook or a quantised layer sees more than its own row, and where inputs are not only tokens."""
    batch = base.batch
    alone = (
        any(edits or reads for edits, reads in lm.taps.listening)
        or outside.foreign_hooks(lm.model)
        or batch.ids is None
        or batch.source is not None
        or bool(batch.extra)
        or not row_independent(lm.model)
    )
    return 1 if alone else max(1, rows // max(1, sum(base.lengths)))


def beside(
    lm: LM,
    batch: Batch,
    cells: Sequence[Sequence[Intervention]],
    metric: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """(cell, example) the metric of each cell, all in one forward pass."""
    examples = torch.arange(len(batch)).repeat(len(cells))
    edits: dict[Site, list[Callable[[Tensor, Run], Tensor]]] = {}
    for site in {change.site: None for cell in cells for change in cell}:
        edits[site] = [partial(_change, batch, [[c for c in cell if c.site == site] for cell in cells])]
    with lm.taps.using(edits=edits):
        said = whole(lm, tiled(batch, len(cells)) if len(cells) > 1 else batch)
    return metric(said, examples).unflatten(0, (len(cells), -1))


def whole(lm: LM, batch: Batch) -> Tensor:
    """(example, output) what the metric is given, by the whole model run as it is now."""
    if lm.readout.kind != "vectors" and outside.reads_out_anew(lm):
        return outside.answers(lm, batch)
    last = f"layers.{lm.dims.layers - 1}.resid_post"
    return answers(lm, capture(lm, batch, last)[last], batch)


def tiled(batch: Batch, times: int) -> Batch:
    """A batch of tokens, several times one after another."""
    assert batch.ids is not None
    again = lambda x: None if x is None else x.repeat(times, 1)  # noqa: E731
    return replace(
        batch,
        ids=again(batch.ids),
        mask=again(batch.mask),
        image=again(batch.image),
        tokens=batch.tokens * times,
    )


def _change(
    batch: Batch, changes: Sequence[Sequence[Intervention]], x: Tensor, run: Run
) -> Tensor:
    """Each cell's changes made on its own rows, as if they were the whole batch."""
    rows = x.chunk(len(changes))
    own = Run(batch)
    done = []
    for part, some in zip(rows, changes):
        for change in some:
            part = change.apply(part, own)
        done.append(part)
    return torch.cat(done)
