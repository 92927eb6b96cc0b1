"""Edges: what one component sends to one input of a later one, and what happens when that alone changes.

Senders, in order of computation: "embed" (all that enters layer 0), every query head "L3H2", every MLP "L3 mlp". Each
adds its *write* to the residual stream; writes sum to the stream exactly. Receivers: the query, key and value input of
every query head "L3H2.q", ".k", ".v", every MLP's input "L3 mlp", and "logits", the input of the read-out. Each
receiver reads the sum of all writes before it.

An edge u -> v is changed by giving v, and only v, the input  x_v + delta_u.  All else that v's layer computes from the
stream stays, and what comes after v is computed anew.

- **Keys and values.** u -> L3H2.k changes the keys *as query head 2 reads them*. Query heads that share that key/value
  head keep the old keys, and have an edge each. One q, k or v input changes one head's z, so the edge is exactly the
  intervention `replaced("layers.3.attn.z", z', units=[2])`; an edge into an MLP is one at its `mlp.out`.
- **Post-norms** (Gemma 2 and 3, OLMo 2). The norm after attention is frozen at the run's own scale to split its output
  into heads: a head's write is what it adds given how loud all heads are together.
- **Biases.** What attention adds beside its heads (the projection's bias, the post-norm's) is shared equally among them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from stratoscope.engine.gradients import frozen, gradients
from stratoscope.engine.intervene import Intervention, add, replaced, scaled
from stratoscope.engine.memory import available, refuse_above
from stratoscope.engine.sweep import sweep
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from stratoscope.maths.norm import freeze
from stratoscope.models.attention import masked, repeat_heads, scores_of, seam, softmax_visible
from stratoscope.models.batch import Batch
from stratoscope.models.layout import matrix
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.models.taps import Run, StopForward

SIDES = "qkv"
# senders and receivers, as numbers in `Wiring`'s lists: one edge, or several senders and receivers changed together
Path = tuple[tuple[int, ...], tuple[int, ...]]
Names = str | Sequence[str]
_CHUNK = 2048  # cells given to one sweep: their values lie in memory
_VALUES = 2**24  # numbers that the variants of one layer may take at once


@dataclass(frozen=True)
class Wiring:
    """Who can send to whom. Senders are numbered in order of computation, so those before a receiver are the first n."""

    layers: int
    heads: int
    parallel: bool

    @cached_property
    def senders(self) -> list[str]:
        per_layer = [[*(f"L{n}H{h}" for h in range(self.heads)), f"L{n} mlp"] for n in range(self.layers)]
        return ["embed", *(name for layer in per_layer for name in layer)]

    @cached_property
    def receivers(self) -> list[str]:
        inputs = [
            [*(f"L{n}H{h}.{s}" for h in range(self.heads) for s in SIDES), f"L{n} mlp"] for n in range(self.layers)
        ]
        return [*(name for layer in inputs for name in layer), "logits"]

    def head(self, layer: int) -> int:
        """The number of the layer's first head as a sender; its MLP comes right after its last. Also: how many come before."""
        return 1 + layer * (self.heads + 1)

    def place(self, receiver: int) -> tuple[int, int]:
        """(layer, number within the layer): 3 * head + side, then the MLP. Logits are alone in a layer after the last."""
        return divmod(receiver, 3 * self.heads + 1)

    def before(self, receiver: int) -> int:
        """How many senders the receiver hears."""
        layer, inside = self.place(receiver)
        hears_heads = inside == 3 * self.heads and not self.parallel
        return self.head(layer) + (self.heads if hears_heads else 0)

    @cached_property
    def mask(self) -> Bool[Tensor, "receiver sender"]:
        """Which pairs are edges."""
        count = torch.tensor([self.before(r) for r in range(len(self.receivers))])
        return torch.arange(len(self.senders)) < count[:, None]

    @property
    def edges(self) -> list[Path]:
        """Every edge, in the order of `mask`: by receiver, then sender."""
        return [((sender,), (receiver,)) for receiver, sender in self.mask.nonzero().tolist()]

    def paths(self, named: Sequence[tuple[Names, Names]]) -> list[Path]:
        """Read (senders, receivers) by name; "L3H2" as a receiver means its q, k and v.

        Raises InputError for an unknown name, or a path none of whose senders comes before any of its receivers.
        """
        found = []
        for senders, receivers in named:
            ends = [[names] if isinstance(names, str) else list(names) for names in (senders, receivers)]
            heads = [[f"{n}.{s}" for s in SIDES] if re.fullmatch(r"L\d+H\d+", n) else [n] for n in ends[1]]
            path = (
                tuple(_number(n, self.senders, "sender") for n in ends[0]),
                tuple(_number(n, self.receivers, "receiver") for names in heads for n in names),
            )
            if not any(self.mask[r, s] for s in path[0] for r in path[1]):
                raise InputError(f"{senders!r} -> {receivers!r} is no path: every receiver is computed before the senders.")
            found.append(path)
        return found

    def coords(self, paths: Sequence[Path]) -> dict[str, Any]:
        """Coordinates of an `edge` axis: sender, receiver, and their layers (embed -1, logits the number of layers)."""
        senders = [" + ".join(self.senders[s] for s in path[0]) for path in paths]
        receivers = [" + ".join(self.receivers[r] for r in path[1]) for path in paths]
        return {
            "edge": [f"{sender} -> {receiver}" for sender, receiver in zip(senders, receivers)],
            "sender": (("edge",), senders),
            "receiver": (("edge",), receivers),
            "sender_layer": (("edge",), [(min(path[0]) - 1) // (self.heads + 1) for path in paths]),
            "receiver_layer": (("edge",), [self.place(max(path[1]))[0] for path in paths]),
        }


def _number(name: str, names: list[str], what: str) -> int:
    if name not in names:
        raise InputError(f"{name!r} is no {what} here: they run {', '.join(names[:3])} ... {names[-2]}, {names[-1]}.")
    return names.index(name)


def wiring(lm: LM) -> Wiring:
    """The wiring of a model. Raises SiteError when its stream is no sum, or its attention cannot be opened."""
    lm.layout.resolve(["layers.*.attn.q", "layers.*.attn.z", "layers.*.mlp.out", "logits"])
    residual = lm.family.towers[""].residual
    if residual == "post-norm":
        raise SiteError(
            f"{lm.family.name} norms its residual stream after every addition, so it is not a sum of what components "
            f"write: edges do not exist for it. Use layers.activation_patching."
        )
    return Wiring(lm.dims.layers, lm.dims.heads, residual == "parallel")


# --- what a run sends --------------------------------------------------------------------------------


@torch.no_grad()
def head_writes(lm: LM, layer: int, z: Float[Tensor, "position head head_dim"]) -> Float[Tensor, "head position dim"]:
    """What each head adds to the residual stream; their sum is the layer's attn.out."""
    [site] = lm.layout.resolve(f"layers.{layer}.attn.out")
    projection, *post = lm.layout.writers(site)
    joined = projection(z.flatten(1))
    by_head = matrix(projection).unflatten(1, z.shape[1:])
    heads, total = torch.einsum("phk,dhk->hpd", z, by_head), joined
    for norm in post:
        held, total = freeze(norm, joined), norm(joined)
        heads = replace(held, scale=held.scale[None]).linear(heads)
    return heads + (total - heads.sum(dim=0)) / len(heads)


@dataclass(frozen=True)
class Sent:
    """One example's run. writes: (sender, position, dim). pre, mid: what q, k, v and the MLP of each layer read:
    (layer, position, dim). final: what the read-out reads, (position, dim)."""

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
        raise InputError(f"edges are taken from one example at a time; this batch has {len(batch)}.")
    wires = wiring(lm)
    size = len(wires.senders) * batch.ids.shape[1] * lm.dims.dim * torch.finfo(lm.model.dtype).bits // 8
    refuse_above(4 * size, available(lm.model.device), "what all components write", "shorten the prompt")
    read = "resid_pre" if wires.parallel else "resid_mid"
    last = f"layers.{wires.layers - 1}.resid_post"
    names = [f"layers.*.{point}" for point in dict.fromkeys(("resid_pre", read, "attn.z", "mlp.out"))]
    seen = capture(lm, batch, *names, last)
    pre, mid, outs = (seen.stack(f"layers.*.{point}")[:, 0] for point in ("resid_pre", read, "mlp.out"))
    parts = [pre[:1]]
    for layer in range(wires.layers):
        parts += [head_writes(lm, layer, seen[f"layers.{layer}.attn.z"][0]), outs[layer][None]]
    return Sent(torch.cat(parts), pre, mid, seen[last][0])


def random_directions(delta: Float[Tensor, "*axes dim"], seed: int) -> Float[Tensor, "*axes dim"]:
    """The null: vectors of the same lengths in random directions."""
    noise = torch.randn(delta.shape, generator=torch.Generator().manual_seed(seed)).to(delta)
    return noise * (delta.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))


# --- a layer alone -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """q, k, v of several variants of one layer's input, (variant, head, position, head_dim), every query head with its
    own copy of the keys and values it reads; and z from any mixture of them."""

    q: Tensor
    k: Tensor
    v: Tensor
    _rest: tuple[Tensor | None, float, float | None]

    def z(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask, scaling, softcap = self._rest
        return softmax_visible(masked(scores_of(q, k, scaling, softcap), mask)) @ v


class Layers:
    """The model's own layers, each called alone, on inputs that need not belong to one run: (variant, position, dim).

    The other arguments of a layer (mask, rotary angles) are those of one example, without padding.
    """

    def __init__(self, lm: LM, batch: Batch) -> None:
        self.lm = lm
        self._calls: list[tuple[tuple, dict[str, Any]]] = []
        self._modules = lm.layout.layers[""]
        self._attentions = [lm.layout.attention(Site("", n, "attn.q")) for n in range(len(self._modules))]
        with ExitStack() as stack:
            for layer in self._modules:
                hook = layer.register_forward_pre_hook(self._note, with_kwargs=True)
                stack.callback(hook.remove)
            stack.enter_context(lm.taps.using())
            stack.enter_context(seam(lm.model, {}))  # masks are made for the kernel that will read them
            stack.enter_context(torch.no_grad())
            lm(batch)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        cache = ("hidden_states", "use_cache", "past_key_values", "layer_past")
        self._calls.append((args[1:], {name: x for name, x in kwargs.items() if name not in cache}))

    def attention(self, layer: int, x: Float[Tensor, "variant position dim"]) -> Heads:
        """q, k, v that the layer computes from x."""
        found: list[Heads] = []

        def keep(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> Tensor:
            groups = q.shape[1] // k.shape[1]
            found.append(Heads(q, repeat_heads(k, groups), repeat_heads(v, groups), (mask, scaling, softcap)))
            raise StopForward

        with self.lm.taps.using(), seam(self.lm.model, {}, {self._attentions[layer]: keep}):
            self._call(layer, x)
        return found[0]

    def mlp(self, layer: int, x: Float[Tensor, "variant position dim"]) -> Float[Tensor, "variant position dim"]:
        """What the layer's MLP writes when x is what it reads."""
        found: list[Tensor] = []

        def silent(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
            return v.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])

        def keep(out: Tensor, run: Run) -> None:
            found.append(out)
            raise StopForward

        middle, out = Site("", layer, "resid_mid"), Site("", layer, "mlp.out")
        parallel = self.lm.family.towers[""].residual == "parallel"
        edits = {} if parallel else {middle: [lambda _, run: x]}
        attention = {self._attentions[layer]: silent}
        with self.lm.taps.using(edits, {out: [keep]}), seam(self.lm.model, {}, attention):
            self._call(layer, x if parallel else x.detach())
        return found[0]

    def _call(self, layer: int, x: Tensor) -> None:
        args, kwargs = self._calls[layer]
        try:
            self._modules[layer](x, *args, **kwargs)
        except StopForward:
            return
        raise SiteError(f"layer {layer} of {self.lm.family.name} ran without reaching its attention or its MLP.")


# --- exact: paths as interventions -------------------------------------------------------------------


@torch.no_grad()
def interventions(
    layers: Layers, base: Sent, delta: Float[Tensor, "sender position dim"], paths: Sequence[Path]
) -> list[list[Intervention]]:
    """What each path's change makes of its receivers: one cell for each path, empty where no sender changes.

    A receiver's input is the base run's plus the deltas of the path's senders before it; nodes between stay as they
    were, and all receivers of a path are replaced together. "logits" adds the deltas to the last stream.
    """
    wires = wiring(layers.lm)
    cells: list[list[Intervention]] = [[] for _ in paths]
    wanted: dict[tuple[int, bool], dict[tuple[int, ...], dict[Any, list[int]]]] = {}
    for cell, (senders, receivers) in enumerate(paths):
        for place, heads in _by_place(wires, receivers).items():
            count = wires.head(place[0]) + (wires.heads if place[1] and not wires.parallel else 0)
            heard = tuple(s for s in senders if s < count and bool(delta[s].any()))
            for head, sides in heads.items() if heard else ():
                wanted.setdefault(place, {}).setdefault(heard, {}).setdefault((head, sides), []).append(cell)
    for (layer, is_mlp), variants in wanted.items():
        for some in _chunks(variants, layers.lm, delta.shape[1]):
            change = torch.stack([delta[list(heard)].sum(dim=0) for heard in some])
            first = [int(c.any(dim=-1).nonzero()[0]) for c in change]
            make = _mlp_changes if is_mlp else _head_changes
            if layer == wires.layers:
                last = f"layers.{layer - 1}.resid_post"
                made = [{(0, ""): add(last, c[None])} for c in change]
            else:
                made = make(layers, base, layer, change, first, [list(variants[heard]) for heard in some])
            for heard, found in zip(some, made):
                for key, numbers in variants[heard].items():
                    for number in numbers:
                        cells[number].append(found[key])
    return cells


def _by_place(wires: Wiring, receivers: Sequence[int]) -> dict[tuple[int, bool], dict[int, str]]:
    """(layer, whether MLP) -> head -> its sides among the receivers."""
    found: dict[tuple[int, bool], dict[int, str]] = {}
    for receiver in sorted(receivers):
        layer, inside = wires.place(receiver)
        is_mlp = inside == 3 * wires.heads
        head, side = (0, "") if is_mlp or layer == wires.layers else (inside // 3, SIDES[inside % 3])
        heads = found.setdefault((layer, is_mlp), {})
        heads[head] = heads.get(head, "") + side
    return found


def _chunks(variants: Any, lm: LM, width: int) -> Iterator[list[tuple[int, ...]]]:
    per_variant = width * max(lm.dims.dim, 3 * lm.dims.heads * max(width, lm.dims.head_dim), lm.dims.neurons)
    size = max(1, _VALUES // per_variant)
    every = iter(variants)
    while some := list(islice(every, size)):
        yield some


def _head_changes(
    layers: Layers, base: Sent, layer: int, change: Tensor, first: list[int], keys: list[list[tuple[int, str]]]
) -> list[dict[tuple[int, str], Intervention]]:
    heads = layers.attention(layer, torch.cat([base.pre[layer][None], base.pre[layer] + change]))
    old = {side: getattr(heads, side)[:1] for side in SIDES}
    new = {side: getattr(heads, side)[1:] for side in SIDES}
    causal = layers.lm.family.towers[""].causal
    z = {
        sides: heads.z(*(new[side] if side in sides else old[side].expand_as(new[side]) for side in SIDES))
        for sides in dict.fromkeys(sides for row in keys for _, sides in row)
    }
    width = change.shape[1]
    site = f"layers.{layer}.attn.z"

    def cell(variant: int, head: int, sides: str) -> Intervention:
        start = first[variant] if causal else 0
        value = z[sides][variant, head, start:, None]
        return replaced(site, value[None], positions=range(start, width), units=[head])

    return [{key: cell(variant, *key) for key in row} for variant, row in enumerate(keys)]


def _mlp_changes(
    layers: Layers, base: Sent, layer: int, change: Tensor, first: list[int], keys: list[list[tuple[int, str]]]
) -> list[dict[tuple[int, str], Intervention]]:
    out = layers.mlp(layer, base.mid[layer] + change)
    site, width = f"layers.{layer}.mlp.out", change.shape[1]
    return [
        {(0, ""): replaced(site, x[start:][None], positions=range(start, width))} for x, start in zip(out, first)
    ]


@torch.no_grad()
def exact(
    lm: LM,
    batch: Batch,
    base: Sent,
    delta: Float[Tensor, "sender position dim"],
    paths: Sequence[Path],
    metric: Callable[[Tensor], Tensor],
    *,
    advanced: Callable[[int], None] | None = None,
) -> Float[Tensor, " path"]:
    """The metric of the base run (one example) with each path's change made alone, by `sweep`.

    metric: last logits (row, vocab) -> (row,). advanced: told how many paths were done since it was last told.
    """
    layers, found = Layers(lm, batch), []
    for begin in range(0, len(paths), _CHUNK):
        cells = interventions(layers, base, delta, paths[begin : begin + _CHUNK])
        found.append(sweep(lm, batch, cells, lambda logits, _: metric(logits))[:, 0])
        if advanced:
            advanced(len(cells))
    return torch.cat(found) if found else delta.new_zeros(0)


# --- first order: gradients at every receiver --------------------------------------------------------


def slopes(
    lm: LM,
    layers: Layers,
    batch: Batch,
    deltas: Float[Tensor, "kind sender position dim"],
    metric: Callable[[Tensor], Tensor],
    *,
    start: Tensor | None = None,
) -> Float[Tensor, "kind receiver sender"]:
    """delta_u . d metric / d (input of v), the derivative of each edge's exact effect; 0 where there is no edge.

    One forward and one backward pass of the model give the gradients at every head's z, every MLP's output and the
    last stream; from there a layer alone carries them back to each receiver's own input. start: what enters layer 0
    instead, (1, position, dim).
    """
    wires = wiring(lm)
    read = "resid_pre" if wires.parallel else "resid_mid"
    last = Site("", wires.layers - 1, "resid_post")
    points = dict.fromkeys(("resid_pre", read, "attn.z", "mlp.out"))
    sites = [*(Site("", n, point) for n in range(wires.layers) for point in points), last]
    # a site read as a view (z by heads) is not what the model goes on with unless someone edits it: hence times one
    on = [scaled(f"layers.*.{point}", 1.0) for point in ("attn.z", "mlp.out")]
    _, values, grads = gradients(lm, batch, sites, metric, start=start, interventions=on)
    parts = []
    with frozen(lm), torch.enable_grad():
        for layer in range(wires.layers):
            pre, mid = (values[Site("", layer, point)] for point in ("resid_pre", read))
            parts.append(_into_heads(layers, layer, pre, grads[Site("", layer, "attn.z")]))
            mid = mid.clone().requires_grad_(True)
            parts += torch.autograd.grad(layers.mlp(layer, mid), mid, grads[Site("", layer, "mlp.out")])
    into = torch.cat([*parts, grads[last]]).flatten(1)
    return torch.einsum("ksx,rx->krs", deltas.flatten(2), into) * wires.mask.to(into)


def _into_heads(
    layers: Layers, layer: int, x: Float[Tensor, "one=1 position dim"], dz: Float[Tensor, "one=1 position head head_dim"]
) -> Float[Tensor, "input position dim"]:
    """The gradient at x through each head's q, k and v alone (head by head), given the gradient at z."""
    count = dz.shape[2]
    copies = x.repeat(3 * count, 1, 1).requires_grad_(True)  # one copy of x for each input: one backward for all
    heads = layers.attention(layer, copies)
    qkv = [getattr(heads, side) for side in SIDES]
    leaves = [y[:1].detach().requires_grad_(True) for y in qkv]
    slope = torch.autograd.grad(heads.z(*leaves), leaves, dz.transpose(1, 2))
    each = torch.arange(count)
    picked = [y[3 * each + side, each] for side, y in enumerate(qkv)]
    return torch.autograd.grad(picked, copies, [s[0] for s in slope])[0]


# --- a circuit alone ---------------------------------------------------------------------------------


@torch.no_grad()
def run_circuit(
    layers: Layers,
    embed: Float[Tensor, "position dim"],
    other: Float[Tensor, "sender position dim"],
    keep: Bool[Tensor, "receiver sender"],
) -> Float[Tensor, "position dim"]:
    """Run only a circuit: what the read-out reads when every edge outside it carries `other` instead.

    Layer by layer, each receiver reads the sum over the senders before it of what they write now, where `keep` has the
    edge, or of `other`. embed: what "embed" writes now.
    """
    lm = layers.lm
    wires = wiring(lm)
    extra = torch.zeros_like(other)  # what a sender writes now, less `other`
    extra[0] = embed - other[0]

    def inputs(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The different inputs of some receivers, (variant, position, dim), and which is whose."""
        kinds, which = torch.unique(rows[:, :count], dim=0, return_inverse=True)
        more = kinds.to(other) @ extra[:count].flatten(1)
        return other[:count].sum(dim=0) + more.unflatten(1, other.shape[1:]), which

    per_layer = 3 * wires.heads + 1
    each = torch.arange(wires.heads)
    for layer in range(wires.layers):
        count = wires.head(layer)
        rows = keep[layer * per_layer : (layer + 1) * per_layer]
        x, which = inputs(rows[:-1], count)
        heads = layers.attention(layer, x)
        z = heads.z(*(getattr(heads, side)[which[n::3], each][None] for n, side in enumerate(SIDES)))
        mlp = count + wires.heads
        extra[count:mlp] = head_writes(lm, layer, z[0].transpose(0, 1)) - other[count:mlp]
        x, _ = inputs(rows[-1:], count if wires.parallel else mlp)
        extra[mlp] = layers.mlp(layer, x)[0] - other[mlp]
    return inputs(keep[-1:], len(other))[0][0]
