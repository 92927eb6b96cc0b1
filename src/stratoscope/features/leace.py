"""LEACE: a concept taken out of what stands at a site, so that no linear reader finds it, and as
little else as can be.

Paper: textbook (Belrose et al., "LEACE: Perfect linear concept erasure in closed form", 2023)

    x' = x - W^-1 U U^T W (x - mean)        W = Cov[x]^-1/2,  U: an orthonormal basis of the columns
                                            of W Cov[x, z],  z: the label, one column for each kind

Then Cov[x', z] = 0, which is to say that no linear reader with a convex loss does better than one
that knows the shares of the kinds; and of all affine maps with that property this one moves x the
least, E |x' - x|^2, in every norm. `oblique=False` sets W = 1: the orthogonal projection, which
erases as well and moves more. `shrink` draws Cov[x] towards a multiple of 1 (Bodnar et al., 2014),
as so many texts allow: what is erased is the same, what else is moved is estimated better.

Reads as: what the model does without the concept, where it stood in linear form, once
`features.erasure_effects` says that it has gone from texts that were not fitted. Does not show that
the model has forgotten it: a curved reader may find it, and later layers may make it anew from
tokens before (erase at several layers: fit the next inside `with edit(lm, first)`).
Cost: one run of the texts up to the site; dim^3 for two decompositions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.select import Positions
from stratoscope.errors import InputError
from stratoscope.features._erasure import Eraser, Erasure, Tokens, erasure, vectors
from stratoscope.models.lm import LM

FAINT = 1e-9  # of the largest singular value: below this a direction is rounding


def shrunk(covariance: Float[Tensor, "dim dim"], n: int) -> Float[Tensor, "dim dim"]:
    """a S + (1 - a) tr(S) / dim, the nearest to the truth of its kind as dim and n grow together:
    a = 1 - tr(S)^2 / n / (|S|^2 - tr(S)^2 / dim), from 0 to 1."""
    dim, trace = len(covariance), covariance.trace()
    spread = covariance.pow(2).sum() - trace**2 / dim
    a = (1 - trace**2 / n / spread.clamp_min(1e-300)).clamp(0, 1)
    return a * covariance + (1 - a) * trace / dim * torch.eye(dim).to(covariance)


def closed_form(
    x: Float[Tensor, "vector dim"],
    z: Float[Tensor, "vector kind"],
    *,
    oblique: bool = True,
    shrink: bool = False,
) -> tuple[Float[Tensor, "dim rank"], Float[Tensor, "rank dim"]]:
    """W^-1 U and U^T W, whose product is what is taken out of x - mean; in the precision of x.
    Raises InputError where no label goes with any dimension of x."""
    x, z, n = x - x.mean(dim=0), z - z.mean(dim=0), len(x)
    cross = x.T @ z / n
    if not oblique:
        u = _basis(cross)
        return u, u.T
    covariance = x.T @ x / n
    sizes, axes = torch.linalg.eigh(shrunk(covariance, n) if shrink else covariance)
    real = sizes > sizes[-1] * len(sizes) * torch.finfo(sizes.dtype).eps
    root = sizes.clamp_min(0).sqrt()
    whiten = (axes * torch.where(real, 1 / root.clamp_min(1e-300), 0)) @ axes.T
    u = _basis(whiten @ cross)
    return ((axes * torch.where(real, root, 0)) @ axes.T) @ u, u.T @ whiten


def fit(
    lm: LM,
    inputs: Any,
    *,
    labels: Sequence[Any],
    site: str,
    tokens: Tokens = "read",
    oblique: bool = True,
    shrink: bool = True,
) -> Eraser:
    """The map that takes a concept out at a site, fitted to texts and their labels.

    inputs: texts. labels: a name of a kind for each text, or (tokens="every") for each of its
    tokens. tokens: whether the token at which the model is read (the last) stands for its text, or
    every token. Raises InputError for labels that are not one for each, of at least two kinds;
    SiteError for a site that the model lacks or that is no vector at a token.
    """
    x, number, text = vectors(lm, inputs, labels, site, tokens)
    z = torch.nn.functional.one_hot(torch.tensor(number)).double()
    left, right = closed_form(x, z, oblique=oblique, shrink=shrink)
    return Eraser(
        site=str(lm.layout.resolve_one(site)),
        mean=x.mean(dim=0).float(),
        left=left.float(),
        right=right.float(),
        provenance=lm.provenance,
        settings={
            "method": "features.leace",
            "kinds": z.shape[1],
            "texts": int(text.max()) + 1,
            "vectors": len(x),
            "tokens": tokens,
            "oblique": oblique,
            "shrink": shrink and oblique,
        },
        seed=None,
    )


def edit(
    lm: LM,
    request: Eraser | str | Path | Sequence[Eraser | str | Path],
    *,
    positions: Positions = None,
) -> Erasure:
    """An edit that erases: `with leace.edit(lm, eraser): lm(...)`.

    request: an eraser (this method's or another's), a folder of one, or several. positions: which
    tokens (-1 is each example's last; default all). Raises InputError for an eraser of another
    width than the model has at its site.
    """
    return erasure(lm, request, positions)


def _basis(cross: Float[Tensor, "dim kind"]) -> Float[Tensor, "dim rank"]:
    u, sizes, _ = torch.linalg.svd(cross, full_matrices=False)
    if not float(sizes[0]) > 0:
        raise InputError(
            "nothing at this site goes with the labels, to the last bit (the same vector for all "
            "texts?): there is nothing to erase."
        )
    return u[:, sizes > FAINT * sizes[0]]
