"""Top-k neurons: at every token each MLP keeps its k largest activations and drops the rest.

Paper: lazy-neuron

    a'[position, neuron] = a[position, neuron] if |a[position, neuron]| is among the k largest of
        its token, else 0

The paper keeps the k largest after ReLU, where nothing is negative; for other neurons the largest
in size are meant. Gradients flow through what is kept, so a model can also be trained inside the
block, as the paper does.

Reads as: what the largest activations carry alone, once outputs with and without the edit are
compared. Does not show that a model trained with all of them is as good inside: the paper trains
with it from the start.
"""

from __future__ import annotations

from collections.abc import Sequence

from stratoscope.engine.edit import Edit
from stratoscope.engine.intervene import largest
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site


def edit(lm: LM, request: int | Sequence[Sequence[int]]) -> Edit:
    """An edit that keeps k neurons at each token: `with top_k.edit(lm, 64): lm(...)`.

    request: k for every layer, or (layer, k) for some; the smallest k counts where a layer is named
    twice. Inside the block the model is in evaluation mode (no dropout), as in all blocks. Raises
    SiteError for a layer that is not there or a mixture of experts, InputError for k below 0 or
    above the number of neurons.
    """
    pairs = [("*", request)] if isinstance(request, int) else [tuple(pair) for pair in request]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise InputError(f"a request is k, or pairs (layer, k), at least one; got {request!r:.80}.")
    smallest: dict[Site, int] = {}
    for layer, k in pairs:
        for site in lm.layout.resolve(f"layers.{layer}.mlp.act"):
            if not 0 <= k <= lm.dims.neurons:
                raise InputError(
                    f"k={k}: each layer of this model has {lm.dims.neurons} neurons; keep 0 to as "
                    "many."
                )
            smallest[site] = min(k, smallest.get(site, k))
    return Edit(lm, [largest(site, k) for site, k in smallest.items()])
