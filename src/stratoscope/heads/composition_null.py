"""Composition beyond chance: of the scores of heads' compositions, those that neither random
matrices nor heads that cannot hear each other have.

Paper: textbook (Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021)

    score[w -> h.k] = |Q^T K O V|_F / (|Q^T K|_F |O V|_F)        .q, .v: heads.composition
    z               = (score^2 - 1 / dim) / sd

sd is that of score^2 where O V is turned at random, its singular values kept: with p, q the squared
singular values of the two matrices, each as shares of their sum, and a = sum p^2, b = sum q^2,

    E score^2 = 1 / dim
    E score^4 = (3 a b + a (1 - b) + (1 - a) b) / (dim (dim + 2))
                + (1 - a) (1 - b) (dim + 1) / ((dim - 1) dim (dim + 2))

null: z of the pairs whose writer stands in the same or a later layer than the reader
(`impossible`). Trained matrices all live in the same few directions of the stream, so that chance
pairs score above random matrices; these pairs have that in common with real ones, and no path
between them. `bound`: what one in twenty of them exceeds, side by side (q, k, v).
Reads as: pairs of heads whose weights fit each other, beyond what any two heads of this model have.
An edge counts where z > bound; of many edges, where z exceeds all of the impossible ones. Does not
show that the pair works together on any prompt, nor does a small score show that it does not: what
MLPs make of a write is left out.
Cost: two products for each head that reads, with the components of all that write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.wiring import SIDES, Path, wiring
from stratoscope.errors import InputError
from stratoscope.heads import composition
from stratoscope.maths.resample import bound
from stratoscope.models.lm import LM
from stratoscope.results import dataset

NULL = "the same of pairs whose writer stands in the same or a later layer than the reader"
AXES = {
    "impossible": "a pair of heads that is no edge: the writer is in no earlier layer",
    "side": "the input of a head that is written to: its query, key or value",
}


def moments(
    p: Float[Tensor, " rank"], q: Float[Tensor, "*writer other"], dim: int
) -> tuple[float, Float[Tensor, "*writer"]]:
    """Mean and standard deviation of score^2 where one of two matrices is turned at random.

    p, q: squared singular values of each, as shares of their sum. The entries of the block that
    joins the two are those of a random orthogonal matrix, whose fourth moments are known.
    """
    a, b = p.pow(2).sum(dim=-1), q.pow(2).sum(dim=-1)
    fourth = (3 * a * b + a * (1 - b) + (1 - a) * b) / (dim * (dim + 2))
    fourth = fourth + (1 - a) * (1 - b) * (dim + 1) / ((dim - 1) * dim * (dim + 2))
    return 1 / dim, (fourth - 1 / dim**2).clamp_min(0).sqrt()


def shares(s: Float[Tensor, "*head rank"]) -> Float[Tensor, "*head rank"]:
    """Squared singular values as shares of their sum."""
    squares = s.pow(2)
    return squares / squares.sum(dim=-1, keepdim=True).clamp_min(1e-30)


@torch.no_grad()
def measure(lm: LM, inputs: Sequence[Sequence[int]] | None = None) -> xr.Dataset:
    """score, z (edge,) of every head's write to the heads of later layers; null_score, null_z
    (impossible,); bound (side,).

    inputs: the heads that read, as (layer, head), default all; no prompt takes part. Edges are
    named as in circuits: "L0H1 -> L1H2.k". Raises InputError for a head that is not there;
    SiteError where q, k and v are not linear in the stream.
    """
    wires = wiring(lm)
    readers = _checked(lm, inputs)
    (q, k, v), o = composition.reads(lm), composition.writes(lm)
    u, s, _ = composition.svd_of_product(o, v)
    writers, q_shares = u.flatten(0, 1), shares(s).flatten(0, 1)
    loud = q_shares.sqrt()
    rows: list[tuple[Tensor, Tensor]] = []
    paths: list[Path] = []
    no_paths: list[tuple[int, int, int]] = []  # a writer's number among heads, a reader's, a side
    split: list[tuple[Tensor, Tensor]] = []
    for layer, head in readers:
        a, b, c, d = (x[layer, head] for x in (q, k, v, o))
        before = layer * wires.heads  # heads of earlier layers come first
        first = layer * (3 * wires.heads + 1) + 3 * head
        for side, (outer, inner) in enumerate(((b.T, a), (a.T, b), (d, c))):
            score = (composition.composition(outer, inner, writers) * loud).norm(dim=-1)
            p = shares(composition.svd_of_product(outer, inner)[1])
            mean, spread = moments(p, q_shares, lm.dims.dim)
            z = (score**2 - mean) / spread.clamp_min(1e-30)
            rows.append((score[:before], z[:before]))
            split.append((score[before:], z[before:]))
            for number in range(len(writers)):
                at, which = divmod(number, wires.heads)
                if number < before:
                    paths.append(((wires.head(at) + which,), (first + side,)))
                else:
                    no_paths.append((number, layer * wires.heads + head, side))
    score, z = (torch.cat(column) for column in zip(*rows))
    null_score, null_z = (torch.cat(column) for column in zip(*split))
    sides = torch.tensor([side for *_, side in no_paths])
    name = lambda number: f"L{number // wires.heads}H{number % wires.heads}"  # noqa: E731
    return dataset(
        {
            "score": (("edge",), score),
            "z": (("edge",), z),
            "null_score": (("impossible",), null_score),
            "null_z": (("impossible",), null_z),
            "bound": (("side",), [bound(null_z.cpu()[sides == side].numpy()) for side in range(3)]),
            "expected": ((), lm.dims.dim**-0.5),
        },
        method="heads.composition_null",
        provenance=lm.provenance,
        coords=wires.coords(paths)
        | {
            "impossible": [f"{name(w)} -> {name(r)}.{SIDES[side]}" for w, r, side in no_paths],
            "side": list(SIDES),
        },
        null_kind=NULL,
    )


def _checked(lm: LM, inputs: Any) -> list[tuple[int, int]]:
    sizes = lm.dims.layers, lm.dims.heads
    every = [(layer, head) for layer in range(sizes[0]) for head in range(sizes[1])]
    given = every if inputs is None else [tuple(head) for head in inputs]
    if strange := [head for head in given if head not in every]:
        raise InputError(
            f"head {strange[0]}: heads are (layer, head), 0 to {sizes[0] - 1} and {sizes[1] - 1}."
        )
    if not any(layer for layer, _ in given):
        raise InputError("no head that reads stands behind another one: give one of a later layer.")
    return given
