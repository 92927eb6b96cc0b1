"""Drop attention heads: what they read is set to zero, at every token or at some, while the model
runs.

Paper: textbook (Michel, Levy and Neubig, "Are Sixteen Heads Really Better than One?", 2019)

    attn.z[layer][position, head] = 0

The head still attends, and its keys and values stay in the cache; only what it brings is left out.
The attention output's bias, which is no head's, stays.

Reads as: what the model can do without these heads, once outputs with and without the edit are
compared. Does not show that they act alone: zero can be far from anything a head brings of itself,
and other heads may make up for it. Compare with as many random heads of all layers (`null`),
or of the same layers (`same_layers`): heads of early layers may be needed for anything at all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import ArrayLike

from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import ablate
from stratoscope.engine.select import Positions
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site

Head = tuple[int, int]


def strongest(score: ArrayLike, share: float, *, without: Collection[Head] = ()) -> list[Head]:
    """The share of all heads whose score (layer, head) is highest, as (layer, head), highest first;
    of equals the earlier.

    without: heads that are not taken, and the next ones are. Raises InputError for a score that is
    no number for each (layer, head), or a share that takes no head or more than there are.
    """
    table = np.asarray(score, dtype=float)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise InputError(
            f"score {table.shape}: one finite number for each (layer, head); take the mean over "
            "examples first."
        )
    count = round(share * table.size)
    order = [divmod(int(n), table.shape[1]) for n in np.argsort(-table.ravel(), kind="stable")]
    free = [head for head in order if head not in {*without}]
    if not 1 <= count <= len(free):
        raise InputError(
            f"share={share} of {table.size} heads is {count}; choose 1 to {len(free)} of them."
        )
    return free[:count]


def edit(
    lm: LM,
    request: Sequence[Sequence[int]],
    *,
    positions: Positions = None,
    null: int | None = None,
    same_layers: bool = False,
) -> Edit:
    """An edit without these heads: `with drop_heads.edit(lm, [(4, 2), (7, 0)]): lm(...)`.

    request: heads as (layer, head), such as `strongest` or `heads.answer_suppression.suppressors`
    gives. null: a seed; as many others, drawn at random from all layers, are dropped in their
    place; with same_layers as many in each layer. positions: at which tokens (-1 is each example's
    last; default all); while generating, named positions concern the prompt only. Raises SiteError
    for a layer that is not there or has no attention, InputError for a head that is not there.
    """
    units = [tuple(unit) for unit in request]
    if not units or any(len(unit) != 2 for unit in units):
        raise InputError(
            f"heads are given as (layer, head), at least one; got {list(request)!r:.80}."
        )
    by_site: dict[Site, set[int]] = {}
    for layer, head in units:
        [site] = lm.layout.resolve(f"layers.{layer}.attn.z")
        if not 0 <= head < lm.dims.heads:
            raise InputError(
                f"head {head} of layer {site.layer}: this model has 0 to {lm.dims.heads - 1}."
            )
        by_site.setdefault(site, set()).add(int(head))
    if null is not None:
        by_site = _random(lm, by_site, null, same_layers)
    dropped = [
        ablate(site, units=sorted(heads), positions=positions) for site, heads in by_site.items()
    ]
    names = ", ".join(
        f"L{site.layer}H{head}" for site, heads in by_site.items() for head in sorted(heads)
    )
    return Edit(lm, dropped, note=f"without {names}")


def _random(
    lm: LM, taken: dict[Site, set[int]], seed: int, same_layers: bool
) -> dict[Site, set[int]]:
    """As many heads that are not among these, from all layers alike, or as many of each layer."""
    generator, every = np.random.default_rng(seed), lm.layout.resolve("layers.*.attn.z")
    pools = [[site] for site in taken] if same_layers else [every]
    chosen: dict[Site, set[int]] = {}
    for pool in pools:
        heads = [(site, head) for site in pool for head in range(lm.dims.heads)]
        free = [(site, head) for site, head in heads if head not in taken.get(site, ())]
        count = sum(len(taken.get(site, ())) for site in pool)
        if count > len(free):
            where = f" in layer {pool[0].layer}" if same_layers else ""
            raise InputError(
                f"null={seed}: {len(free)} heads are left{where} to draw {count} from."
            )
        for number in sorted(generator.permutation(len(free))[:count]):
            site, head = free[number]
            chosen.setdefault(site, set()).add(head)
    return chosen
