"""Proof of a family: invariants that hold on any model whose sites are named rightly, and fail when one is not.

No reference implementation is needed: logits under our attention equal the model's own; pattern @ v is z; what the
parts write adds up to the residual; the projections turn z and the neurons into what is written; read-out gives logits.
Absolute and relative error are both gated: a cosine would not see a scale factor.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stratoscope.errors import FamilyError
from stratoscope.models.attention import repeat_heads, seam
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.readout import own_output
from stratoscope.models.sites import Site


@dataclass(frozen=True)
class Check:
    """One invariant at one place: largest absolute difference (over the largest value) and relative norm."""

    name: str
    place: str
    absolute: float
    relative: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.absolute <= self.tolerance and self.relative <= self.tolerance


@torch.no_grad()
def checks(lm: LM, inputs: object) -> list[Check]:
    """Run every invariant that applies, in every layer of every tower that the inputs reach.

    tolerance: 1e-4 in fp32, 3e-2 in half precision, of the largest value and of the norm.
    """
    batch = lm.batch(inputs)
    seen = _capture(lm, batch)
    tolerance = 1e-4 if lm.model.dtype == torch.float32 else 3e-2
    real = None if batch.mask is None else batch.mask
    found = [Check("the site is reached", str(s), torch.inf, torch.inf, tolerance) for s in _unreached(lm, seen)]
    for name, site, got, expected in _pairs(lm, batch, seen):
        if real is not None and got.shape[:2] == real.shape:
            got, expected = got[real], expected[real]
        gap = (got - expected).float()
        scale = expected.float().abs().max().clamp_min(1e-6)
        relative = gap.norm() / expected.float().norm().clamp_min(1e-6)
        found.append(Check(name, str(site), float(gap.abs().max() / scale), float(relative), tolerance))
    found += _order(lm, batch, seen, tolerance) + _causality(lm, batch, seen, tolerance)
    return found + _mixing(lm, batch, tolerance)


def prove(lm: LM, inputs: object) -> list[Check]:
    """`checks`, raising FamilyError that names the worst failure."""
    found = checks(lm, inputs)
    failed = sorted((c for c in found if not c.holds), key=lambda c: -c.relative)
    if failed:
        worst = failed[0]
        raise FamilyError(
            f"family `{lm.family.name}` does not hold on {type(lm.model).__name__}: {len(failed)} of {len(found)} "
            f"invariants fail, worst `{worst.name}` at {worst.place} (absolute {worst.absolute:.1e}, relative "
            f"{worst.relative:.1e}, allowed {worst.tolerance:.0e}). The site names would lie, so it is refused."
        )
    return found


def _order(lm: LM, batch: Batch, seen: dict[Site, Tensor], tolerance: float) -> list[Check]:
    """Whether a layer's MLP reads what its attention wrote, as the family says: the sums hold either way."""
    found = []
    for name, tower in lm.family.towers.items():
        both = [(w, m) for m in seen if m.tower == name and m.point == "mlp.out" for w in _writes(seen, m)[:1]]
        if tower.residual == "post-norm" or not both:
            continue
        attention, mlp = min(both, key=lambda pair: pair[1].layer)
        after: dict[Site, Tensor] = {}
        edits = {attention: [lambda x, run: x + 3 * x.roll(1, dims=-1)]}  # no constant: a LayerNorm would not see it
        with lm.taps.using(edits, {mlp: [lambda x, run, at=mlp, into=after: into.update({at: x.clone()})]}):
            lm(batch)
        # not to the bit: where a picture comes first, its tower ran under another kernel
        parallel = bool((after[mlp] - seen[mlp]).norm() <= tolerance * seen[mlp].norm())
        error = 0.0 if parallel == (tower.residual == "parallel") else torch.inf
        found.append(Check(f"attention and MLP are {tower.residual}", str(mlp), error, error, tolerance))
    return found


def _causality(lm: LM, batch: Batch, seen: dict[Site, Tensor], tolerance: float) -> list[Check]:
    """Whether earlier positions feel a change at the last token, as the family says: `sweep` relies on it."""
    first, last = Site("", 0, "resid_pre"), Site("", lm.dims.layers - 1, "resid_post")
    if batch.ids is None or int(batch.lengths.max()) < 2:
        return []
    rows, at = torch.arange(len(batch)), batch.lengths - 1
    after: dict[Site, Tensor] = {}

    def change(x: Tensor, run: object) -> Tensor:
        return torch.index_put(x, (rows, at), 3 * x[rows, at].roll(1, dims=-1))

    with lm.taps.using({first: [change]}, {last: [lambda x, run: after.update({last: x.clone()})]}):
        lm(batch)
    earlier = batch.mask.index_put((rows, at), torch.tensor(False, device=batch.mask.device))
    felt = (after[last] - seen[last])[earlier].norm() / seen[last][earlier].norm()
    causal = lm.family.towers[""].causal
    error = 0.0 if (felt <= tolerance) == causal else torch.inf
    return [Check("causal" if causal else "bidirectional", str(last), error, error, tolerance)]


def _mixing(lm: LM, batch: Batch, tolerance: float) -> list[Check]:
    """Whether positions hear of one another beside the attention function, as the family says: `sweep` packs rows if not.

    With attention silenced, a change at the first token reaches no other, and no mask, unless something else carries it.
    """
    depth = lm.dims.layers
    every = [Site("", n, "attn.q") for n in range(depth)]
    if batch.ids is None or batch.ids.shape[1] < 2 or any(lm.layout.lack(site) for site in every):
        return []
    first, last = Site("", 0, "resid_pre"), Site("", depth - 1, "resid_post")
    runs: list[list[Tensor]] = []

    def silent(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *how: Any) -> Tensor:
        runs[-1].append(torch.zeros(()) if mask is None else mask)
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])

    def change(x: Tensor, run: object) -> Tensor:
        return torch.cat([3 * x[:, :1].roll(1, dims=-1), x[:, 1:]], dim=1)

    modules = dict.fromkeys((lm.layout.attention(site) for site in every), silent)
    reads = {last: [lambda x, run: runs[-1].append(x[:, 1:].clone())]}
    for edits in ({}, {first: [change]}):
        runs.append([])
        with lm.taps.using(edits, reads), seam(lm.model, {}, modules):
            lm(batch)
    same = all(x.shape == y.shape and bool(torch.isclose(x, y, tolerance, tolerance).all()) for x, y in zip(*runs))
    mixes = any(lm.layout.tower(site).mixes for site in every)
    error = 0.0 if same or mixes else torch.inf  # what is called mixed without need is only swept more slowly
    return [Check("nothing but attention mixes positions", str(last), error, error, tolerance)]


def _writes(seen: Container[Site], at: Site) -> list[Site]:
    """What a layer's token mixing adds to the stream: attention, another mixer, or both side by side."""
    return [site for p in ("attn.out", "mix.out") if (site := Site(at.tower, at.layer, p)) in seen]


def _unreached(lm: LM, seen: dict[Site, Tensor]) -> list[Site]:
    """Sites of the main tower that no forward pass showed (a vision tower or projector needs images to be reached)."""
    return [s for s in lm.sites() if s not in seen and s.tower == "" and s.point != "projector"]


def _capture(lm: LM, batch: Batch) -> dict[Site, Tensor]:
    seen: dict[Site, Tensor] = {}
    sites = lm.sites()
    reads = {s: [lambda x, run, s=s: seen.__setitem__(s, x.detach().clone())] for s in sites}
    with lm.taps.using(reads=reads):
        output = lm(batch)
    seen[Site("", None, "ours")] = _last(output)
    return seen


def _last(output: Any) -> Tensor:
    """What the model is run for: logits, or the last hidden state, or the scores of an image and text pair."""
    return next(x for x in output.values() if isinstance(x, Tensor))


def _pairs(lm: LM, batch: Batch, seen: dict[Site, Tensor]) -> Iterator[tuple[str, Site, Tensor, Tensor]]:
    """(invariant, place, computed from parts, seen in the model)."""
    for tower, layers in lm.layout.layers.items():
        for layer in range(len(layers)):
            here = {p: seen[s] for p in _LAYER if (s := Site(tower, layer, p)) in seen}
            if here:
                yield from _layer_pairs(lm, Site(tower, layer, ""), here)
        if not (lm.family.towers[tower].between and batch.extra):
            yield from _chain(tower, len(layers), seen)
    yield from _shut(lm, batch, seen)
    yield from _apart(lm, batch, seen)
    plain = _last(lm(batch))
    yield "the output equals Hugging Face's", Site("", None, "logits"), seen[Site("", None, "ours")], plain
    if lm.readout.reason:
        return
    last = seen[Site("", lm.dims.layers - 1, "resid_post")]
    own = own_output(lm, batch)
    read = lm.readout(last) if lm.readout.where == "every" else lm.readout.of(last, batch)
    yield "head(norm(resid_last)) == logits", Site("", None, "logits"), read, own.reshape(read.shape)


def _chain(tower: str, depth: int, seen: dict[Site, Tensor]) -> Iterator[tuple[str, Site, Tensor, Tensor]]:
    """What leaves a layer is what enters the next: a model may add to the stream, or convolve it, in between."""
    for layer in range(depth - 1):
        left, entered = Site(tower, layer, "resid_post"), Site(tower, layer + 1, "resid_pre")
        if left in seen and entered in seen:
            yield "resid_post enters the next layer", left, seen[left], seen[entered]


def _shut(lm: LM, batch: Batch, seen: dict[Site, Tensor]) -> Iterator[tuple[str, Site, Tensor, Tensor]]:
    """mlp.pre is what the activation function takes: far below zero it shuts every neuron (a gate's other half would not)."""
    after: dict[Site, Tensor] = {}
    gates = [s for s in seen if s.point == "mlp.pre"]
    acts = [Site(s.tower, s.layer, "mlp.act") for s in gates]
    edits = {s: [lambda x, run: torch.full_like(x, -100)] for s in gates}
    with lm.taps.using(edits, {s: [lambda x, run, s=s: after.update({s: x.clone()})] for s in acts}):
        lm(batch)
    for site, act in after.items():
        activation = lm.layout.tower(site).activation
        shut = torch.full_like(act, -100) if activation else torch.zeros_like(act)
        closed = lm.layout.layer(site).get_submodule(activation)(shut) if activation else shut
        yield "mlp.act shuts when mlp.pre is far below zero", site, act, closed


def _apart(lm: LM, batch: Batch, seen: dict[Site, Tensor]) -> Iterator[tuple[str, Site, Tensor, Tensor]]:
    """Where a gate stands between pattern @ v and z: a head that attends to nothing changes its own z and no other's."""
    for at in [s for s in seen if s.point == "attn.pattern" and lm.layout.tower(s).gated]:
        after: list[Tensor] = []
        z = replace(at, point="attn.z")
        first = torch.zeros(1, dtype=torch.long, device=seen[at].device)
        edits = {at: [lambda x, run, first=first: x.index_fill(1, first, 0)]}
        with lm.taps.using(edits, {z: [lambda x, run, after=after: after.append(x.clone())]}):
            lm(batch)
        yield "a head's pattern reaches its own z only", z, after[0][:, :, 1:], seen[z][:, :, 1:]
        own = (after[0] - seen[z])[:, :, :1]
        yield "a head's pattern reaches its own z", z, own.norm().clamp_max(1e-3) * 1e3, torch.ones_like(own.norm())


_LAYER = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn.v",
    "attn.pattern",
    "attn.z",
    "attn.out",
    "mix.out",
    "mlp.act",
    "mlp.out",
)


def _layer_pairs(lm: LM, at: Site, x: dict[str, Tensor]) -> Iterator[tuple[str, Site, Tensor, Tensor]]:
    tower = lm.layout.tower(at)
    site = lambda point: Site(at.tower, at.layer, point)  # noqa: E731
    if "attn.pattern" in x:
        groups = x["attn.z"].shape[2] // x["attn.v"].shape[2]
        z = (x["attn.pattern"] @ repeat_heads(x["attn.v"].transpose(1, 2), groups)).transpose(1, 2)
        if not tower.gated:
            yield "pattern @ v == z", site("attn.z"), z, x["attn.z"]
    for start, end in (("attn.z", "attn.out"), ("mlp.act", "mlp.out")):
        if start in x and end in x and (tower.attn_write if end == "attn.out" else tower.mlp_write):
            value = x[start].flatten(2)
            for module in lm.layout.writers(site(end)):
                value = module(value)
            yield f"W({start}) == {end}", site(end), value, x[end]
    if tower.residual == "post-norm" and tower.norms is not None:
        middle, last = (lm.layout.layer(at).get_submodule(path) for path in tower.norms)
        yield (
            "norm(resid_pre + attn.out) == resid_mid",
            at,
            middle(x["resid_pre"] + x["attn.out"]),
            x["resid_mid"],
        )
        yield (
            "norm(resid_mid + mlp.out) == resid_post",
            at,
            last(x["resid_mid"] + x["mlp.out"]),
            x["resid_post"],
        )
        return
    parts = [p for p in ("attn.out", "mix.out", "mlp.out") if p in x]
    total = sum((x[p] for p in parts), start=x["resid_pre"])
    yield f"{' + '.join(['resid_pre', *parts])} == resid_post", site("resid_post"), total, x["resid_post"]
    if "resid_mid" in x and "mlp.out" in x:
        yield (
            "resid_mid + mlp.out == resid_post",
            site("resid_mid"),
            x["resid_mid"] + x["mlp.out"],
            x["resid_post"],
        )
