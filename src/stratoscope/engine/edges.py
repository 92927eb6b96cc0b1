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
- **Post-norms** (Gemma 2 and 3, OLMo 2). The norm after attention is frozen at the run's own scale
  to split its output into heads: a head's write is what it adds given how loud all heads are
  together.
- **Biases.** What attention adds beside its heads (biases of projection and post-norm) is shared
equally among them.
- **Outer changes** (`with intervene(...)` around) are part of both runs and of every layer called
  alone. Changes of the stream itself are refused: it is then not the sum of what components write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stratoscope.engine import outside, writes
from stratoscope.engine.continued import continued
from stratoscope.engine.intervene import Intervention, add, replaced
from stratoscope.engine.memory import available, refuse_above
from stratoscope.engine.packed import beside_the_stream
from stratoscope.engine.pair import Pair
from stratoscope.engine.sweep import sweep
from stratoscope.engine.trace import capture
from stratoscope.engine.wiring import SIDES, Path, Wiring, wiring
from stratoscope.errors import InputError, SiteError
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

# metric(logits (row, vocab) of the one example) -> (row,)
Metric = Callable[[Tensor], Tensor]
_CHUNK = 2048  # cells given to one sweep: their values lie in memory
_VALUES = 2**24  # numbers that the variants of one layer may take at once


# --- what a run sends -----------------------------------------------------------------------------


@torch.no_grad()
def head_writes(
    lm: LM,
    layer: int,
    z: Float[Tensor, "position head head_dim"],
    outer: Sequence[Intervention] = (),
) -> Float[Tensor, "head position dim"]:
    """What each head adds to the residual stream; their sum is the layer's attn.out.

    In float32 at least, also of a model in half precision: small changes of writes are what edges
    are about. outer: changes made outside; those at this attn.out are made on every head's part.
    Raises SiteError for one that does not act on a sum part by part (a clamp).
    """
    heads, rest = writes.head_writes(lm, layer, z)
    parts = torch.cat([heads.transpose(0, 1), rest[None]])
    for change in (c for c in outer if c.site == Site("", layer, "attn.out")):
        if change.operation == "clamp":
            raise SiteError(
                f"a clamp at `{change.site}` acts on what all heads write together, so no head's "
                "part of it can be told: "
                f"clamp `layers.{layer}.attn.z`, or measure by heads.activation_patching."
            )
        nothing = change.apply(torch.zeros_like(rest)[None], Run())[0]
        parts = torch.stack([change.apply(part[None], Run())[0] - nothing for part in parts])
        parts[-1] += nothing
    return (parts[:-1] + parts[-1] / len(parts[:-1])).to(
        torch.promote_types(z.dtype, torch.float32)
    )


@dataclass(frozen=True)
class Sent:
    """One example's run. writes: (sender, position, dim). pre, mid: what q, k, v and the MLP of
    each layer read: (layer, position, dim). final: what the read-out reads, (position, dim)."""

    writes: Tensor
    pre: Tensor
    mid: Tensor
    final: Tensor


@torch.no_grad()
def sent(lm: LM, batch: Batch) -> Sent:
    """Run one example (without padding) and take apart what every component writes.

    Raises InputError for more than one example, MemoryRefusal when the writes would not fit.
    """
    if len(batch) != 1:
        raise InputError(
            f"edges are taken from one example at a time; this batch has {len(batch)}."
        )
    between = lm.family.towers[""].between
    if between and batch.extra:
        raise InputError(
            f"{between}, so that it is not the sum of what components write: edges do not exist "
            "for a prompt with a "
            f"picture. Use layers.activation_patching."
        )
    wires = wiring(lm)
    size = len(wires.senders) * batch.ids.shape[1] * lm.dims.dim * max(4, lm.model.dtype.itemsize)
    refuse_above(
        4 * size, available(lm.model.device), "what all components write", "shorten the prompt"
    )
    outer = _outer(lm)
    read = "resid_pre" if wires.parallel else "resid_mid"
    last = f"layers.{wires.layers - 1}.resid_post"
    names = [
        f"layers.*.{point}" for point in dict.fromkeys(("resid_pre", read, "attn.z", "mlp.out"))
    ]
    seen = capture(lm, batch, *names, last)
    pre, mid, outs = (
        seen.stack(f"layers.*.{point}")[:, 0] for point in ("resid_pre", read, "mlp.out")
    )
    parts = [pre[:1]]
    for layer in range(wires.layers):
        parts += [
            head_writes(lm, layer, seen[f"layers.{layer}.attn.z"][0], outer),
            outs[layer][None],
        ]
    return Sent(torch.cat(parts), pre, mid, seen[last][0])


def _outer(lm: LM) -> list[Intervention]:
    """The outer changes of one example's run, as changes of each of several variants of it.

    Raises SiteError where a layer alone cannot make them, or where they write into the stream
    beside all components.
    """
    found = outside.changes(lm)
    if found is None:
        raise SiteError(
            "edges are taken by calling layers alone, where what a forward hook or a function does "
            "cannot be followed "
            f"({', '.join(outside.foreign_hooks(lm.model)) or 'an edit that is no Intervention'}): "
            "change sites by "
            "engine.intervene instead."
        )
    for site in (change.site for change in found if change.site != Site("", 0, "resid_pre")):
        if site.point in ("resid_pre", "resid_mid", "resid_post"):
            raise SiteError(
                f"inside a change at `{site}` the residual stream is not the sum of what "
                "components write, so edges do not "
                f"exist. An addition is the same at `{_writer_before(site)}`, where it belongs "
                f"to a component."
            )
    here = [change for change in found if change.examples is None or 0 in change.examples]
    return [replace(c, examples=None, steps=None) for c in here if c.steps is None or 0 in c.steps]


def _writer_before(site: Site) -> Site:
    """Whose write is the last in the stream at a site."""
    if site.point == "resid_mid":
        return Site("", site.layer, "attn.out")
    return Site("", int(site.layer) - (site.point == "resid_pre"), "mlp.out")


def random_directions(
    delta: Float[Tensor, "sender position dim"], seed: int, width: int
) -> Float[Tensor, "sender position dim"]:
    """The null: vectors of the same lengths in random directions. width: positions of the longest
    run that is given the same directions, position by position."""
    senders, positions, dim = delta.shape
    noise = torch.randn(senders, width, dim, generator=torch.Generator().manual_seed(seed))
    noise = noise[:, :positions].to(delta)
    return noise * (delta.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))


# --- a layer alone --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """q, k, v of several variants of one layer's input, (variant, head, position, head_dim), every
    query head with its own copy of the keys and values it reads; and z from any mixture of them."""

    q: Tensor
    k: Tensor
    v: Tensor
    _rest: tuple[Tensor | None, float, float | None, Tensor | None]
    _outer: Sequence[
        Intervention
    ] = ()  # changes made outside, of scores, patterns and z of this layer

    def z(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask, scaling, softcap, sinks = self._rest
        sinks = None if sinks is None else sinks.reshape(1, -1, 1, 1)
        scores = self._changed("attn.scores", masked(scores_of(q, k, scaling, softcap), mask))
        pattern = self._changed("attn.pattern", softmax_visible(scores, sinks))
        return self._changed("attn.z", (pattern @ v).transpose(1, 2)).transpose(1, 2)

    def _changed(self, point: str, x: Tensor) -> Tensor:
        for change in self._outer:
            x = change.apply(x, Run()) if change.site.point == point else x
        return x


class Layers:
    """The model's own layers, each called alone, on inputs that need not belong to one run:
    (variant, position, dim). Inputs are rounded to the model's own precision, as in its own run.

    The other arguments of a layer (mask, rotary angles) are those of one example, without padding.
    `with layers:` keeps its hooks up for many calls; the whole model does not run inside. causal:
    whether no position hears a later one in this example (of a picture's tokens some models let
    each hear all).
    """

    def __init__(self, lm: LM, batch: Batch) -> None:
        self.lm = lm
        self.outer = _outer(lm)
        self._calls: list[tuple[tuple, dict[str, Any]]] = []
        self._modules = lm.layout.layers[""]
        self._parallel = lm.family.towers[""].residual == "parallel"
        self._open: ExitStack | None = None
        self._middle: Tensor | None = (
            None  # what the running layer's MLP is to read; None stops at attention
        )
        self._found: Any = None
        with ExitStack() as stack:
            for layer in self._modules:
                hook = layer.register_forward_pre_hook(self._note, with_kwargs=True)
                stack.callback(hook.remove)
            stack.enter_context(outside.unheard(lm))
            stack.enter_context(lm.taps.using())
            stack.enter_context(
                seam(lm.model, {})
            )  # masks are made for the kernel that will read them
            stack.enter_context(torch.no_grad())
            lm(batch)
        tensors = [x for args, kwargs in self._calls for x in (*args, *kwargs.values())]
        ahead = any(isinstance(x, Tensor) and x.ndim == 4 and looks_ahead(x) for x in tensors)
        self.causal = lm.family.towers[""].causal and not ahead

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._calls.append(beside_the_stream(args, kwargs))

    def attention(self, layer: int, x: Float[Tensor, "variant position dim"]) -> Heads:
        """q, k, v that the layer computes from x."""
        return self._call(layer, x, None)

    def mlp(
        self, layer: int, x: Float[Tensor, "variant position dim"]
    ) -> Float[Tensor, "variant position dim"]:
        """What the layer's MLP writes when x is what it reads."""
        return self._call(layer, x if self._parallel else x.detach(), x)

    def __enter__(self) -> Layers:
        numbers = range(len(self._modules))
        attentions = {
            self.lm.layout.attention(Site("", n, "attn.q")): partial(self._attend, n)
            for n in numbers
        }
        edits = (
            {} if self._parallel else {Site("", n, "resid_mid"): [self._replace] for n in numbers}
        )
        inside: dict[Site, list[Callable[[Tensor, Run], Tensor]]] = {}
        for change in self.outer:
            if change.site.point in ("attn.q", "attn.k", "attn.v", "mlp.pre", "mlp.act", "mlp.out"):
                inside.setdefault(change.site, []).append(change.apply)
        with ExitStack() as stack:
            stack.enter_context(self.lm.taps.only((inside, {})))
            stack.enter_context(self.lm.taps.running(None))
            stack.enter_context(
                self.lm.taps.using(edits, {Site("", n, "mlp.out"): [self._keep] for n in numbers})
            )
            stack.enter_context(seam(self.lm.model, {}, attentions))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            opened.close()

    def _attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        if self._middle is not None:  # the MLP is asked, and what attention adds is put aside
            return v.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
        groups = q.shape[1] // k.shape[1]
        outer = [change for change in self.outer if change.site.layer == layer]
        rest = (mask, scaling, softcap, sinks)
        self._found = Heads(q, repeat_heads(k, groups), repeat_heads(v, groups), rest, outer)
        raise StopForward

    def _replace(self, x: Tensor, run: Run) -> Tensor:
        return x if self._middle is None else self._middle

    def _keep(self, out: Tensor, run: Run) -> None:
        self._found = out
        raise StopForward

    def _call(self, layer: int, x: Tensor, middle: Tensor | None) -> Any:
        if self._open is None:
            with self:
                return self._call(layer, x, middle)
        args, kwargs = self._calls[layer]
        dtype = self.lm.model.dtype
        self._middle, self._found = None if middle is None else middle.to(dtype), None
        try:
            self._modules[layer](x.to(dtype), *args, **kwargs)
        except StopForward:
            return self._found
        finally:
            self._middle = self._found = None
        raise SiteError(
            f"layer {layer} of {self.lm.family.name} ran without reaching its attention or its MLP."
        )


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
                found = make(layers, base, layer, change, [(rows[p.heard], p) for p in some])
            for part, made in zip(some, found):
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


def ends(lm: LM, both: Pair) -> Iterator[list[Ends]]:
    """The pairs of a `Pair`, each as the rows whose metrics add up to its difference, without
    padding.

    One row where one token is asked. Of whole answers one for every beginning of answer and foil
    (`engine.continued`), which follows both prompts: an edge is then changed at the prompt's
    positions and at the answer's.
    """
    bases, sources, asked = both.base, both.source, both.target
    metric, example = asked.difference, torch.arange(len(bases))
    if asked.tokens:
        longer = continued(lm, bases, asked)
        metric, example = longer.metric, longer.example
        bases, sources = longer.batch, continued(lm, sources, asked).batch

    def difference(logits: Tensor, row: int) -> Tensor:
        return metric(logits, torch.full((len(logits),), row))

    for number in range(len(both.base)):
        rows = (example == number).nonzero()[:, 0].tolist()
        width = int(bases.lengths[rows].max())
        found = []
        for row in rows:
            base, source = bases.example(row), sources.example(row)
            with outside.unheard(lm) if asked.tokens else nullcontext():
                runs = Layers(lm, base), sent(lm, base), sent(lm, source)
            found.append(Ends(base, *runs, partial(difference, row=row), width))
        yield found


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
    found = []
    for begin in range(0, len(paths), _CHUNK):
        cells = interventions(layers, ends.base, delta, paths[begin : begin + _CHUNK])
        found.append(
            sweep(layers.lm, ends.batch, cells, lambda logits, _: ends.metric(logits))[:, 0]
        )
        if advanced:
            advanced(len(cells))
    return torch.cat(found) if found else delta.new_zeros(0)
