"""What packed execution has to do, worked out as tensors: which cells change which examples, where
each begins, and what is written into which row.

A *job* is one cell on one example. Changes that differ only in their layer, position, unit and
value are alike, and are planned as one: a sweep of thousands of cells is a few `Alike`, and a layer
of a wave is a few indexed writes. All that is counted here stands on the host; values stay where
they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stratoscope.engine.base import Base
from stratoscope.engine.intervention import ALIKE, Intervention
from stratoscope.engine.select import as_index
from stratoscope.models.run import Run
from stratoscope.models.sites import Site

_AT_ONCE = 2**26  # numbers compared at once with the base run's
_RANKS = 2**20  # more changes at one site than any cell makes
_OUTER = -1  # the cell of a change that is made outside the sweep


@dataclass(frozen=True)
class Jobs:
    """Cells on examples that are run packed, one number of each on the host: they begin at `layer`,
    from position `first` on. Sorted by both."""

    cell: Tensor
    example: Tensor
    layer: Tensor
    first: Tensor

    def __len__(self) -> int:
        return len(self.cell)

    def __getitem__(self, which: slice | Tensor) -> Jobs:
        return Jobs(self.cell[which], self.example[which], self.layer[which], self.first[which])


@dataclass(frozen=True)
class Alike:
    """Changes of one kind at one point of the layers.

    cell: (change,), -1 for a change made outside the sweep, which is part of every cell. rank:
    (change,) how many changes at its site are made before it. position: (change, example, place).
    unit: (change, unit), or None for all. concerned: (example,) whether it acts on an example. row:
    (example,) which row of the values is an example's. values: of each change, from the selection's
    own axes; one for all where the operation takes no tensor like the selection.
    """

    point: str
    operation: str
    cell: Tensor
    layer: Tensor
    rank: Tensor
    position: Tensor
    unit: Tensor | None
    concerned: Tensor
    row: Tensor
    values: Sequence[Tensor]

    def value(self, which: Tensor, device: torch.device) -> Tensor:
        """(change, example or 1, place or 1, ...) the values of some changes."""
        return torch.stack([self.values[number] for number in which.tolist()]).to(device)


@dataclass(frozen=True)
class Written:
    """Where changes of one kind are made in a wave: for each row that is written the job and its
    position, and which change it is, of which example and place. Sorted by layer, then rank."""

    alike: Alike
    job: Tensor
    change: Tensor
    example: Tensor
    place: Tensor
    position: Tensor
    layer: Tensor
    rank: Tensor


def planned(
    base: Base, table: Sequence[Sequence[Intervention]], numbers: Sequence[int]
) -> tuple[Jobs, list[Alike]]:
    """The jobs of the cells `numbers` of a table, and the changes they make.

    A replacement equal to the base value, bit for bit, begins nothing, but is kept once something
    before it has changed. Raises InputError for a change that does not fit the base run.
    """
    kinds = _alike(base, table, numbers)
    examples, after = len(base.lengths), base.width
    first = torch.full((len(table), examples), after)
    start = torch.full((len(table), examples), base.depth)
    for alike, differs in zip(kinds, _differing(base, kinds)):
        moved = _real(base, alike) if differs is None else _real(base, alike) & differs
        cells = alike.cell[:, None].expand(-1, examples)
        begins = torch.where(moved, alike.position, after).amin(dim=2)
        layers = torch.where(moved.any(dim=2), alike.layer[:, None], base.depth)
        first.scatter_reduce_(0, cells, begins, "amin")
        start.scatter_reduce_(0, cells, layers, "amin")
    cell, example = (start < base.depth).nonzero(as_tuple=True)
    first = first if base.causal else torch.zeros_like(first)
    jobs = Jobs(cell, example, start[cell, example], first[cell, example])
    jobs = jobs[(jobs.layer * (after + 1) + jobs.first).argsort(stable=True)]
    outer = [_kind(base, [(_OUTER, change, rank)]) for change, rank in _ranked(base.outer)]
    return jobs, outer + kinds


def written(
    base: Base, jobs: Jobs, kinds: Sequence[Alike], *, read_only: bool = False
) -> Iterator[Written]:
    """What the jobs' changes write. read_only: in the last layer's second half, where of each job
    only the position that is read is left."""
    cells = torch.full((int(jobs.cell.max()) + 1, len(base.lengths)), -1)
    cells[jobs.cell, jobs.example] = torch.arange(len(jobs))
    reads, lengths = torch.tensor(base.reads), torch.tensor(base.lengths)
    for alike in kinds:
        job, change = _who(alike, jobs, cells)
        example = jobs.example[job]
        position = alike.position[change, example]
        low = reads[example] if read_only else jobs.first[job]
        high = low + 1 if read_only else lengths[example]
        inside = (position >= low[:, None]) & (position < high[:, None])
        entry, place = inside.nonzero(as_tuple=True)
        job, change, example = job[entry], change[entry], example[entry]
        layer, rank = alike.layer[change], alike.rank[change]
        order = (layer * _RANKS + rank).argsort(stable=True)
        parts = (job, change, example, place, position[entry, place], layer, rank)
        if len(order):
            yield Written(alike, *(part[order] for part in parts))


def _who(alike: Alike, jobs: Jobs, cells: Tensor) -> tuple[Tensor, Tensor]:
    """The jobs that a kind's changes are part of, and which change it is of each."""
    if int(alike.cell[0]) == _OUTER:  # part of all jobs that begin before it
        layer, at_entry = int(alike.layer[0]), alike.point == "resid_pre"
        after = jobs.layer < layer if at_entry else jobs.layer <= layer
        job = (after & alike.concerned[jobs.example]).nonzero()[:, 0]
        return job, torch.zeros_like(job)
    known = (alike.cell < len(cells))[:, None]
    job = torch.where(known, cells[alike.cell.clamp_max(len(cells) - 1)], -1)
    begun = jobs.layer[job.clamp_min(0)] <= alike.layer[:, None]
    change, example = ((job >= 0) & alike.concerned & begun).nonzero(as_tuple=True)
    return job[change, example], change


# --- which changes are alike ----------------------------------------------------------------------


def _alike(
    base: Base, table: Sequence[Sequence[Intervention]], numbers: Sequence[int]
) -> list[Alike]:
    before = Counter(change.site for change in base.outer)
    together: dict[tuple, list[tuple[int, Intervention, int]]] = {}
    for number in numbers:
        cell = table[number]
        for change, rank in _ranked(cell) if len(cell) > 1 else ((c, 0) for c in cell):
            row = (number, change, rank + before[change.site])
            together.setdefault(_key(change), []).append(row)
    return [_kind(base, rows) for rows in together.values()]


def _ranked(changes: Sequence[Intervention]) -> Iterator[tuple[Intervention, int]]:
    """Each change with how many stand before it at its site."""
    seen: Counter[Site] = Counter()
    for change in changes:
        yield change, seen[change.site]
        seen[change.site] += 1


def _key(change: Intervention) -> tuple:
    """What changes that are planned as one have in common."""
    positions = change.positions
    if not (positions is None or type(positions) is int):
        positions = as_index(positions).shape
    elif positions is not None:
        positions = int
    value = change.value
    own = (
        (value.shape, value.dtype, value.device)
        if change.operation in ALIKE
        else tuple(value.tolist())
        if change.operation == "clamp"
        else int(value)
        if change.operation == "largest"
        else id(value)
    )
    return (
        change.site.point,
        change.operation,
        own,
        positions,
        None if change.units is None else len(change.units),
        None if change.examples is None else tuple(change.examples),
        None if change.steps is None else 0 in change.steps,
    )


def _kind(base: Base, rows: Sequence[tuple[int, Intervention, int]]) -> Alike:
    """Changes of one key, checked. Raises InputError for one that does not fit, as it does when it
    is made alone."""
    changes = [change for _, change, _ in rows]
    change, examples = changes[0], len(base.lengths)
    if rows[0][0] != _OUTER:
        _try(base, change)  # shapes are all alike, so one speaks for all
    concerned, row = torch.ones(examples, dtype=torch.bool), torch.arange(examples)
    if change.examples is not None:
        named = torch.tensor(list(change.examples), dtype=torch.long)
        concerned, row = torch.zeros_like(concerned), torch.zeros_like(row)
        concerned[named], row[named] = True, torch.arange(len(named))
    if change.steps is not None and 0 not in change.steps:
        concerned = torch.zeros_like(concerned)
    ndim = len(change.site.axes)
    return Alike(
        change.site.point,
        change.operation,
        torch.tensor([number for number, _, _ in rows]),
        torch.tensor([int(c.site.layer) for c in changes]),
        torch.tensor([rank for _, _, rank in rows]),
        _positions(base, changes, concerned),
        None if change.units is None else _units(base, changes),
        concerned,
        row,
        [_with_axes(c.value, ndim) if c.operation in ALIKE else c.value for c in changes],
    )


def _try(base: Base, change: Intervention) -> None:
    change.apply(base.values[change.site], Run(base.batch))


def _with_axes(value: Tensor, ndim: int) -> Tensor:
    return value if value.ndim == ndim else value.reshape((1,) * (ndim - value.ndim) + value.shape)


def _positions(base: Base, changes: Sequence[Intervention], concerned: Tensor) -> Tensor:
    """(change, example, place) positions from 0 on."""
    shape = (len(changes), len(base.lengths), -1)
    if changes[0].positions is None:
        return torch.arange(base.width).expand(*shape[:2], base.width)
    if type(changes[0].positions) is int:
        index = torch.tensor([[[c.positions]] for c in changes])
    else:
        index = torch.stack([torch.atleast_2d(as_index(c.positions).cpu()) for c in changes])
    lengths = torch.tensor(base.lengths)[:, None]
    index = torch.where(index < 0, index + lengths, index).expand(shape)
    wrong = (((index < 0) | (index >= lengths)).any(dim=2) & concerned).any(dim=1)
    for number in wrong.nonzero()[:1, 0].tolist():
        _try(base, changes[number])
    return index


def _units(base: Base, changes: Sequence[Intervention]) -> Tensor:
    """(change, unit); negative ones count from the end."""
    units = torch.tensor([list(c.units or ()) for c in changes])
    if (held := base.values.get(changes[0].site)) is not None:
        wrong = (units < -held.shape[2]) | (units >= held.shape[2])
        for number in wrong.any(dim=1).nonzero()[:1, 0].tolist():
            _try(base, changes[number])
    return units


# --- what a change changes ------------------------------------------------------------------------


def _real(base: Base, alike: Alike) -> Tensor:
    """(change, example, place) whether a real token stands there, of an example concerned."""
    return (alike.position < torch.tensor(base.lengths)[:, None]) & alike.concerned[:, None]


def _differing(base: Base, kinds: Sequence[Alike]) -> list[Tensor | None]:
    """(change, example, place) of each kind, whether a replacement differs from the very value that
    stands there; None of other operations. The device is waited for once."""
    put = [alike for alike in kinds if alike.operation == "replace"]
    if not put:
        return [None] * len(kinds)
    flat = torch.cat([_replaces(base, alike).flatten() for alike in put]).cpu()
    parts = iter(flat.split([alike.position.numel() for alike in put]))
    return [
        next(parts).view(alike.position.shape) if alike.operation == "replace" else None
        for alike in kinds
    ]


def _replaces(base: Base, alike: Alike) -> Tensor:
    layers, layer = alike.layer.unique(return_inverse=True)
    stack = torch.stack([base.values[Site("", n, alike.point)] for n in layers.tolist()])
    layer, at = layer.to(stack.device), alike.position.clamp(0, base.width - 1)
    each = at.shape[1] * at.shape[2] * stack[0, 0, 0].numel()
    some = torch.arange(len(layer)).split(max(1, _AT_ONCE // each))
    return torch.cat([_differs(stack, layer, at, alike, which) for which in some])


def _differs(stack: Tensor, layer: Tensor, at: Tensor, alike: Alike, some: Tensor) -> Tensor:
    device = stack.device
    example = torch.arange(at.shape[1], device=device)[None, :, None]
    there, lay = at[some].to(device), layer[some.to(device)][:, None, None]
    if alike.unit is None:
        x = stack[lay, example, there]
    else:
        unit = alike.unit[some].to(device)[:, None, None] % stack.shape[3]
        x = stack[lay[..., None], example[..., None], there[..., None], unit]
    value = alike.value(some, device).to(stack.dtype)
    if value.shape[1] > 1:
        value = value[:, alike.row.to(device)]
    return (x != value).flatten(3).any(dim=3)
