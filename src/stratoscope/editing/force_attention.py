"""Force attention: heads attend, from named tokens, to named others in given shares and to nothing
else, while the model runs.

Paper: circuit-reuse

    attn.pattern[layer][head, query, key] = weight of the key where it is named, else 0

The row stays a row of attention: its weights sum to 1, and what the head brings is made of the
values at the named keys. Scores are left as they are: weights written there would pass through
softmax once more and be spread over every token.

Reads as: what the model would say if these heads looked there, once outputs with and without the
edit are compared. Does not show that they look there of themselves, nor that where they look is all
that matters: what they read there is as it was. Compare with as many other heads of the same layers
forced alike, and with the same heads forced elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import replaced
from stratoscope.engine.select import Positions, as_index
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site


def shares(weights: Sequence[float] | None, keys: int) -> Tensor:
    """The weight of each of so many keys, (key,); without weights all alike.

    Raises InputError for as many as there are not, for one below 0, or a sum that is not 1.
    """
    given = [1 / keys] * keys if weights is None else [float(weight) for weight in weights]
    if len(given) != keys:
        raise InputError(f"{len(given)} weights for {keys} keys: give one for each key.")
    if not all(math.isfinite(x) and x >= 0 for x in given) or abs(sum(given) - 1) > 1e-6:
        raise InputError(
            f"weights {given} sum to {sum(given):g}: attention is shared out in parts of 0 or more "
            "that sum to 1. Divide them by their sum."
        )
    return torch.tensor(given)


def edit(
    lm: LM,
    request: Sequence[Sequence[int]],
    *,
    queries: Positions = -1,
    keys: Positions,
    weights: Sequence[float] | None = None,
) -> Edit:
    """An edit under which heads attend to these keys alone:
    `with force_attention.edit(lm, [(9, 3)], keys=[[4, 8], [3, 7]], weights=[0.5, 0.5]): lm(...)`.

    request: heads as (layer, head). queries: the tokens that attend (-1, each example's last).
    keys: the tokens attended to: one, a list, or one list of equal length for each example.
    weights: the share of each key, default all alike. While generating, queries are the prompt's.
    Raises SiteError for a layer that is not there or whose attention cannot be seen; InputError for
    a head that is not there, a key named twice or, in a causal model, after a query, and weights
    that are no shares of 1.
    """
    units = [tuple(unit) for unit in request]
    if not units or any(len(unit) != 2 for unit in units):
        raise InputError(
            f"heads are given as (layer, head), at least one; got {list(request)!r:.80}."
        )
    by_site: dict[Site, set[int]] = {}
    for layer, head in units:
        [site] = lm.layout.resolve(f"layers.{layer}.attn.pattern")
        if not 0 <= head < lm.dims.heads:
            raise InputError(
                f"head {head} of layer {site.layer}: this model has 0 to {lm.dims.heads - 1}."
            )
        by_site.setdefault(site, set()).add(int(head))
    share = shares(weights, _rows(lm, queries, keys).shape[1])
    held = []
    for site, heads in by_site.items():
        where = {"units": sorted(heads), "positions": queries}
        held += [replaced(site, 0.0, **where), replaced(site, share, **where, keys=keys)]
    names = ", ".join(
        f"L{site.layer}H{head}" for site, heads in by_site.items() for head in sorted(heads)
    )
    return Edit(lm, held, note=f"attention of {names} forced")


def _rows(lm: LM, queries: Positions, keys: Positions) -> Tensor:
    """The keys as numbers, (1 or example, key). Raises InputError for one that is named twice or,
    in a causal model, comes after a query."""
    if keys is None:
        raise InputError("keys=None: name the tokens that these heads are to attend to.")
    named = torch.atleast_2d(as_index(keys))
    twice = [row for row in named.tolist() if len({*row}) < len(row)]
    if twice:
        raise InputError(
            f"keys {twice[0]}: one is named twice; name it once, with a larger weight."
        )
    if any(min(row) < 0 <= max(row) for row in named.tolist()):
        raise InputError(
            f"keys {named.tolist()!r:.80}: counted from both ends two may be one token, and no row "
            "would be whole then. Count all of an example from the same end."
        )
    first = torch.atleast_2d(torch.tensor(0) if queries is None else as_index(queries))
    if len(named) > 1 < len(first) != len(named):
        raise InputError(f"keys of {len(named)} examples, and queries of {len(first)}.")
    key, query = named[:, :, None], first[:, None]
    # which of two comes first is known where both are counted from the same end
    later = (key > query) & ((key < 0) == (query < 0))
    if lm.family.towers[""].causal and bool(later.any()):
        raise InputError(
            f"keys {named.tolist()!r:.80}: some come after a query of {first.tolist()!r:.80}, and "
            "no token of a causal model sees a later one."
        )
    return named
