"""Drop attention heads: what they read is set to zero, at every token or at some, while the model
runs.

Paper: textbook (Michel, Levy and Neubig, "Are Sixteen Heads Really Better than One?", 2019)

    attn.z[layer][position, head] = 0

The head still attends, and its keys and values stay in the cache; only what it brings is left out.
The attention output's bias, which is no head's, stays.

Reads as: what the model can do without these heads, once outputs with and without the edit are
compared. Does not show that they act alone: zero can be far from anything a head brings of itself,
and other heads may make up for it. Compare with as many random heads, and say of which layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import ablate
from stratoscope.engine.select import Positions
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site


def edit(lm: LM, request: Sequence[Sequence[int]], *, positions: Positions = None) -> Edit:
    """An edit without these heads: `with drop_heads.edit(lm, [(4, 2), (7, 0)]): lm(...)`.

    request: heads as (layer, head), such as `heads.answer_suppression.suppressors` gives.
    positions: at which tokens (-1 is each example's last; default all); while generating, named
    positions concern the prompt only. Raises SiteError for a layer that is not there or has no
    attention, InputError for a head that is not there.
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
    dropped = [
        ablate(site, units=sorted(found), positions=positions) for site, found in by_site.items()
    ]
    names = ", ".join(
        f"L{site.layer}H{head}" for site, found in by_site.items() for head in sorted(found)
    )
    return Edit(lm, dropped, note=f"without {names}")
