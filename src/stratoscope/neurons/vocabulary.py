"""A neuron in the vocabulary: the tokens that its output weights speak for and against.

Paper: textbook (Geva et al., "Transformer Feed-Forward Layers Build Predictions", 2022)

    logits[neuron, vocab] = U . N(W_down[:, neuron])

N is the layer's post-norm, where there is one, then the final norm: their weights, and LayerNorm's centring,
but neither bias nor scale, which depends on the input. So the logits order a neuron's tokens; their size means
something only beside other tokens of the same neuron.

Reads as: what the neuron says when its activation is positive. A gated neuron's can be negative; then promoted
and suppressed change places. Does not show when it speaks, nor what it does through later layers: a neuron
that writes for another layer shows noise here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from stratoscope.errors import InputError, SiteError
from stratoscope.maths.norm import freeze
from stratoscope.models.batch import token_text
from stratoscope.models.lm import LM
from stratoscope.results import dataset


def weighed(norm: nn.Module | None, write: Float[Tensor, "unit dim"]) -> Float[Tensor, "unit dim"]:
    """A vector through a norm's weight and centring, its scale left out."""
    frozen = freeze(norm, write)
    return replace(frozen, scale=torch.ones_like(frozen.scale)).linear(write)


@torch.no_grad()
def measure(lm: LM, inputs: Sequence[Sequence[int]], *, top: int = 8) -> xr.Dataset:
    """The tokens that each neuron promotes and suppresses most, strongest first: (unit, rank).

    inputs: neurons as (layer, neuron); no prompt takes part. top: how many tokens. The coordinates layer and
    neuron say which unit is which. Raises InputError for a neuron that is not there; SiteError for a layer
    that is not there, for a mixture of experts, and where logits are not linear in what neurons write.
    """
    layers, neurons = _units(lm, inputs)
    if not 1 <= top <= lm.dims.vocab:
        raise InputError(f"top={top}: choose 1 to {lm.dims.vocab}.")
    writes = torch.stack([_write(lm, layer, neuron) for layer, neuron in zip(layers, neurons)])
    logits = weighed(lm.layout.final_norm, writes) @ lm.weight("logits").T
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
        settings={"top": top},
        coords={"layer": (("unit",), layers), "neuron": (("unit",), neurons), "rank": list(range(top))},
    )


def _write(lm: LM, layer: int, neuron: int) -> Tensor:
    """What a neuron adds to the residual stream at activation one: (dim,), after any post-norm's weight."""
    [site] = lm.layout.resolve(f"layers.{layer}.mlp.out")
    write = lm.weight(site)[:, neuron]
    post = lm.layout.writers(site)[1:]
    return weighed(post[0], write[None])[0] if post else write


def _units(lm: LM, inputs: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """The layers and neurons asked for. Raises SiteError or InputError for what is not there."""
    lm.layout.resolve(["layers.*.mlp.act", "logits"])
    if lm.family.towers[""].residual == "post-norm" or len(lm.layout.head) != 1 or lm.family.vision_only:
        raise SiteError(f"{lm.family.name} has no linear way from a neuron to a vocabulary of tokens.")
    units = [tuple(unit) for unit in inputs]
    if not units or any(len(unit) != 2 for unit in units):
        raise InputError(f"neurons are given as (layer, neuron), at least one; got {list(inputs)!r:.80}.")
    sites = [lm.layout.resolve(f"layers.{layer}.mlp.act")[0] for layer, _ in units]
    for site, (_, neuron) in zip(sites, units):
        if not 0 <= neuron < lm.dims.neurons:
            raise InputError(f"neuron {neuron} of layer {site.layer}: this model has 0 to {lm.dims.neurons - 1}.")
    return [int(site.layer) for site in sites], [neuron for _, neuron in units]
