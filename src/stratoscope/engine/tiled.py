"""Whole runs side by side: the batch once for each of several cells, in one forward pass.

What packed execution cannot share runs so. Row for row a model says of a tiled batch what it says
of the batch alone, to rounding; where that is not certain, cells run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


def side_by_side(
    lm: LM, base: Base, table: Sequence[Sequence[Intervention]], cells: Sequence[int], rows: int
) -> Iterator[list[int]]:
    """The cells in groups that one pass takes, of at most `rows` rows.

    A cell is alone where an outer change, a user's hook or a quantised layer may see more than its
    own example, where what belongs to an example is not known, or where it changes a tower that
    lays all pictures in one row.
    """
    alone = bool(cells) and (
        any(edits or reads for edits, reads in lm.taps.listening)
        or any(outside.foreign_hooks(lm.model))
        or not _by_example(base.batch)
        or not row_independent(lm.model)
    )
    many = 1 if alone else max(1, rows // max(1, sum(base.lengths)))
    text = [n for n in cells if not any(c.site.tower or c.site.source for c in table[n])]
    text = [n for n in text if all(c.site.point != "projector" for c in table[n])]
    for begin in range(0, len(text), many):
        yield text[begin : begin + many]
    yield from ([number] for number in cells if number not in set(text))


def _by_example(batch: Batch) -> bool:
    """Whether every input lies along its first axis example by example."""
    known = all(name in _BY_EXAMPLE and len(x) % len(batch) == 0 for name, x in batch.extra.items())
    return known and (batch.source is None or _by_example(batch.source))


_BY_EXAMPLE = frozenset(
    {"token_type_ids", "mm_token_type_ids", "inputs_embeds", "pixel_values", "image_grid_thw"}
    | {"pixel_attention_mask", "image_sizes", "input_features", "input_values"}
)


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
        here = [[change for change in cell if change.site == site] for cell in cells]
        edits[site] = [partial(_change, batch, here)]
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
    """A batch, several times one after another."""
    again = lambda x: None if x is None else torch.cat([x] * times)  # noqa: E731
    return replace(
        batch,
        ids=again(batch.ids),
        mask=again(batch.mask),
        image=again(batch.image),
        extra={name: torch.cat([x] * times) for name, x in batch.extra.items()},
        tokens=batch.tokens * times,
        source=None if batch.source is None else tiled(batch.source, times),
    )


def _change(batch: Batch, changes: Sequence[Sequence[Intervention]], x: Tensor, run: Run) -> Tensor:
    """Each cell's changes made on its own rows, as if they were the whole batch."""
    own, parts = Run(batch), list(x.chunk(len(changes)))
    for number, some in enumerate(changes):
        for change in some:
            parts[number] = change.apply(parts[number], own)
    return torch.cat(parts)
