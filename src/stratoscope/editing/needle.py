"""Needle: noise on the value vectors of neurons, so that what they say is lost and nothing else is
touched.

Paper: concept-vectors

    W_down[:, neuron] += noise * rms(W_down[:, neuron]) * n,    n ~ N(0, 1) in every dimension

The paper adds noise of a fixed deviation, which it chooses for each model; here it is a multiple of
the vector's own root mean square, so that one number means the same everywhere. At `noise` s the
vector keeps a cosine of about 1 / sqrt(1 + s^2) with itself: 0.2 at the default.

Reads as: what depends on these vectors, once outputs with and without the edit are compared. Does
not show that the knowledge is gone: other vectors may hold it too. The noise itself is written
wherever the neuron speaks, so compare with as much noise on random vectors of the same layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from stratoscope.engine.edit import Edit
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.models.weights import matrix


def needle(
    vector: Float[Tensor, " dim"], noise: float, generator: torch.Generator
) -> Float[Tensor, " dim"]:
    """What is added: normal noise, `noise` times as large as the vector in root mean square on
    average."""
    drawn = torch.randn(vector.shape, generator=generator).to(vector)
    return noise * vector.float().pow(2).mean().sqrt().to(vector) * drawn


@torch.no_grad()
def edit(lm: LM, request: Sequence[Sequence[int]], *, noise: float = 5.0, seed: int = 0) -> Edit:
    """An edit that spoils value vectors: `with needle.edit(lm, [(4, 37)]): lm(...)`.

    request: neurons as (layer, neuron). seed: of the noise, which is drawn for each neuron by
    itself: the others asked for do not matter. Raises SiteError for a layer that is not there or a
    mixture of experts, InputError for a neuron that is not there, or noise that is not a positive
    number.
    """
    units = [tuple(unit) for unit in request]
    if not units or any(len(unit) != 2 for unit in units):
        raise InputError(
            f"neurons are given as (layer, neuron), at least one; got {list(request)!r:.80}."
        )
    if not (math.isfinite(noise) and noise > 0):
        raise InputError(
            f"noise={noise}: a positive number, in units of the vector's own root mean square."
        )
    names = {id(parameter): name for name, parameter in lm.model.named_parameters()}
    deltas: dict[str, Tensor] = {}
    for layer, neuron in units:
        [act] = lm.layout.resolve(f"layers.{layer}.mlp.act")  # a mixture of experts is refused here
        if not 0 <= neuron < lm.dims.neurons:
            raise InputError(
                f"neuron {neuron} of layer {act.layer}: this model has 0 to {lm.dims.neurons - 1}."
            )
        module = lm.layout.writers(lm.layout.resolve_one(f"layers.{act.layer}.mlp.out"))[0]
        delta = deltas.setdefault(names[id(module.weight)], torch.zeros_like(module.weight))
        columns = delta.T if isinstance(module, Conv1D) else delta
        generator = torch.Generator().manual_seed(
            (seed * lm.dims.layers + int(act.layer)) * lm.dims.neurons + neuron
        )
        columns[:, neuron] = needle(matrix(module)[:, neuron], noise, generator)
    which = ", ".join(f"L{layer}N{neuron}" for layer, neuron in units)
    return Edit(lm, (), deltas, note=f"noise {noise} on the value vectors of {which}")
