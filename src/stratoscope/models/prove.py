"""Proof of a family: invariants that hold on any model whose sites are named rightly, and fail when
one is not.

No reference implementation is needed: logits under our attention equal the model's own; pattern @ v
is z; what the parts write adds up to the residual, also where each part is made as large as the
stream; the projections turn z and the neurons into what is written; read-out gives logits; padding
reaches nothing. Absolute and relative error are both gated: a cosine would not see a scale factor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stratoscope.errors import FamilyError
from stratoscope.models import rewriting, ssm, trials, weights
from stratoscope.models.attention import repeat_heads, softmax_visible
from stratoscope.models.batch import Batch
from stratoscope.models.check import Check, Pair, fact, gap
from stratoscope.models.find_readout import answer_of, raw_output
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site


@torch.no_grad()
def checks(lm: LM, inputs: object) -> list[Check]:
    """Run every invariant that applies, in every layer of every tower that the inputs reach.

    tolerance: 1e-4 in fp32, 3e-2 in half precision, of the largest value and of the norm. Above 12
    layers that of half precision grows with the root of the depth, as rounding does: between two
    kernels, the logits of a Llama of 32 layers were seen 3.3e-2 apart.
    """
    _ = lm.readout  # looked for now: it says whether there is a site `logits`
    batch = lm.batch(inputs)
    seen = _capture(lm, batch)
    half = lm.model.dtype in (torch.float16, torch.bfloat16)
    tolerance = 3e-2 * max(1.0, lm.dims.layers / 12) ** 0.5 if half else 1e-4
    facts_found = [fact("the site is reached", s, False, tolerance) for s in _unreached(lm, seen)]
    changed, facts = rewriting.rewritten(lm, batch, seen, tolerance)
    for name, site, got, expected in (*_pairs(lm, batch, seen), *changed):
        there = batch.read_by(site.tower)
        if there is not None and there.mask is not None and got.shape[:2] == there.mask.shape:
            got, expected = got[there.mask], expected[there.mask]
        facts_found.append(gap(name, site, got, expected, tolerance))
    rounding = max(tolerance, weights.ROUNDING) if weights.quantised(lm.model) else tolerance
    alone = [gap(*pair, rounding) for pair in trials.padding(lm, batch, seen)]
    facts_found += facts + alone + trials.causality(lm, batch, seen, tolerance)
    facts_found += trials.mixing(lm, batch, tolerance) + trials.reading(lm, batch, seen, tolerance)
    return facts_found + list(_matrices(lm, tolerance))


def prove(lm: LM, inputs: object) -> list[Check]:
    """`checks`, raising FamilyError that names the worst failure."""
    every = checks(lm, inputs)
    failed = sorted((c for c in every if not c.holds), key=lambda c: -c.relative)
    kind = type(lm.model).__name__
    if failed and all(c.name == trials.PADDING for c in failed):
        raise FamilyError(
            f"{kind} lets padding through: a prompt beside a longer one has other states than "
            "alone (relative "
            f"{failed[0].relative:.1e}), so no result on several prompts would be right. Its "
            "attention must honour "
            f"`attention_mask`; refused."
        )
    if failed:
        worst = failed[0]
        raise FamilyError(
            f"family `{lm.family.name}` does not hold on {kind}: {len(failed)} of {len(every)} "
            f"invariants fail, worst `{worst.name}` at {worst.place} (absolute "
            f"{worst.absolute:.1e}, relative "
            f"{worst.relative:.1e}, allowed {worst.tolerance:.0e}). The site names would lie, so "
            "it is refused."
        )
    return every


def _matrices(lm: LM, tolerance: float) -> Iterator[Check]:
    """W x + b == module(x) of what `lm.weight` reads, on one module of each kind (plain, quantised,
    adapted)."""
    kinds = {}
    for name, layers in lm.layout.layers.items():
        for layer in range(len(layers)):
            for point in _WRITTEN:
                site = Site(name, layer, point)
                if point in lm.layout.tower(site).points and lm.layout.write(site):
                    module = lm.layout.writers(site)[0]
                    kinds.setdefault(
                        (name, point, type(module), weights.is_plain(module)), (site, module)
                    )
    for (*_, plain), (site, module) in kinds.items():
        applied, true = weights.tried(module)
        yield gap(
            "W x == module(x)",
            site,
            applied,
            true,
            tolerance if plain else max(tolerance, weights.ROUNDING),
        )


def _unreached(lm: LM, seen: dict[Site, Tensor]) -> list[Site]:
    """Sites of the main tower, and of the one that it reads, that no forward pass showed (a vision
    tower or projector needs images to be reached)."""
    always = ("", lm.family.source)
    return [s for s in lm.sites() if s not in seen and s.tower in always and s.point != "projector"]


def _capture(lm: LM, batch: Batch) -> dict[Site, Tensor]:
    """The value at every site, and the output three ways: under our attention, plainly, and what
    the model answers.

    What no invariant asks for is noted, not kept, and of self-attention's pattern what it makes of
    v: those of an encoder of 1500 frames, all layers' at once, would fill the memory.
    """
    seen: dict[Site, Tensor] = {}

    def keep(site: Site, x: Tensor, run: object) -> None:
        if site.point in ("attn.q", "attn.k", "attn.scores"):
            x = x.flatten()[:1]
        elif site.point == "attn.pattern":
            x = _read(x, seen[replace(site, point="attn.v")])
        seen[site] = x.detach().clone()

    reads = {site: [partial(keep, site)] for site in lm.sites()}
    with lm.taps.using(reads=reads):
        seen[Site("", None, "ours")] = _last(raw_output(lm, batch))
    # no listener, and no dropout: the proof must not depend on how the user left the model
    with lm.taps.using():
        plain = raw_output(lm, batch)
    seen[Site("", None, "plain")] = _last(plain)
    if not lm.readout.reason:
        seen[Site("", None, "own")] = answer_of(plain)
    return seen


def _last(output: Any) -> Tensor:
    """What the model is run for: logits, or the last hidden state, or the scores of an image and
    text pair."""
    return next(x for x in output.values() if isinstance(x, Tensor))


def _pairs(lm: LM, batch: Batch, seen: dict[Site, Tensor]) -> Iterator[Pair]:
    """(invariant, place, computed from parts, seen in the model)."""
    for tower, layers in lm.layout.layers.items():
        for layer in range(len(layers)):
            here = {p: seen[s] for p in _LAYER if (s := Site(tower, layer, p)) in seen}
            if here:
                yield from _layer_pairs(lm, Site(tower, layer, ""), here)
        if not (lm.family.towers[tower].between and batch.extra):
            yield from _chain(tower, len(layers), seen)
    yield from trials.apart(lm, batch, seen)
    plain = seen[Site("", None, "plain")]
    yield (
        "the output equals Hugging Face's",
        Site("", None, "logits"),
        seen[Site("", None, "ours")],
        plain,
    )
    if lm.readout.reason:
        return
    last, own = seen[Site("", lm.dims.layers - 1, "resid_post")], seen[Site("", None, "own")]
    read = lm.readout(last) if lm.readout.where == "every" else lm.readout.of(last, batch)
    yield (
        "head(norm(resid_last)) == logits",
        Site("", None, "logits"),
        read,
        own.reshape(read.shape),
    )


def _chain(tower: str, depth: int, seen: dict[Site, Tensor]) -> Iterator[Pair]:
    """What leaves a layer is what enters the next: a model may add to the stream, or convolve it,
    in between."""
    for layer in range(depth - 1):
        left, entered = Site(tower, layer, "resid_post"), Site(tower, layer + 1, "resid_pre")
        if left in seen and entered in seen:
            yield "resid_post enters the next layer", left, seen[left], seen[entered]


_LAYER = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn.v",
    "attn.pattern",
    "attn.z",
    "attn.out",
    "ssm.in",
    "ssm.gate",
    "ssm.delta",
    "ssm.z",
    "mix.out",
    "cross.v",
    "cross.scores",
    "cross.pattern",
    "cross.z",
    "cross.out",
    "mlp.act",
    "mlp.out",
)
_WRITTEN = {
    "attn.out": "attn.z",
    "cross.out": "cross.z",
    "mix.out": "ssm.z",
    "mlp.out": "mlp.act",
}


def _read(pattern: Tensor, v: Tensor) -> Tensor:
    """pattern @ v: (example, query, head, head_dim)."""
    repeated = repeat_heads(v.transpose(1, 2), pattern.shape[1] // v.shape[2])
    return (pattern @ repeated).transpose(1, 2)


def _layer_pairs(lm: LM, at: Site, x: dict[str, Tensor]) -> Iterator[Pair]:
    tower = lm.layout.tower(at)
    site = lambda point: Site(at.tower, at.layer, point)  # noqa: E731
    for kind in ("attn", "cross"):
        if f"{kind}.pattern" in x and not tower.gated:
            z = x["attn.pattern"] if kind == "attn" else _read(x["cross.pattern"], x["cross.v"])
            yield "pattern @ v == z", site(f"{kind}.z"), z, x[f"{kind}.z"]
    if "cross.scores" in x:
        pattern = softmax_visible(x["cross.scores"])
        yield "softmax(scores) == pattern", site("cross.pattern"), pattern, x["cross.pattern"]
    if "ssm.z" in x:
        given = (x["resid_pre"], x["ssm.in"], x["ssm.gate"], x.get("ssm.delta"))
        yield (
            "the recurrence of ssm.in and ssm.gate == ssm.z",
            site("ssm.z"),
            ssm.written_out(lm.layout.layer(at), *given),
            x["ssm.z"],
        )
    for end, start in _WRITTEN.items():
        if start in x and end in x and lm.layout.write(site(end)):
            value = x[start].flatten(2)
            for module in lm.layout.writers(site(end)):
                value = module(value)
            yield f"W({start}) == {end}", site(end), value, x[end]
    if tower.residual == "post-norm" and tower.norms is not None:
        *before, last = lm.layout.norms(at)
        middle, sum_text = x["resid_pre"], "resid_pre"
        for norm, part in zip(before, [p for p in ("attn.out", "cross.out") if p in x]):
            middle, sum_text = norm(middle + x[part]), f"norm({sum_text} + {part})"
        yield f"{sum_text} == resid_mid", at, middle, x["resid_mid"]
        yield (
            "norm(resid_mid + mlp.out) == resid_post",
            at,
            last(x["resid_mid"] + x["mlp.out"]),
            x["resid_post"],
        )
        return
    parts = [p for p in ("attn.out", "mix.out", "cross.out", "mlp.out") if p in x]
    total = sum((x[p] for p in parts), start=x["resid_pre"])
    yield (
        f"{' + '.join(['resid_pre', *parts])} == resid_post",
        site("resid_post"),
        total,
        x["resid_post"],
    )
    if "resid_mid" in x and "mlp.out" in x:
        yield (
            "resid_mid + mlp.out == resid_post",
            site("resid_mid"),
            x["resid_mid"] + x["mlp.out"],
            x["resid_post"],
        )
