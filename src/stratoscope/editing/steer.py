"""Steer: from pairs of texts that differ in one thing a vector for it, added while the model runs.

Paper: textbook (Rimsky et al., "Steering Llama 2 via contrastive activation addition", 2024; the
principal component: Zou et al., "Representation engineering", 2023)

    d[pair] = h(positive) - h(negative)             h: what stands at the site, at chosen tokens
    mean:         v = mean over pairs of d
    pca:          v = u (mean of d . u),  u the first right singular vector of d, not centred
    attribution:  as mean, h a mean over all tokens, each weighted by |d[token] . dF/dh[token]|,
                  F = logit(answer) - logit(foil),  dF/dh the mean of both texts
    inside the edit:   x' = x + strength v,   with keep_norm   x' = (x + strength v) |x| / |x + ...|

Tokens of two texts are counted from the end. (h . dF/dh would not do: it is 0 wherever a norm is
all that reads h, since a longer h changes nothing there.)

d is not centred: what all pairs have in common is their mean, and centring takes just that away
(the axis left is where pairs differ from each other). A component has no sign of its own; the mean
projection of d on it gives one, and the length: strength 1 means the same for mean and pca.

Reads as: a direction along which the two kinds of texts lie apart at this site, and what the model
says when it is pushed along it. Does not show that the model uses that direction, nor that it is
the thing meant: length, topic or one word that goes with it gives a vector too. `steering_grid`
sets it beside random directions and beside the vector of labels dealt out anew.
Cost: fit, one run of every text up to the last site (attribution: forward and backward); inside the
edit, one addition a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stratoscope.editing import _pairs
from stratoscope.editing._steered import Steer, fitting, refuse_other_model
from stratoscope.engine.intervene import add
from stratoscope.engine.metric import Words
from stratoscope.engine.select import Positions
from stratoscope.errors import InputError, SiteError
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site, parse
from stratoscope.store.fitted import Fitted

WAYS = ("mean", "pca", "attribution")
States = Float[Tensor, "2 pair *units"]  # of each pair's negative text, and of its positive one


@dataclass(frozen=True, eq=False, kw_only=True)
class Steering(Fitted):
    """One vector for each site, by the site's name: (dim,), or (head, head_dim) of heads.

    states: what the vectors were made of, (2, pair, ...) each, negative texts first; None of
    vectors that were read from another program's file.
    """

    vectors: dict[str, Tensor]
    states: dict[str, Tensor] | None = None

    @property
    def agreement(self) -> dict[str, float]:
        """At each site the share of pairs whose difference points the vector's way."""
        shares = {}
        for site, both in (self.states or {}).items():
            along = ((both[1] - both[0]) * self.vectors[site]).flatten(1).sum(dim=1)
            shares[site] = float((along > 0).double().mean())
        return shares

    def at(self, layers: int | Sequence[int] | Literal["all"] | None = None) -> dict[Site, Tensor]:
        """The vectors of some layers by site, first layer first.

        Raises InputError for a layer that has none, and, without `layers`, where there are several:
        vectors of all layers added at once are not what one of them does.
        """
        there = {parse(name): vector for name, vector in self.vectors.items()}
        there = dict(sorted(there.items(), key=lambda pair: (pair[0].layer or 0, str(pair[0]))))
        if layers == "all":
            return there
        named = sorted({int(site.layer) for site in there if site.layer is not None})
        if layers is None and len(there) == 1:
            return there
        wanted = [layers] if isinstance(layers, int) else list(layers or ())
        if not wanted or (missing := set(wanted) - set(named)):
            asked = f"layers {sorted(missing)}" if wanted else "no layer was named"
            raise InputError(
                f"{asked}: there are vectors of {len(there)} sites, of layers {named}. Say which "
                "with layers=, a number or a list, or 'all' to add all of them at once."
            )
        return {site: vector for site, vector in there.items() if site.layer in wanted}


def direction(states: States, how: str = "mean") -> Float[Tensor, "*units"]:
    """The vector of what stands at one site; zero where both sides are alike."""
    apart = (states[1] - states[0]).double()
    mean = apart.mean(dim=0)
    if how == "pca":
        line = torch.linalg.svd(apart.flatten(1), full_matrices=False).Vh[0]
        mean = (line * (mean.flatten() @ line)).reshape(mean.shape)
    return mean.float()


def fit(
    lm: LM,
    inputs: Any,
    *,
    site: str | Sequence[str] = "layers.*.resid_post",
    how: str = "mean",
    positions: int | Sequence[int] | None = -1,
    answer: Words = None,
    foil: Words = None,
) -> Steering:
    """A vector at each site, of pairs of texts that differ in one thing.

    inputs: pairs (positive, negative), rows {"positive": ..., "negative": ...}, or the two sides
    {"positive": texts, "negative": texts}. site: one or several, of any point with one vector a
    token. positions: the tokens that are read, -1 each text's last, None the mean of all.
    answer, foil: for how="attribution", what the tokens are weighted by; it reads all tokens.
    Raises InputError for no pair or half a pair, another `how`, and sides that are alike at a
    site; SiteError for a site that the model lacks or whose values belong to no one token.
    """
    if how not in WAYS:
        raise InputError(f"how={how!r}: choose 'mean', 'pca' or 'attribution'.")
    if how == "attribution" and (answer is None or foil is None):
        raise InputError("attribution weighs tokens by logit(answer) - logit(foil): give both.")
    sites = [one for name in ([site] if isinstance(site, str) else site) for one in lm.sites(name)]
    for one in sites:
        if one.axes[:2] != ("example", "position"):
            raise SiteError(
                f"`{one}` has the axes {', '.join(one.axes)}: a steering vector is of a site with "
                "one vector at each token, such as resid_post, mlp.out or attn.z."
            )
    sides = _pairs.sides(lm, inputs)
    if how == "attribution":
        read = _pairs.weighted(lm, sides, sites, answer, foil)
    else:
        read = [_pairs.read(lm, side, sites, positions) for side in sides]
    states = {str(one): torch.stack([side[one] for side in read]) for one in sites}
    vectors = {name: direction(both, how) for name, both in states.items()}
    alike = [name for name, vector in vectors.items() if not float(vector.norm()) > 0]
    if alike:
        raise InputError(
            f"the two sides are the same at `{alike[0]}`: read other tokens with positions=, or "
            "give texts that differ before the tokens that are read."
        )
    settings = {
        "model_type": lm.model.config.model_type,
        "site": site,
        "how": how,
        "positions": positions,
    }
    settings |= {"answer": answer, "foil": foil, "pairs": len(sides[0])}
    return Steering(
        vectors=vectors, states=states, settings=settings, seed=None, provenance=lm.provenance
    )


def edit(
    lm: LM,
    request: Steering | str | Path | Mapping[str, Tensor],
    *,
    strength: float = 1.0,
    layers: int | Sequence[int] | Literal["all"] | None = None,
    positions: Positions = None,
    units: Sequence[int] | None = None,
    keep_norm: bool = False,
    foreign: bool = False,
) -> Steer:
    """An edit that adds vectors: `with steer.edit(lm, fitted, layers=12, strength=4): lm(...)`.

    request: a fit, its folder, or vectors by site. layers: whose vectors, where there are several.
    positions: which tokens, default all, new ones while generating too; named ones are the
    prompt's. units: of heads or neurons, which ones. keep_norm: every token keeps its length.
    foreign: take vectors fitted on other weights than these. Raises InputError for vectors of
    another model or width, a strength that is no finite number or makes the stream too long for
    the model's dtype, and a layer without a vector; SiteError for a site that the model lacks.
    """
    fitted = read(lm, request, foreign=foreign)
    changes = []
    for site, vector in fitted.at(layers).items():
        added = fitting(lm, site, vector, strength)
        chosen = added if units is None else added[list(units)]
        changes.append(add(site, chosen, positions=positions, units=units))
    names = ", ".join(str(change.site) for change in changes[:4])
    more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
    note = f"steered at {names}{more} with strength {strength:g}"
    return Steer(lm, changes, keep_norm=keep_norm, note=note)


def read(
    lm: LM, request: Steering | str | Path | Mapping[str, Tensor], *, foreign: bool = False
) -> Steering:
    """Vectors as a fit: one, that of a folder, or given ones. Raises InputError for those of
    another model, LoadError for a folder that holds none."""
    if isinstance(request, Mapping):
        given = {str(parse(name)): torch.as_tensor(x).float() for name, x in request.items()}
        return Steering(vectors=given, settings={}, seed=None, provenance={})
    fitted = request if isinstance(request, Steering) else Steering.load(request)
    if not foreign:
        refuse_other_model(lm, fitted.provenance)
    return fitted
