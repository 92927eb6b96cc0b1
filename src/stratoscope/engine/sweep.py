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
changed scores or patterns, an unknown argument) it is not taken: such cells run naively. `naive` is
the reference that tests compare every cell with.

Inside an outer change (`with intervene(...)`, `with edit:`, a forward hook of the user's) that
change is part of the base run and of every cell: packed rows get the outer interventions before the
cell's own, and where one of them cannot be made on rows (scores, patterns, what follows the last
layer, a hook), all cells run naively. An outer `trace` sees the base run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stratoscope.engine import outside
from stratoscope.engine.base import Base, Job, answers, base_run, shareable
from stratoscope.engine.intervene import Intervention, intervene, resolve
from stratoscope.engine.memory import available, predicted, refuse_above
from stratoscope.engine.packed import Wave
from stratoscope.engine.resume import fingerprint, read, write
from stratoscope.engine.trace import Trace, capture
from stratoscope.errors import InputError
from stratoscope.models import finite
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.taps import Run

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
    waves: list[list[Job]]
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
    seen: Trace | None = None,
) -> Tensor:
    """metric of every cell on every example: (cell, example).

    Each cell is applied alone to the base run on `inputs`. budget: bytes that rows in flight may
    take (default a quarter of what is free). save: a file that keeps what is finished; an
    interrupted sweep given the same file goes on from there. progress: called with (results done,
    results in all). seen: a trace of the same Batch under the same changes; what it holds is not
    run again. Raises MemoryRefusal when the base run would not fit, InputError when the
    metric is not a number somewhere (and says where), ResultError when `save` holds another sweep.
    """
    batch = lm.batch(inputs)
    table = [resolve(lm, [cell] if isinstance(cell, Intervention) else cell) for cell in cells]
    _refuse_too_large(lm, batch)
    base = base_run(lm, batch, {change.site for cell in table for change in cell}, metric, seen)
    finite.refuse({"the metric of the base run": base.metric})
    plan, jobs = _plan(lm, base, table, budget)
    key = fingerprint(lm, base, table, metric) if save else ""
    result = read(Path(save), key, (len(table), len(batch))) if save else None
    if result is None:
        result = torch.full((len(table), len(batch)), torch.nan).to(base.metric)
        changing = {(job.cell, job.example) for job in jobs}
        for place in ((c, e) for c in range(len(table)) for e in range(len(batch))):
            if place not in changing:
                result[place] = base.metric[place[1]]
    with outside.unheard(lm):
        for finished in _pieces(lm, base, table, plan, jobs, metric, result):
            for number, example, value in finished:
                result[number, example] = value
                _refuse_nan(value, table[number], number, example)
            if save:
                write(Path(save), key, result)
            if progress:
                progress(int(result.isfinite().sum()), result.numel())
    return result


def _pieces(
    lm: LM,
    base: Base,
    table: Sequence[Sequence[Intervention]],
    plan: Plan,
    jobs: Sequence[Job],
    metric: Metric,
    result: Tensor,
) -> Iterator[list[tuple[int, int, Tensor]]]:
    """What is not finished, piece by piece: waves of packed cells by layer, then naive cells.
    (cell, example, metric)."""
    for wave in plan.waves:
        left = [job for job in wave if not result[job.cell, job.example].isfinite()]
        if left:
            values = Wave(lm, base, left).run(metric)
            yield [(job.cell, job.example, value) for job, value in zip(left, values)]
    for number in sorted({job.cell for job in jobs if not job.packed}):
        if not result[number].isfinite().all():
            yield [
                (number, e, v)
                for e, v in enumerate(_naive_cell(lm, base.batch, table[number], metric))
            ]


def _refuse_nan(value: Tensor, cell: Sequence[Intervention], number: int, example: int) -> None:
    if not value.isfinite():
        which = " and ".join(
            f"{c.operation} at {c.site} (positions {c.positions}, units {c.units})" for c in cell
        )
        raise InputError(
            f"the metric is {float(value)} for cell {number}, example {example}: {which}. Look at "
            "the value put there, or "
            f"at a metric that divides by zero."
        )


def _refuse_too_large(lm: LM, batch: Batch) -> None:
    """The base run keeps what enters every layer, and every layer's keys and values."""
    sites = [
        Site("", layer, p)
        for layer in range(lm.dims.layers)
        for p in ("resid_pre", "attn.k", "attn.v")
    ]
    advice = "sweep fewer or shorter prompts at once (the example and position axes)"
    refuse_above(
        predicted(lm, sites, batch),
        available(lm.model.device),
        "the base run of this sweep",
        advice,
    )


@torch.no_grad()
def plan(lm: LM, inputs: Any, cells: Sequence[Cell], *, budget: int | None = None) -> Plan:
    """What `sweep` would do, without running the cells."""
    table = [resolve(lm, [cell] if isinstance(cell, Intervention) else cell) for cell in cells]
    sites = {change.site for cell in table for change in cell}
    with outside.unheard(lm):
        base = base_run(lm, lm.batch(inputs), sites, lambda logits, example: logits[:, 0])
        return _plan(lm, base, table, budget)[0]


@torch.no_grad()
def naive(lm: LM, inputs: Any, cells: Sequence[Cell], metric: Metric) -> Tensor:
    """The same numbers as `sweep`, by one whole forward pass for each cell: (cell, example)."""
    batch = lm.batch(inputs)
    table = [resolve(lm, [cell] if isinstance(cell, Intervention) else cell) for cell in cells]
    return torch.stack([_naive_cell(lm, batch, cell, metric) for cell in table])


def _naive_cell(lm: LM, batch: Batch, cell: Sequence[Intervention], metric: Metric) -> Tensor:
    last = f"layers.{lm.dims.layers - 1}.resid_post"
    examples = torch.arange(len(batch))
    with intervene(lm, *cell):
        if lm.readout.kind != "vectors" and outside.reads_out_anew(lm):
            return metric(outside.answers(lm, batch), examples)
        final = capture(lm, batch, last)[last]
    return metric(answers(lm, final, batch), examples)


def _plan(
    lm: LM, base: Base, table: Sequence[Sequence[Intervention]], budget: int | None
) -> tuple[Plan, list[Job]]:
    lengths = base.lengths
    jobs: list[Job] = []
    for number, cell in enumerate(table):
        if (
            base.shareable
            and shareable(lm, cell)
            and all(change.site in base.values for change in cell)
        ):
            # made once on the base values: refuses what does not fit, and shows which rows a
            # replacement really changes
            made = [
                (change, change.apply(base.values[change.site], Run(base.batch))) for change in cell
            ]
            made_jobs = [_job(base, number, example, made) for example in range(len(lengths))]
            jobs += [job for job in made_jobs if job is not None]
        else:
            jobs += [Job(number, example, 0, 0, (), False) for example in range(len(lengths))]
    packed_jobs = sorted((j for j in jobs if j.packed), key=lambda j: (j.layer, j.first))
    cap = _row_cap(lm, budget)
    waves: list[list[Job]] = []
    rows = cap
    for job in packed_jobs:
        size = lengths[job.example] - job.first
        if rows + size > cap:
            waves.append([])
            rows = 0
        waves[-1].append(job)
        rows += size
    depth = lm.dims.layers
    live = sum((lengths[j.example] - j.first) * (depth - j.layer) for j in packed_jobs)
    whole = len(table) * depth * sum(lengths)
    slow = {j.cell for j in jobs if not j.packed}
    results = len(table) * len(lengths)
    skipped = results - len(packed_jobs) - len(slow) * len(lengths)
    live += len(slow) * depth * sum(lengths)
    return Plan(results, skipped, len(slow) * len(lengths), waves, cap, whole, live), jobs


def _job(
    base: Base, cell: int, example: int, made: Sequence[tuple[Intervention, Tensor]]
) -> Job | None:
    """One cell on one example, begun at the first layer and position it really changes; None when
    it changes nothing.

    A replacement equal to the base value starts nothing, but is kept once something before it has
    changed.
    """
    length = base.lengths[example]
    first, start = length, base.depth
    here = [pair for pair in made if _concerns(pair[0], example)]
    for change, after in here:
        index = base.positions(change, example)
        rows = index[index < length].unique()
        if change.operation == "replace":
            differs = (base.values[change.site] != after)[example][rows]
            rows = rows[differs.flatten(1).any(dim=1).cpu()]
        if len(rows):
            first, start = min(first, int(rows[0])), min(start, int(change.site.layer))
    if start == base.depth:
        return None
    own = [change for change, _ in here if int(change.site.layer) >= start]
    outer = [
        change for change in base.outer if _concerns(change, example) and _follows(change, start)
    ]
    return Job(cell, example, start, first if base.causal else 0, (*outer, *own), True)


def _follows(outer: Intervention, start: int) -> bool:
    """Whether an outer change must be made again on rows that start from what enters layer `start`
    in the base run."""
    layer = int(outer.site.layer)
    return layer > start or (layer == start and outer.site.point != "resid_pre")


def _concerns(change: Intervention, example: int) -> bool:
    """Whether a change acts on this example in a single forward pass, which is step 0."""
    return (change.examples is None or example in change.examples) and (
        change.steps is None or 0 in change.steps
    )


def _row_cap(lm: LM, budget: int | None) -> int:
    """Rows in flight: what the budget holds, and no more than keeps a layer's matrices in cache
    (measured: bench)."""
    dims = lm.dims
    budget = available(lm.model.device) // 4 if budget is None else budget
    bytes_per_row = 4 * (
        6 * dims.dim + 4 * max(dims.neurons, dims.dim) + 3 * dims.heads * dims.head_dim
    )
    on_cpu = lm.model.device.type == "cpu"
    most = 4096 if on_cpu else 65536
    if budget < bytes_per_row:
        raise InputError(
            f"budget {budget} bytes holds no row: one row takes about {bytes_per_row} bytes."
        )
    return max(1, min(most, budget // bytes_per_row))
