"""Edges: what one component sends to one input of a later one, and what happens when that alone
changes.

Senders, in order of computation: "embed" (all that enters layer 0), every query head "L3H2", every
MLP "L3 mlp". Each adds its *write* to the residual stream; writes sum to the stream exactly.
Receivers: the query, key and value input of every query head "L3H2.q", ".k", ".v", every MLP's
input "L3 mlp", and "logits", the input of the read-out. Each receiver reads the sum of all writes
before it.

An edge u -> v is changed by giving v, and only v, the input  x_v + delta_u.  All else that v's
layer computes from the stream stays, and what comes after v is computed anew.

- **Keys and values.** u -> L3H2.k changes the keys *as query head 2 reads them*. Query heads that
  share that key/value head keep the old keys, and have an edge each. One q, k or v input changes
  one head's z, so the edge is exactly the intervention `replaced("layers.3.attn.z", z',
  units=[2])`; an edge into an MLP is one at its `mlp.out`.
- **Outer changes** (`with intervene(...)` around) are part of both runs and of every layer called
  alone. Changes of the stream itself are refused: it is then not the sum of what components write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine import outside
from stratoscope.engine.alone import Layers
from stratoscope.engine.continued import continued
from stratoscope.engine.intervene import Intervention, add, replaced
from stratoscope.engine.pair import Pair
from stratoscope.engine.sent import Sent, random_directions, sent
from stratoscope.engine.sweep import sweep
from stratoscope.engine.wiring import SIDES, Path, Wiring, wiring
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM

# metric(logits (row, vocab) of the one example) -> (row,)
Metric = Callable[[Tensor], Tensor]
_CHUNK = 2048  # cells given to one sweep: their values lie in memory
_VALUES = 2**24  # numbers that the variants of one layer may take at once


# --- exact: paths as interventions ----------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """One head (with the sides it hears on), MLP or read-out that a path changes, and the senders
    it hears."""

    cell: int
    layer: int
    head: int  # -1 is the MLP, or the read-out after the last layer
    sides: str
    heard: tuple[int, ...]


@torch.no_grad()
def interventions(
    layers: Layers, base: Sent, delta: Float[Tensor, "sender position dim"], paths: Sequence[Path]
) -> list[list[Intervention]]:
    """What each path's change makes of its receivers: one cell for each path, empty where no sender
    changes.

    A receiver's input is the base run's plus the deltas of the path's senders before it; nodes
    between stay as they were, and all receivers of a path are replaced together. "logits" adds the
    deltas to the last stream.
    """
    cells: list[list[Intervention]] = [[] for _ in paths]
    parts = sorted(_parts(wiring(layers.lm), delta, paths), key=_together)
    for (layer, is_head), group in groupby(parts, key=_together):
        here = list(group)
        every = list(dict.fromkeys(part.heard for part in here))
        size = _variants_at_once(layers.lm, delta.shape[1])
        for begin in range(0, len(every), size):
            rows = {heard: row for row, heard in enumerate(every[begin : begin + size])}
            change = torch.stack([delta[list(heard)].sum(dim=0) for heard in rows])
            make = _head_changes if is_head else _stream_changes
            some = [part for part in here if part.heard in rows]
            with layers:
                changes_of = make(layers, base, layer, change, [(rows[p.heard], p) for p in some])
            for part, made in zip(some, changes_of):
                cells[part.cell].append(made)
    return cells


def _together(part: _Part) -> tuple[int, bool]:
    return part.layer, part.head >= 0


def _parts(wires: Wiring, delta: Tensor, paths: Sequence[Path]) -> Iterator[_Part]:
    moved = delta.flatten(1).any(dim=1).tolist()
    for cell, (senders, receivers) in enumerate(paths):
        sides: dict[tuple[int, int], str] = {}
        heard: dict[tuple[int, int], tuple[int, ...]] = {}
        for receiver in sorted(receivers):
            layer, inside = wires.place(receiver)
            alone = inside == 3 * wires.heads or layer == wires.layers
            at = (layer, -1 if alone else inside // 3)
            sides[at] = sides.get(at, "") + ("" if alone else SIDES[inside % 3])
            heard[at] = tuple(s for s in senders if s < wires.before(receiver) and moved[s])
        yield from (_Part(cell, *at, sides[at], heard[at]) for at in sides if heard[at])


def _variants_at_once(lm: LM, width: int) -> int:
    dims = lm.dims
    return max(
        1,
        _VALUES
        // (width * max(dims.dim, 3 * dims.heads * max(width, dims.head_dim), dims.neurons)),
    )


def _head_changes(
    layers: Layers, base: Sent, layer: int, change: Tensor, parts: Sequence[tuple[int, _Part]]
) -> list[Intervention]:
    """z of each part's head, from the new q, k or v on the sides that hear and the base run's on
    the others."""
    heads = layers.attention(layer, torch.cat([base.pre[layer][None], base.pre[layer] + change]))
    new = {side: getattr(heads, side)[1:] for side in SIDES}
    old = {side: getattr(heads, side)[:1].expand_as(new[side]) for side in SIDES}
    z = {
        sides: heads.z(*(new[side] if side in sides else old[side] for side in SIDES))
        for sides in {part.sides for _, part in parts}
    }
    made = []
    for row, part in parts:
        at = _from_first(layers, change[row])
        value = z[part.sides][row, part.head, at.start :, None]
        made.append(
            replaced(f"layers.{layer}.attn.z", value[None], positions=at, units=[part.head])
        )
    return made


def _stream_changes(
    layers: Layers, base: Sent, layer: int, change: Tensor, parts: Sequence[tuple[int, _Part]]
) -> list[Intervention]:
    """What the MLP writes, or, after the last layer, what is added for the read-out."""
    if layer == layers.lm.dims.layers:
        return [add(f"layers.{layer - 1}.resid_post", change[row][None]) for row, _ in parts]
    out = layers.mlp(layer, base.mid[layer] + change)
    places = [_from_first(layers, change[row]) for row, _ in parts]
    return [
        replaced(f"layers.{layer}.mlp.out", out[row][None, at.start :], positions=at)
        for (row, _), at in zip(parts, places)
    ]


def _from_first(layers: Layers, change: Float[Tensor, "position dim"]) -> range:
    """The positions that can feel a change: in a causal model those from its first on."""
    first = int(change.any(dim=-1).nonzero()[0]) if layers.causal else 0
    return range(first, len(change))


# --- a pair of prompts ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ends:
    """One pair of prompts: the base run, which is changed, and the source run, which changes are
    taken from. width: positions of the longest row of this pair, see `ends`."""

    batch: Batch
    layers: Layers
    base: Sent
    source: Sent
    metric: Metric
    width: int

    @property
    def delta(self) -> Float[Tensor, "sender position dim"]:
        return self.source.writes - self.base.writes

    def null(self, seed: int) -> Float[Tensor, "sender position dim"]:
        """Random directions of the deltas' lengths, alike where a pair's rows share positions."""
        return random_directions(self.delta, seed, self.width)


def ends(lm: LM, prompts: Pair) -> Iterator[list[Ends]]:
    """The pairs of a `Pair`, each as the rows whose metrics add up to its difference, without
    padding.

    One row where one token is asked. Of whole answers one for every beginning of answer and foil
    (`engine.continued`), which follows both prompts: an edge is then changed at the prompt's
    positions and at the answer's.
    """
    bases, sources, wanted = prompts.base, prompts.source, prompts.target
    metric, example = wanted.difference, torch.arange(len(bases))
    if wanted.tokens:
        longer = continued(lm, bases, wanted)
        metric, example = longer.metric, longer.example
        bases, sources = longer.batch, continued(lm, sources, wanted).batch

    def difference(logits: Tensor, row: int) -> Tensor:
        return metric(logits, torch.full((len(logits),), row))

    for number in range(len(prompts.base)):
        rows = (example == number).nonzero()[:, 0].tolist()
        width = int(bases.lengths[rows].max())
        rows_of = []
        for row in rows:
            base, source = bases.example(row), sources.example(row)
            with outside.unheard(lm) if wanted.tokens else nullcontext():
                runs = Layers(lm, base), sent(lm, base), sent(lm, source)
            rows_of.append(Ends(base, *runs, partial(difference, row=row), width))
        yield rows_of


@torch.no_grad()
def exact(
    ends: Ends,
    delta: Float[Tensor, "sender position dim"],
    paths: Sequence[Path],
    *,
    advanced: Callable[[int], None] | None = None,
) -> Float[Tensor, " path"]:
    """The metric of the base run with each path's change made alone, by `sweep`.

    advanced: told how many paths were just done.
    """
    layers = ends.layers
    parts = []
    for begin in range(0, len(paths), _CHUNK):
        cells = interventions(layers, ends.base, delta, paths[begin : begin + _CHUNK])
        parts.append(
            sweep(layers.lm, ends.batch, cells, lambda logits, _: ends.metric(logits))[:, 0]
        )
        if advanced:
            advanced(len(cells))
    return torch.cat(parts) if parts else delta.new_zeros(0)
