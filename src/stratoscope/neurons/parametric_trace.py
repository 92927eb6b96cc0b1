"""Parametric trace: how much of what value vectors said is still in the weights after an edit or in
another model.

Paper: concept-vectors

    cosine[unit]  = cos(v, v')          v, v' = W_down[:, neuron] before and after
    jaccard[unit] = |T(v) & T(v')| / |T(v) | T(v')|,    T = the `top` tokens of the vector's
                                                        vocabulary projection
    distance[unit] = |v - v'|           in units of |v|

null_cosine, null_jaccard: v against the value vector of another neuron of its layer, drawn at
random: what is left when nothing is left. The paper's projection is through each model's own
unembedding and final norm; so it is here.
Reads as: 1, the trace is intact, whatever the model says now; near the null, it is erased. Does not
show that the model uses the vector, nor that it holds the concept here alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine.edit import Edit
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.neurons._weights import decode, directions, linear, units
from stratoscope.results import dataset


def jaccard(one: Int[Tensor, "unit rank"], two: Int[Tensor, "unit rank"]) -> Float[Tensor, " unit"]:
    """Shared over joint entries of two lists without repetition, row by row."""
    shared = (one[:, :, None] == two[:, None, :]).sum(dim=(1, 2)).float()
    return shared / (one.shape[1] + two.shape[1] - shared)


def least_cosine(vector: Float[Tensor, " dim"], steps: int, rate: float) -> float:
    """The least cosine with itself that a vector can have after so many steps of Adam, each of
    which moves every number by `rate` (it moves them by less where gradients change their sign).

    Steps of length r = steps rate sqrt(dim) / |vector| turn it by arcsin(r) at most. Near 1, an
    intact trace says nothing of what was unlearned; 0 where it could have been turned anywhere.
    """
    reach = steps * rate * vector.numel() ** 0.5 / float(vector.float().norm().clamp_min(1e-30))
    return (1 - min(reach, 1.0) ** 2) ** 0.5


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Sequence[Sequence[int]],
    *,
    after: LM | Edit | None = None,
    top: int = 50,
    seed: int = 0,
) -> xr.Dataset:
    """cosine, jaccard, distance and the nulls of each value vector: (unit,).

    inputs: neurons as (layer, neuron). after: an edit of this model, or a model of the same shape;
    None compares the model with itself, which shows the nulls alone. top: tokens of a projection
    (at most the vocabulary; the paper takes 200). Raises InputError for a neuron that is not there
    or a model of another shape, SiteError as `neurons.vocabulary`.
    """
    linear(lm)
    layers, neurons = units(lm, inputs)
    other = after if isinstance(after, LM) else lm
    if other.dims != lm.dims:
        raise InputError(f"the model to compare with has {other.dims}; this one has {lm.dims}.")
    top = min(top, lm.dims.vocab)
    generator = torch.Generator().manual_seed(seed)
    strangers = [
        (neuron + int(torch.randint(1, lm.dims.neurons, (1,), generator=generator)))
        % lm.dims.neurons
        for neuron in neurons
    ]
    before, tokens_now = _vectors(lm, layers, neurons, top)
    with after if isinstance(after, Edit) else nullcontext():
        later, said_later = _vectors(other, layers, neurons, top)
        chance, said_chance = _vectors(other, layers, strangers, top)
    cosine = torch.nn.functional.cosine_similarity
    length = before.norm(dim=-1).clamp_min(1e-30)
    values = {
        "cosine": cosine(before, later, dim=-1),
        "jaccard": jaccard(tokens_now, said_later),
        "distance": (later - before).norm(dim=-1) / length,
        "null_cosine": cosine(before, chance, dim=-1),
        "null_jaccard": jaccard(tokens_now, said_chance),
    }
    return dataset(
        {name: (("unit",), value) for name, value in values.items()},
        method="neurons.parametric_trace",
        provenance=lm.provenance,
        settings={"top": top, "after": after.note if isinstance(after, Edit) else repr(other)},
        seed=seed,
        coords={"layer": (("unit",), layers), "neuron": (("unit",), neurons)},
        null_kind="the value vector of another neuron of the same layer, drawn at random",
    )


def _vectors(lm: LM, layers: list[int], neurons: list[int], top: int) -> tuple[Tensor, Tensor]:
    """Value vectors (unit, dim), and the ids of the tokens that they promote most (unit, rank)."""
    rows = [
        directions(lm, layer, "down", fold=False)[neuron].float()
        for layer, neuron in zip(layers, neurons)
    ]
    folded = [directions(lm, layer, "down")[neuron] for layer, neuron in zip(layers, neurons)]
    return torch.stack(rows), decode(lm, torch.stack(folded)).topk(top).indices
