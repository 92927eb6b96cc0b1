"""Proof of a family: invariants that hold on any model whose sites are named rightly, and fail when one is not.

No reference implementation is needed: logits under our attention equal the model's own; pattern @ v is z; what the
parts write adds up to the residual; the projections turn z and the neurons into what is written; read-out gives logits.
Absolute and relative error are both gated: a cosine would not see a scale factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stratoscope.errors import FamilyError
from stratoscope.models.attention import repeat_heads
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
    return found + _order(lm, batch, seen, tolerance) + _causality(lm, batch, seen, tolerance)


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
    """Whether the first layer's MLP reads what its attention wrote, as the family says: the sums hold either way."""
    found = []
    for name, tower in lm.family.towers.items():
        attention, mlp = (Site(name, 0, point) for point in ("attn.out", "mlp.out"))
        if tower.residual == "post-norm" or mlp not in seen:
            continue
        after: dict[Site, Tensor] = {}
        edits = {attention: [lambda x, run: x + 3 * x.roll(1, dims=-1)]}  # no constant: a LayerNorm would not see it
        with lm.taps.using(edits, {mlp: [lambda x, run, at=mlp, into=after: into.update({at: x.clone()})]}):
            lm(batch)
        parallel = torch.equal(after[mlp], seen[mlp])
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
    yield from _shut(lm, batch, seen)
    plain = _last(lm(batch))
    yield "the output equals Hugging Face's", Site("", None, "logits"), seen[Site("", None, "ours")], plain
    if lm.readout.reason:
        return
    last = seen[Site("", lm.dims.layers - 1, "resid_post")]
    own = own_output(lm, batch)
    read = lm.readout(last) if lm.readout.where == "every" else lm.readout.of(last, batch)
    yield "head(norm(resid_last)) == logits", Site("", None, "logits"), read, own.reshape(read.shape)


def _shut(lm: LM, batch: Batch, seen: dict[Site, Tensor]) -> Iterator[tuple[str, Site, Tensor, Tensor]]:
    """mlp.pre is what the activation function takes: far below zero it shuts every neuron (a gate's other half would not)."""
    after: dict[Site, Tensor] = {}
    gates = [s for s in seen if s.point == "mlp.pre"]
    acts = [Site(s.tower, s.layer, "mlp.act") for s in gates]
    edits = {s: [lambda x, run: torch.full_like(x, -100)] for s in gates}
    with lm.taps.using(edits, {s: [lambda x, run, s=s: after.update({s: x.clone()})] for s in acts}):
        lm(batch)
    for site, act in after.items():
        yield "mlp.act shuts when mlp.pre is far below zero", site, act, torch.zeros_like(act)


_LAYER = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn.v",
    "attn.pattern",
    "attn.z",
    "attn.out",
    "mlp.act",
    "mlp.out",
)


def _layer_pairs(lm: LM, at: Site, x: dict[str, Tensor]) -> Iterator[tuple[str, Site, Tensor, Tensor]]:
    tower = lm.family.towers[at.tower]
    site = lambda point: Site(at.tower, at.layer, point)  # noqa: E731
    if "attn.pattern" in x:
        groups = x["attn.z"].shape[2] // x["attn.v"].shape[2]
        z = x["attn.pattern"] @ repeat_heads(x["attn.v"].transpose(1, 2), groups)
        yield "pattern @ v == z", site("attn.z"), z.transpose(1, 2), x["attn.z"]
    for start, end in (("attn.z", "attn.out"), ("mlp.act", "mlp.out")):
        if start in x and (tower.attn_write if end == "attn.out" else tower.mlp_write):
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
    total = x["resid_pre"] + x["attn.out"] + x["mlp.out"]
    yield "resid_pre + attn.out + mlp.out == resid_post", site("resid_post"), total, x["resid_post"]
    if "resid_mid" in x:
        yield (
            "resid_mid + mlp.out == resid_post",
            site("resid_mid"),
            x["resid_mid"] + x["mlp.out"],
            x["resid_post"],
        )
