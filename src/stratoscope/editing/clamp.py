"""Clamp neurons: hold their activations at a value, at every token or at some, while the model
runs.

Paper: textbook (Bau et al., "Understanding the role of individual units in a deep neural network",
2020)

    mlp.act[layer][position, neuron] = value

With value 0 the neuron is taken out; with a large one it is made to speak at tokens where it is
silent.

Reads as: what depends on these neurons, once outputs with and without the edit are compared. Does
not show that they act alone: zero can be far from anything a neuron does of itself, and later
layers may make up for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import replaced
from stratoscope.engine.select import Positions
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site


def edit(
    lm: LM, request: Sequence[Sequence[int]], *, value: float = 0.0, positions: Positions = None
) -> Edit:
    """An edit that holds neurons at `value`: `with clamp.edit(lm, [(4, 37)]): lm(...)`.

    request: neurons as (layer, neuron). positions: which tokens (-1 is each example's last; default
    all); while generating, named positions concern the prompt only. Raises SiteError for a layer
    that is not there or a mixture of experts, InputError for a neuron that is not there or a value
    that is not finite.
    """
    if not math.isfinite(value):
        raise InputError(f"value={value}: neurons can be held at a finite number only.")
    units = [tuple(unit) for unit in request]
    if not units or any(len(unit) != 2 for unit in units):
        raise InputError(
            f"neurons are given as (layer, neuron), at least one; got {list(request)!r:.80}."
        )
    by_site: dict[Site, set[int]] = {}
    for layer, neuron in units:
        [site] = lm.layout.resolve(f"layers.{layer}.mlp.act")
        if not 0 <= neuron < lm.dims.neurons:
            raise InputError(
                f"neuron {neuron} of layer {site.layer}: this model has 0 to {lm.dims.neurons - 1}."
            )
        by_site.setdefault(site, set()).add(neuron)
    held = [
        replaced(site, value, units=sorted(chosen), positions=positions)
        for site, chosen in by_site.items()
    ]
    names = ", ".join(
        f"L{site.layer}N{neuron}" for site, chosen in by_site.items() for neuron in sorted(chosen)
    )
    return Edit(lm, held, note=f"{names} held at {value}")
