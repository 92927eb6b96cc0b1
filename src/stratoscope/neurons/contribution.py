"""Neuron contribution: what every neuron writes straight towards the answer, at the last token.

Paper: textbook (Geva et al., "Transformer Feed-Forward Layers Build Predictions", 2022; Elhage et
al., 2021)

    contribution[layer, neuron] = activation[layer, neuron] * N(W_down[:, neuron]) . (u_answer -
        u_foil)

N is the layer's post-norm, where there is one, then the final norm, each with its scale held at the
value it has on this input, which makes them linear; u are rows of the unembedding. Over the neurons
of a layer, the contributions and what the biases add are the MLP's direct logit attribution. With a
soft-cap on logits, they are those before the cap.

Reads as: which neurons write the answer into the stream at the end. Does not show who caused it: a
neuron that only feeds a later layer scores zero here, and so does one that worked at an earlier
token.
"""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.metric import Words, target
from stratoscope.engine.trace import capture
from stratoscope.engine.writes import final_norm, post_norms
from stratoscope.errors import InputError, SiteError
from stratoscope.maths.norm import FrozenNorm
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.results import dataset


def before_norm(
    norm: FrozenNorm, towards: Float[Tensor, "example dim"]
) -> Float[Tensor, "example dim"]:
    """The transposed map: its product with a part is that of `towards` with norm.linear(part)."""
    scaled = towards * norm.weight * norm.scale[:, None]
    return scaled - scaled.mean(dim=-1, keepdim=True) if norm.centred else scaled


def contributions(
    activation: Float[Tensor, "example neuron"],
    down: Float[Tensor, "dim neuron"],
    towards: Float[Tensor, "example dim"],
) -> Float[Tensor, "example neuron"]:
    """What each neuron, at its activation, adds along a direction of the residual stream."""
    return activation * (towards @ down)


@torch.no_grad()
def measure(lm: LM, inputs: Any, *, answer: Words = None, foil: Words = None) -> xr.Dataset:
    """Activation and contribution of every neuron at each example's last token: (example, layer,
    neuron).

    answer, foil: default as `target` chooses. Raises SiteError for a mixture of experts, for a
    model whose residual stream is not a sum (post-norm encoders), and without a linear read-out;
    InputError for a vision model.
    """
    _refuse(lm)
    batch = lm.batch(inputs)
    if batch.ids is None:
        raise InputError(
            f"{lm.family.name} reads no tokens: there is no last token and no next one to ask "
            "about."
        )
    last = f"layers.{lm.dims.layers - 1}.resid_post"
    neurons = lm.layout.resolve("layers.*.mlp.act")
    seen = capture(lm, batch, "layers.*.mlp.act", last, positions=lm.readout.place(batch))
    wanted = target(
        lm,
        batch,
        answer,
        foil,
        single="what neurons write adds up to logits, not to log probabilities",
    )
    unembed = lm.weight("logits")
    towards = unembed[wanted.answer].double() - unembed[wanted.foil].double()
    towards = before_norm(final_norm(lm, seen[last]), towards)
    columns = []
    for site in neurons:
        here = towards
        for norm in reversed(post_norms(lm, Site("", site.layer, "mlp.out"), seen[site])):
            here = before_norm(norm, here)
        weight = lm.weight(f"layers.{site.layer}.mlp.out")
        columns.append(contributions(seen[site].double(), weight.double(), here))
    axes = ("example", "layer", "neuron")
    return dataset(
        {
            "activation": (axes, seen.stack("layers.*.mlp.act").transpose(0, 1)),
            "contribution": (axes, torch.stack(columns, dim=1).float()),
        },
        method="neurons.contribution",
        provenance=lm.provenance,
        coords={
            "layer": [site.layer for site in neurons],
            "neuron": list(range(lm.dims.neurons)),
            "example_text": batch.coords()["example_text"],
        }
        | wanted.coords,
        notes=" ".join(wanted.notes),
    )


def _refuse(lm: LM) -> None:
    lm.layout.resolve(["layers.*.mlp.act", "logits"])
    if lm.family.towers[""].residual == "post-norm":
        raise SiteError(
            f"{lm.family.name} norms or scales its residual stream after additions, so logits are "
            "not a sum of what "
            f"neurons write. Clamp neurons (editing.clamp) and compare the outputs instead."
        )
    if len(lm.layout.head) != 1:
        raise SiteError(
            f"{lm.family.name}'s read-out has layers of its own, so logits are not linear in the "
            "neurons."
        )
