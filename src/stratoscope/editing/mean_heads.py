"""Mean heads: what heads bring is replaced by its mean over other prompts, while the model runs.

Paper: arithmetic-heads

    attn.z[layer][position, head] = mean over prompts of attn.z[layer][position, head]

The mean of a template's prompts holds what all of them share and nothing of the one at hand, so a
head is left all but what it knows of this prompt; zero (`editing.drop_heads`) takes away more.

Reads as: what the answer owes to what these heads know of this prompt, once outputs with and
without the edit are compared. Does not show that they act alone. Compare with as many other heads,
of the same layers. Prompts of another template have another mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import replaced
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site


@torch.no_grad()
def edit(
    lm: LM, request: Sequence[Sequence[int]], *, prompts: Any, last: int | None = None
) -> Edit:
    """An edit under which heads bring their mean: `with mean_heads.edit(lm, [(9, 3)],
    prompts=others): lm(...)`.

    request: heads as (layer, head). prompts: of one template, all of equal token length; the mean
    is taken place by place, and stands at the same places of what is run inside. last: only the
    last so many places, counted from each prompt's end, so that its length does not matter. While
    generating, places are the prompt's. Raises SiteError for a layer that is not there; InputError
    for a head that is not there, prompts of different length, or fewer places than `last`.
    """
    units = [tuple(unit) for unit in request]
    if not units or any(len(unit) != 2 for unit in units):
        raise InputError(
            f"heads are given as (layer, head), at least one; got {list(request)!r:.80}."
        )
    by_site: dict[Site, list[int]] = {}
    for layer, head in units:
        [site] = lm.layout.resolve(f"layers.{layer}.attn.z")
        if not 0 <= head < lm.dims.heads:
            raise InputError(
                f"head {head} of layer {site.layer}: this model has 0 to {lm.dims.heads - 1}."
            )
        by_site.setdefault(site, []).append(int(head))
    batch = lm.batch(prompts)
    shortest, longest = int(batch.lengths.min()), int(batch.lengths.max())
    if last is None and shortest != longest:
        raise InputError(
            f"these prompts have {shortest} to {longest} tokens, so their places do not belong "
            "together: give prompts of one length, or `last`, how many places from the end."
        )
    if last is not None and not 1 <= last <= shortest:
        raise InputError(f"last={last}: the shortest prompt has {shortest} tokens.")
    places = list(range(longest)) if last is None else list(range(-last, 0))
    seen = capture(lm, batch, *map(str, by_site), positions=places)
    held = [
        replaced(
            site,
            seen[str(site)][:, :, sorted({*heads})].mean(dim=0, keepdim=True),
            units=sorted({*heads}),
            positions=places,
        )
        for site, heads in by_site.items()
    ]
    names = ", ".join(f"L{site.layer}H{h}" for site, hs in by_site.items() for h in sorted({*hs}))
    return Edit(lm, held, note=f"{names} at their mean over {len(batch)} prompts")
