"""`sweep`: the effect of many interventions, each alone, on one metric, exactly and with the shared
work done once.

A cell is one intervention (or several made together). The naive way runs the whole model for each
cell. Here

  start   a cell begins at the first layer it changes, from the residual stream of the base run;
  suffix  in a causal model only positions from the first changed one on are computed; before it
          the base run's keys and
          values are read;
  pack    the live rows of many cells form one matrix, so that each layer is a few large products;
  skip    a replacement that equals the base value bit for bit is dropped; a cell with none left is
          the base result;
  read    logits only at the positions the metric reads.

The rows pass through the Hugging Face layers themselves; only attention, which must keep cells
apart, is computed here, through the seam. Where one of these steps would not be exact (no seam,
changed scores or patterns, an unknown argument) it is not taken: such cells are whole runs, many
side by side in one pass. `naive` is the reference that tests compare every cell with.

Inside an outer change (`with intervene(...)`, `with edit:`, a forward hook of the user's) that
change is part of the base run and of every cell: packed rows get the outer interventions before the
cell's own, and where one of them cannot be made on rows (scores, patterns, what follows the last
layer, a hook), all cells are whole runs, one by one. An outer `trace` sees the base run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratoscope.engine import outside
from stratoscope.engine.base import Base, base_run, shareable
from stratoscope.engine.intervene import Intervention, intervene, resolve_cells
from stratoscope.engine.jobs import Alike, Jobs, planned
from stratoscope.engine.memory import available, predicted, refuse_above
from stratoscope.engine.packed import Wave
from stratoscope.engine.resume import fingerprint, read, write
from stratoscope.engine.tiled import beside, side_by_side, whole
from stratoscope.errors import InputError, MemoryRefusal
from stratoscope.models import finite
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site

# metric(logits (row, output), example (row,)) -> (row,). The logits are those of each row's last
# real token, or what a classifier or reward model says of its prompt or picture (`lm.readout`). A
# model without a read-out (a bare encoder) gives the last layer's residual (row, dim) instead.
Metric = Callable[[Tensor, Tensor], Tensor]
Cell = Intervention | Sequence[Intervention]
Progress = Callable[[int, int], None]


@dataclass
class Plan:
    """How a sweep will run: which cells are skipped, packed and naive, and how many rows a wave
    carries."""

    cells: int
    skipped: int
    naive: int
    waves: list[Jobs]
    rows_per_wave: int
    naive_rows: int
    packed_rows: int

    def explain(self) -> str:
        """One line a person can read."""
        shared = 1 - self.packed_rows / max(self.naive_rows, 1)
        return (
            f"{self.cells} results: {self.skipped} equal the base run, {self.naive} run naively, "
            "the others in "
            f"{len(self.waves)} waves of at most {self.rows_per_wave} rows; {shared:.0%} of the "
            "naive work is shared."
        )


@torch.no_grad()
def sweep(
    lm: LM,
    inputs: Any,
    cells: Sequence[Cell],
    metric: Metric,
    *,
    budget: int | None = None,
    save: str | Path | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """metric of every cell on every example: (cell, example).

    Each cell is applied alone to the base run on `inputs`. budget: bytes that rows in flight may
    take (default a quarter of what is free). save: a file that keeps what is finished; an
    interrupted sweep given the same file goes on from there. progress: called with (results done,
    results in all). Raises MemoryRefusal when the base run would not fit, InputError when the
    metric is not a number somewhere (and says where), ResultError when `save` holds another sweep.
    """
    batch = lm.batch(inputs)
    table = resolve_cells(lm, cells)
    _refuse_too_large(lm, batch)
    with lm.taps.using():  # once for all passes
        return _sweep(lm, batch, table, metric, budget, save and Path(save), progress)


def _sweep(
    lm: LM,
    batch: Batch,
    table: Sequence[Sequence[Intervention]],
    metric: Metric,
    budget: int | None,
    save: Path | None,
    progress: Progress | None,
) -> Tensor:
    base = base_run(lm, batch, {change.site for cell in table for change in cell}, metric)
    finite.refuse({"the metric of the base run": base.metric})
    todo = _planned(lm, base, table, budget)
    key = fingerprint(lm, base, table, metric) if save else ""
    result = read(save, key, (len(table), len(batch))) if save else None
    if result is None:
        result = base.metric.expand(len(table), -1).clone()
        for jobs in todo.waves:
            result[jobs.cell, jobs.example] = torch.nan
        result[todo.alone] = torch.nan
    with outside.unheard(lm):
        for cell, example, values in _pieces(lm, base, table, todo, metric, result):
            result[cell, example] = values
            _refuse_nan(values, table, cell, example)
            if save:
                write(save, key, result)
            if progress:
                progress(int(result.isfinite().sum()), result.numel())
    return result


@dataclass
class _Todo:
    """The work of a sweep: packed jobs wave by wave, and the cells that are run alone."""

    waves: list[Jobs]
    kinds: list[Alike]
    alone: list[int]
    rows: int
    budget: int


def _pieces(
    lm: LM,
    base: Base,
    table: Sequence[Sequence[Intervention]],
    todo: _Todo,
    metric: Metric,
    result: Tensor,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What is not finished, piece by piece: waves of packed cells by layer, then the others, as
    many side by side as fit. (cell, example, metric), one number each."""
    for jobs in todo.waves:
        jobs = jobs[~result[jobs.cell, jobs.example].isfinite().cpu()]
        if len(jobs):
            yield jobs.cell, jobs.example, _run(lm, base, jobs, todo.kinds, metric)
    unfinished = ~result.isfinite().all(dim=1).cpu()
    alone = [cell for cell in todo.alone if unfinished[cell]]
    examples = len(base.batch)
    for numbers in side_by_side(lm, base, table, alone, todo.rows):
        some = torch.tensor(numbers)
        values = beside(lm, base.batch, [table[cell] for cell in numbers], metric)
        yield (
            some.repeat_interleave(examples),
            torch.arange(examples).repeat(len(some)),
            values.flatten(),
        )


def _run(lm: LM, base: Base, jobs: Jobs, kinds: Sequence[Alike], metric: Metric) -> Tensor:
    """(job,) A wave, or its two halves where the device has no room for it. Raises MemoryRefusal
    where these have none either."""
    with suppress(torch.OutOfMemoryError):
        return Wave(lm, base, jobs, kinds).run(metric)
    half = max(1, len(jobs) // 2)
    try:
        halves = [jobs[slice(half)], jobs[slice(half, len(jobs))]]
        return torch.cat([Wave(lm, base, some, kinds).run(metric) for some in halves if len(some)])
    except torch.OutOfMemoryError as error:
        raise MemoryRefusal(
            f"{half} cells at once do not fit into the device's memory: give a smaller `budget` "
            "(bytes that rows in flight may take), or sweep fewer or shorter prompts at once."
        ) from error


def _refuse_nan(
    values: Tensor, table: Sequence[Sequence[Intervention]], cells: Tensor, examples: Tensor
) -> None:
    wrong = ~values.isfinite()
    if not bool(wrong.any()):
        return
    at = int(wrong.nonzero()[0, 0])
    number, example = int(cells[at]), int(examples[at])
    which = " and ".join(
        f"{c.operation} at {c.site} (positions {c.positions}, units {c.units})"
        for c in table[number]
    )
    raise InputError(
        f"the metric is {float(values[at])} for cell {number}, example {example}: {which}. Look at "
        "the value put there, or "
        f"at a metric that divides by zero."
    )


def _refuse_too_large(lm: LM, batch: Batch) -> None:
    """The base run keeps what enters every layer, and every layer's keys and values."""
    each = predicted(lm, [Site("", 0, p) for p in ("resid_pre", "attn.k", "attn.v")], batch)
    advice = "sweep fewer or shorter prompts at once (the example and position axes)"
    free = available(lm.model.device)
    refuse_above(lm.dims.layers * each, free, "the base run of this sweep", advice)


@torch.no_grad()
def plan(lm: LM, inputs: Any, cells: Sequence[Cell], *, budget: int | None = None) -> Plan:
    """What `sweep` would do, without running the cells."""
    table = resolve_cells(lm, cells)
    sites = {change.site for cell in table for change in cell}
    with outside.unheard(lm):
        base = base_run(lm, lm.batch(inputs), sites, lambda logits, example: logits[:, 0])
        todo = _planned(lm, base, table, budget)
    lengths, depth = torch.tensor(base.lengths), lm.dims.layers
    packed = sum(
        int(((lengths[jobs.example] - jobs.first) * (depth - jobs.layer)).sum())
        for jobs in todo.waves
    )
    each = depth * sum(base.lengths)
    results, alone = len(table) * len(lengths), len(todo.alone)
    return Plan(
        cells=results,
        skipped=results - sum(map(len, todo.waves)) - alone * len(lengths),
        naive=alone * len(lengths),
        waves=todo.waves,
        rows_per_wave=todo.rows,
        naive_rows=len(table) * each,
        packed_rows=packed + alone * each,
    )


@torch.no_grad()
def naive(lm: LM, inputs: Any, cells: Sequence[Cell], metric: Metric) -> Tensor:
    """The same numbers as `sweep`, by one whole forward pass for each cell: (cell, example)."""
    batch = lm.batch(inputs)
    table = resolve_cells(lm, cells)
    return torch.stack([_naive_cell(lm, batch, cell, metric) for cell in table])


def _naive_cell(lm: LM, batch: Batch, cell: Sequence[Intervention], metric: Metric) -> Tensor:
    with intervene(lm, *cell):
        return metric(whole(lm, batch), torch.arange(len(batch)))


def _planned(
    lm: LM, base: Base, table: Sequence[Sequence[Intervention]], budget: int | None
) -> _Todo:
    packed = [
        number
        for number, cell in enumerate(table)
        if base.shareable
        and shareable(lm, cell)
        and all(change.site in base.values for change in cell)
    ]
    alone = sorted(set(range(len(table))) - set(packed))
    free = available(lm.model.device) // 4 if budget is None else budget
    rows = _row_cap(lm, free)
    jobs, kinds = planned(base, table, packed)
    return _Todo(_waves(lm, base, jobs, rows, free), kinds, alone, rows, free)


def _waves(lm: LM, base: Base, jobs: Jobs, rows: int, budget: int) -> list[Jobs]:
    """The jobs in their order, cut where the next one would not fit."""
    if not len(jobs):
        return []
    size = torch.tensor(base.lengths)[jobs.example] - jobs.first
    own = size * _bytes_of_row(lm) + base.width * _bytes_of_place(lm)
    cost = torch.maximum(size / rows, own / budget).double().cumsum(0)
    waves, begin = [], 0
    while begin < len(jobs):
        full = (cost[begin - 1] if begin else 0) + 1 + 1e-9
        end = max(begin + 1, int(torch.searchsorted(cost, full, right=True)))
        waves.append(jobs[slice(begin, end)])
        begin = end
    return waves


def _bytes_of_row(lm: LM) -> int:
    """What one row takes inside a layer."""
    dims = lm.dims
    widths = 6 * dims.dim + 4 * max(dims.neurons, dims.dim) + 3 * dims.heads * dims.head_dim
    return max(2, lm.model.dtype.itemsize) * widths


def _bytes_of_place(lm: LM) -> int:
    """What one position of a job takes in attention, live or not: keys, values, queries, z."""
    dims = lm.dims
    widths = 2 * (dims.kv_heads + dims.heads) * dims.head_dim
    return max(2, lm.model.dtype.itemsize) * widths


def _row_cap(lm: LM, budget: int) -> int:
    """Rows in flight: what the budget holds, and no more than keeps a layer's matrices in cache
    (measured: bench)."""
    on_cpu, each = lm.model.device.type == "cpu", _bytes_of_row(lm)
    most = max(4096, 4096 * 512 // max(lm.dims.dim, 1)) if on_cpu else 65536
    if budget < each:
        raise InputError(f"budget {budget} bytes holds no row: one row takes about {each} bytes.")
    return max(1, min(most, budget // each))
