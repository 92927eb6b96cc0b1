"""A neuron in the vocabulary: the tokens that its weights speak for and against.

Paper: textbook (Geva et al., "Transformer Feed-Forward Layers Build Predictions", 2022)

    logits[neuron, vocab] = U . N(W_down[:, neuron])                    side="down": what it writes
    logits[neuron, vocab] = U . N(N_mlp(W_up[neuron]))                  side="up" or "gate": what
                                                                        it reads

N is the layer's post-norm, where there is one, then the final norm: their weights, and LayerNorm's
centring, but neither bias nor scale, which depends on the input; N_mlp the norm before the MLP,
taken backwards. So the logits order a neuron's tokens; their size means something only beside other
tokens of the same neuron.

Reads as: what the neuron says when its activation is positive (what excites it, for what it reads).
A gated neuron's can be negative; then promoted and suppressed change places. Does not show when it
speaks, nor what it does through later layers: a neuron that writes for another layer shows noise
here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xarray as xr

from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.text import token_text
from stratoscope.neurons._weights import Side, decode, directions, linear, units
from stratoscope.results import dataset


@torch.no_grad()
def measure(
    lm: LM, inputs: Sequence[Sequence[int]], *, top: int = 8, side: Side = "down"
) -> xr.Dataset:
    """The tokens that each neuron promotes and suppresses most, strongest first: (unit, rank).

    inputs: neurons as (layer, neuron); no prompt takes part. top: how many tokens. side: its output
    weights, or those that read the stream. The coordinates layer and neuron say which unit is
    which. Raises InputError for a neuron that is not there; SiteError for a layer that is not
    there, for a mixture of experts, and where logits are not linear in what neurons write.
    """
    linear(lm)
    layers, neurons = units(lm, inputs)
    if not 1 <= top <= lm.dims.vocab:
        raise InputError(f"top={top}: choose 1 to {lm.dims.vocab}.")
    tables = {layer: directions(lm, layer, side) for layer in sorted(set(layers))}
    logits = decode(
        lm, torch.stack([tables[layer][neuron] for layer, neuron in zip(layers, neurons)])
    )
    best, worst = logits.topk(top), logits.topk(top, largest=False)
    words = lambda ids: [[token_text(lm.tokenizer, i) for i in row] for row in ids.tolist()]  # noqa: E731
    axes = ("unit", "rank")
    return dataset(
        {
            "promoted": (axes, words(best.indices)),
            "promoted_logit": (axes, best.values),
            "suppressed": (axes, words(worst.indices)),
            "suppressed_logit": (axes, worst.values),
        },
        method="neurons.vocabulary",
        provenance=lm.provenance,
        settings={"top": top, "side": side},
        coords={
            "layer": (("unit",), layers),
            "neuron": (("unit",), neurons),
            "rank": list(range(top)),
        },
    )
