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
    found = [
        Check("the site is reached", str(s), torch.inf, torch.inf, tolerance) for s in _unreached(lm, seen)
    ]
    for name, site, got, expected in _pairs(lm, batch, seen):
        if real is not None and got.shape[:2] == real.shape:
            got, expected = got[real], expected[real]
        gap = (got - expected).float()
        scale = expected.float().abs().max().clamp_min(1e-6)
        relative = gap.norm() / expected.float().norm().clamp_min(1e-6)
        found.append(Check(name, str(site), float(gap.abs().max() / scale), float(relative), tolerance))
    return found


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
    """Logits, or the last hidden state of a model without a read-out, or the scores of an image and text pair."""
    names = ("logits", "last_hidden_state", "logits_per_text")
    return next(output[name] for name in names if output.get(name) is not None)


def _pairs(lm: LM, batch: Batch, seen: dict[Site, Tensor]) -> Iterator[tuple[str, Site, Tensor, Tensor]]:
    """(invariant, place, computed from parts, seen in the model)."""
    for tower, layers in lm.layout.layers.items():
        for layer in range(len(layers)):
            here = {p: seen[s] for p in _LAYER if (s := Site(tower, layer, p)) in seen}
            if here:
                yield from _layer_pairs(lm, Site(tower, layer, ""), here)
    plain = _last(lm(batch))
    yield "the output equals Hugging Face's", Site("", None, "logits"), seen[Site("", None, "ours")], plain
    if not lm.layout.head:
        return
    last = seen[Site("", lm.dims.layers - 1, "resid_post")]
    read = lm.readout(last)
    pooled = lm.family.pooled
    yield (
        "head(norm(resid_last)) == logits",
        Site("", None, "logits"),
        read if pooled is None else read[:, pooled],
        plain,
    )


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
    if tower.residual == "post-norm":
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
