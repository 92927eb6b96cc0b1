"""Activation sparsity: how few neurons speak at a token, layer by layer.

Paper: lazy-neuron

    nonzero[example, layer]       = mean over tokens and neurons of (a != 0)            a =
                                  mlp.act, after ReLU
    above[example, layer]         = ... of (|a| > threshold * max over neurons of |a|)
    participation[example, layer] = mean over tokens of (sum a^2)^2 / (neurons * sum a^4)

The paper counts nonzero entries after ReLU. Smooth neurons (GELU, SwiGLU) are never exactly 0, so
for them nonzero is 1, and the other two generalise it: above counts what is not small beside the
token's largest; participation is the share of neurons that would hold the energy if they held it
alike, and needs no threshold. A ReLU layer that is not trained has nonzero about 1/2; Gaussian
activations have participation 1/3, one neuron alone 1 / neurons. firing[layer, neuron] is the share
of tokens at which a neuron is counted by `above`.

Reads as: how much of a layer takes part in one token, and so what skipping the rest could save.
Does not show that what is small does not matter, nor why it became small: compare with the same
model untrained.
"""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.results import dataset


def nonzero(act: Float[Tensor, "... neuron"]) -> Float[Tensor, "..."]:
    """Share of neurons that are not exactly 0."""
    return (act != 0).float().mean(dim=-1)


def is_above(act: Float[Tensor, "... neuron"], threshold: float) -> Bool[Tensor, "... neuron"]:
    """Which neurons are larger than `threshold` times the largest, in size; none where all are
    0."""
    size = act.abs()
    return size > threshold * size.amax(dim=-1, keepdim=True)


def participation(act: Float[Tensor, "... neuron"]) -> Float[Tensor, "..."]:
    """(sum a^2)^2 / (neurons * sum a^4): 1 / neurons if one speaks, 1 if all do alike; 0 where all
    are 0."""
    peak = act.abs().amax(dim=-1, keepdim=True)
    # a fourth power would leave float32's range
    energy = (act / torch.where(peak > 0, peak, 1.0)).double().square()
    total = act.shape[-1] * energy.square().sum(dim=-1)
    return torch.where(
        total > 0, energy.sum(dim=-1).square() / total.clamp_min(1e-300), 0.0
    ).float()


@torch.no_grad()
def measure(lm: LM, inputs: Any, *, threshold: float = 0.1) -> xr.Dataset:
    """nonzero, above and participation of every example in every layer: (example, layer); firing:
    (layer, neuron).

    Tokens count alike; padding not at all. inputs: prompts, or pictures for a vision model.
    threshold: of `above`. Raises SiteError for a mixture of experts, InputError for a threshold
    outside 0 to 1.
    """
    if not 0 <= threshold < 1:
        raise InputError(
            f"threshold={threshold}: a share of the largest activation, from 0 to below 1."
        )
    batch = lm.batch(inputs)
    seen = capture(lm, batch, "layers.*.mlp.act")
    seen.refuse_ragged("layers.*.mlp.act")
    shares: dict[str, list[Tensor]] = {"nonzero": [], "above": [], "participation": []}
    firing = []
    for site in seen.sites:
        act = seen[site].float()
        real = (
            torch.ones(act.shape[:2], dtype=torch.bool, device=act.device)
            if batch.mask is None
            else batch.mask
        )
        large = is_above(act, threshold)
        each = {
            "nonzero": nonzero(act),
            "above": large.float().mean(dim=-1),
            "participation": participation(act),
        }
        for name, value in each.items():
            shares[name].append((value * real).sum(dim=1) / real.sum(dim=1))
        firing.append(large[real].float().mean(dim=0))
    axes = ("example", "layer")
    return dataset(
        {name: (axes, torch.stack(values, dim=1)) for name, values in shares.items()}
        | {"firing": (("layer", "neuron"), torch.stack(firing))},
        method="neurons.activation_sparsity",
        provenance=lm.provenance,
        settings={"threshold": threshold},
        coords={"layer": list(range(lm.dims.layers))}
        | ({"example_text": batch.coords()["example_text"]} if batch.tokens else {}),
        site="layers.*.mlp.act",
    )
