"""Composition of heads, from their weights: how far what one head writes is what a later head
reads, and by which part.

Paper: talking-heads

    W_OV = O V = sum_r  s_r u_r v_r^T                 the components of head w, strongest first
    score[w -> h.k]       = |Q^T K O V|_F / (|Q^T K|_F |O V|_F)           .q: K^T Q O V;  .v: O' V'
                                                                          O V
    component_score       = the same with u_r v_r^T in the place of O V, for the best r

Q, K, V (head_dim, dim) of a reader hold the norm before it: its weight, LayerNorm's centring,
neither bias nor scale. They are found by asking the layer itself, at position 0, where rotary
embedding turns nothing: scores are those of equal positions. O (dim, head_dim) of a writer holds
the weight of a post-norm. With grouped queries each query head has its own Q and O, and the K and V
that it shares. What MLPs in between make of a write is left out.

null: in random directions a score, or one component's, is about 1 / sqrt(dim); the best of many is
higher. used[layer, head, rank]: of what the head writes on the prompts, the share along u_r, as
squared length.

Reads as: which heads can talk to which, over which channel. Does not show that they do: weights
know no prompt (`edit`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from stratoscope.engine.alone import Layers
from stratoscope.engine.edit import Edit
from stratoscope.engine.trace import capture
from stratoscope.engine.wiring import Path, wiring
from stratoscope.errors import InputError, SiteError
from stratoscope.maths.norm import freeze
from stratoscope.models.lm import LM
from stratoscope.models.weights import matrix
from stratoscope.results import dataset

# a component that weak is rounding; at a probe's mean square 1e4 a norm's epsilon vanishes
SILENT, LOUD = 0.01, 100.0


def svd_of_product(
    left: Float[Tensor, "*head dim inner"], right: Float[Tensor, "*head inner dim"]
) -> tuple[
    Float[Tensor, "*head dim rank"], Float[Tensor, "*head rank"], Float[Tensor, "*head rank dim"]
]:
    """The SVD of left @ right by way of two small triangles: as many components as the product can
    have."""
    q1, r1 = torch.linalg.qr(left)
    q2, r2 = torch.linalg.qr(right.mT)
    u, s, vt = torch.linalg.svd(r1 @ r2.mT)
    return q1 @ u, s, vt @ q2.mT


def composition(
    outer: Float[Tensor, "dim inner"],
    inner: Float[Tensor, "inner dim"],
    u: Float[Tensor, "*head dim rank"],
) -> Float[Tensor, "*head rank"]:
    """|outer inner u_r| / |outer inner|_F for every direction u_r: the score of each component, its
    strength left out."""
    gram = outer.T @ outer  # |outer y|^2 = y^T gram y
    y = inner @ u
    size = (gram @ (inner @ inner.T)).trace().clamp_min(1e-30)
    return ((y * (gram @ y)).sum(dim=-2).clamp_min(0) / size).sqrt()


@torch.no_grad()
def measure(lm: LM, inputs: Any, *, top: int | None = None) -> xr.Dataset:
    """score, component_score, component of every edge between heads of different layers, (edge,);
    used; null.

    Edges are named as in circuits: "L0H1 -> L1H2.k". component: which of the sender's scores best,
    0 the strongest; those weaker than a hundredth of the strongest do not count. inputs: prompts,
    for `used` alone. top: how many of a sender's strongest may be chosen (default all). Raises
    SiteError where q, k and v are not linear in the stream.
    """
    wires = wiring(lm)
    if wires.layers < 2:
        raise SiteError(
            f"this {lm.family.name} has one layer: no head writes before another one reads."
        )
    (q, k, v), o = reads(lm), writes(lm)
    u, s, _ = svd_of_product(o, v)
    if top is not None and not 1 <= top <= u.shape[-1]:
        raise InputError(f"top={top}: choose 1 to {u.shape[-1]} components.")
    strength = s / s.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    silent = s < SILENT * s[..., :1]
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    paths: list[Path] = []
    for layer in range(1, wires.layers):
        before, loud, weak = (x[:layer].flatten(0, 1) for x in (u, strength, silent))
        senders = [
            wires.head(earlier) + head for earlier in range(layer) for head in range(wires.heads)
        ]
        for head in range(wires.heads):
            a, b, c, d = (x[layer, head] for x in (q, k, v, o))
            sides = ((b.T, a), (a.T, b), (d, c))
            # (side, sender, rank)
            each = torch.stack([composition(*side, before) for side in sides])
            best = each.masked_fill(weak, 0)[..., :top].max(dim=-1)
            columns.append(((each * loud).norm(dim=-1), best.values, best.indices))
            first = layer * (3 * wires.heads + 1) + 3 * head
            paths += [((sender,), (first + side,)) for side in range(3) for sender in senders]
    score, component_score, component = (
        torch.cat([x.flatten() for x in column]) for column in zip(*columns)
    )
    return dataset(
        {
            "score": (("edge",), score),
            "component_score": (("edge",), component_score),
            "component": (("edge",), component),
            "used": (("layer", "head", "rank"), _used(lm, inputs, o, u)),
            "null": ((), lm.dims.dim**-0.5),
        },
        method="heads.composition",
        provenance=lm.provenance,
        settings={"top": top},
        coords=wires.coords(paths)
        | {
            "layer": list(range(wires.layers)),
            "head": list(range(wires.heads)),
            "rank": list(range(u.shape[-1])),
        },
        null_kind="the score of random directions, 1 / sqrt(dim)",
    )


@torch.no_grad()
def edit(
    lm: LM,
    request: Sequence[Sequence[int]],
    *,
    components: Sequence[int] = (0, 1, 2),
    factor: float = 0.0,
    null: int | None = None,
) -> Edit:
    """An edit of weights that scales components of heads' W_OV: 0 takes them out, 2 makes them
    twice as loud.

    request: heads as (layer, head). components: which of each, 0 the strongest. null: a seed; as
    many random directions that the head can write are scaled instead. Raises InputError for a head
    or a component that is not there.
    """
    _, _, v = reads(lm)
    o, deltas = writes(lm), {}
    names = {parameter: name for name, parameter in lm.model.named_parameters()}
    generator = None if null is None else torch.Generator().manual_seed(null)
    for head in request:
        if len(head) != 2 or not (0 <= head[0] < len(o) and 0 <= head[1] < o.shape[1]):
            raise InputError(
                f"head {tuple(head)}: heads are (layer, head), 0 to {len(o) - 1} and "
                f"{o.shape[1] - 1}."
            )
        layer, number = head
        projection, *post = lm.layout.writers(lm.layout.resolve_one(f"layers.{layer}.attn.out"))
        if post:
            raise SiteError(
                f"{lm.family.name} norms what its heads write together: no component can be scaled "
                "alone."
            )
        u = svd_of_product(o[layer, number], v[layer, number])[0]
        if not components or not all(0 <= c < u.shape[1] for c in components):
            raise InputError(
                f"components {list(components)}: each head has {u.shape[1]}, numbered from 0."
            )
        basis = u[:, list(components)]
        if generator is not None:
            basis = torch.linalg.qr(
                u @ torch.randn(u.shape[1], len(components), generator=generator).to(u)
            ).Q
        size = lm.dims.head_dim
        delta = torch.zeros_like(matrix(projection), dtype=u.dtype)
        delta[:, number * size : (number + 1) * size] = (
            (factor - 1) * basis @ (basis.T @ o[layer, number])
        )
        name = names[projection.weight]  # type: ignore[index]
        deltas[name] = deltas.get(name, 0) + (
            delta.T.contiguous() if isinstance(projection, Conv1D) else delta
        )
    heads = ", ".join(f"L{layer}H{number}" for layer, number in request)
    return Edit(lm, deltas=deltas, note=f"components {list(components)} of {heads} times {factor}")


@torch.no_grad()
def reads(lm: LM) -> Float[Tensor, "side=3 layer head head_dim dim"]:
    """Q, K, V of every query head, with the norm before them, up to one factor. Raises SiteError if
    they are not linear."""
    wiring(lm)  # refuses what has no such sides
    if not lm.dims.vocab:
        raise SiteError(f"{lm.family.name} does not run on text alone: no token to probe it with.")
    eye, wave = torch.eye(dim := lm.dims.dim), (-1.0) ** torch.arange(lm.dims.dim)
    wave = (wave - wave.mean()) / dim**0.5
    probe = LOUD * dim**0.5 * torch.cat([eye, -eye, torch.stack([2 * eye[0], wave])])
    scores = []
    with lm.taps.only(), Layers(lm, lm.batch([[1]])) as layers:  # of the weights, not of a run
        for layer in range(lm.dims.layers):
            seen = layers.attention(layer, probe[:, None].to(lm.model.device, lm.model.dtype))
            # (3, probe, head, head_dim)
            sides = torch.stack([x[:, :, 0].float() for x in (seen.q, seen.k, seen.v)])
            up, down, others = sides.split([dim, dim, 2], dim=1)
            odd, bias = (up - down) / 2, (up + down)[:, :1] / 2
            louder, mixed = (others - bias).unbind(dim=1)
            sums = torch.einsum("sdhk,d->shk", odd, wave.to(odd))
            fit = sums * (mixed * sums).sum() / sums.pow(2).sum()
            if (mixed - fit).norm() > 0.02 * mixed.norm() or (
                louder - odd[:, 0]
            ).norm() > 0.02 * odd[:, 0].norm():
                raise SiteError(
                    f"q, k and v of {lm.family.name} are not linear in the stream but for one norm "
                    "before them (a norm of "
                    "queries and keys, or none before attention): there are no matrices to "
                    "compose."
                )
            scores.append(odd.permute(0, 2, 3, 1) / dim**0.5)
    return torch.stack(scores, dim=1)


@torch.no_grad()
def writes(lm: LM) -> Float[Tensor, "layer head dim head_dim"]:
    """O of every head, with the weight of a post-norm where there is one."""
    outputs = []
    for site in lm.layout.resolve("layers.*.attn.out"):
        projection, *post = lm.layout.writers(site)
        o = matrix(projection).float().unflatten(1, (lm.dims.heads, -1)).permute(1, 0, 2)
        for norm in post:
            frozen = freeze(norm, o.mT)
            o = replace(frozen, scale=torch.ones_like(frozen.scale)).linear(o.mT).mT
        outputs.append(o)
    return torch.stack(outputs)


def _used(lm: LM, inputs: Any, o: Tensor, u: Tensor) -> Float[Tensor, "layer head rank"]:
    """Of the squared length of what a head writes, at all real tokens together, the share along
    each component."""
    batch = lm.batch(inputs)
    # (layer, token, head, .)
    z = capture(lm, batch, "layers.*.attn.z").stack("layers.*.attn.z")[:, batch.text[1]].float()
    along = torch.einsum("lthk,lhdk,lhdr->lthr", z, o, u).pow(2).sum(dim=1)
    return along / along.sum(dim=-1, keepdim=True).clamp_min(1e-30)
