"""Observable propagation: which direction in the stream makes an output more likely, by way of
which heads and MLPs, from the weights and a handful of prompts without labels.

Paper: observable-propagation

    y[0]   = (g / rms(x)) * (W_U^T n)                  before the final norm, n the observable
    y[hop] = (g / rms(x)) * (W_V^T W_O^T y[hop - 1])   by a head's values, at the key it reads
    y[hop] = d (MLP(norm(x)) . y[hop - 1]) / d x       by an MLP, at the same position
    through[position]    = product of A[query, key] of the path's heads, 1 for the position read out
    score[position]      = x[position] . y
    contribution[l, h]   = sum_position  through[position] * (write of head h there) . y
    coupling[1 -> 2]     = y1 . y2 / |y1|^2

n holds a number for some tokens: {" she": 1, " he": -1}. A path is told from the output back,
(("head", 21, 3), ("mlp", 17)), and y is the last of its vectors unless another is named. Norms are
held at the scale that the fit's prompts give them, except the one before an MLP, which is part of
its gradient. Each prompt has a vector; the mean over prompts is used. With grouped queries a head
reads the values that the model gives it: kv head h // group.

coupling: how far feature 2 moves when as much is added along y1 as raises feature 1 by one.
null: random directions of y's length. norm_cosine: between y[0] and the true gradient through the
final norm, sqrt(1 - (x^ . u)^2) for a RMSNorm, where u is the direction of g * W_U^T n.

Reads as: who writes, to whom, what the path will turn into the observable. Does not show what a
head adds by moving attention (queries and keys are held), nor that the model uses the direction:
ablate it. Where an MLP bends between the fit's prompts and others, a gradient does not carry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.circuits import _paths
from stratoscope.engine.alone import Layers
from stratoscope.engine.backwards import (
    through_mlp,
    through_norm,
    through_values,
    to_heads,
    true_gradient,
)
from stratoscope.engine.metric import word
from stratoscope.engine.trace import Trace, capture
from stratoscope.engine.wiring import Wiring
from stratoscope.engine.writes import final_norm
from stratoscope.errors import InputError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.results import dataset
from stratoscope.store.fitted import Fitted


def coupling(
    one: Float[Tensor, "sender dim"], two: Float[Tensor, "receiver dim"]
) -> Float[Tensor, "sender receiver"]:
    """y1 . y2 / |y1|^2 of every pair: how far feature 2 moves per unit of feature 1."""
    return one @ two.T / one.square().sum(dim=1, keepdim=True)


@dataclass(frozen=True, eq=False, kw_only=True)
class Vectors(Fitted):
    """The feature vectors of one path, first the one before the final norm.

    each: of every prompt. norm_cosine: as the method says. observable: the number of each output by
    its name. path: what was passed, from the output back. positions: of each prompt, where each
    vector looks.
    """

    each: Float[Tensor, "example hop dim"]
    norm_cosine: Float[Tensor, " example"]
    observable: Mapping[str, float]
    path: Sequence[_paths.Step]
    positions: Sequence[Sequence[int]]

    @property
    def vector(self) -> Float[Tensor, "hop dim"]:
        """The mean over prompts."""
        return self.each.mean(dim=0)

    @property
    def names(self) -> list[str]:
        """Of each vector: the observable, and what reads it."""
        what = " ".join(f"{value:+g}{name}" for name, value in self.observable.items())
        return [f"{what} at {end}" for end in _paths.ends(self.path)]


@torch.no_grad()
def fit(
    lm: LM,
    inputs: Any,
    *,
    observable: Mapping[Any, float],
    path: Sequence[_paths.Step] = (),
    at: Sequence[int] | None = None,
) -> Vectors:
    """The vectors of an observable along a path, linearised at each of the prompts.

    observable: a number for each output, by token text (one token), id, or name of a class. at: the
    key position that each head of the path reads, from the prompt's start or (negative) its end;
    by default, prompt by prompt, the one that brings the observable most. Raises InputError for an
    unknown output or a path that leads forwards, SiteError where the stream is no sum or the
    read-out not linear.
    """
    wires, batch = _paths.wires(lm), lm.batch(inputs)
    numbers = {_paths.output(lm, name): float(value) for name, value in observable.items()}
    if not any(numbers.values()):
        raise InputError("the observable is zero: give at least one output a number, {' she': 1}.")
    steps = _paths.steps(path)
    heads = sum(step[0] == "head" for step in steps)
    _paths.heard(wires, steps)  # refuses what is no path
    if at is not None and len(at) != heads:
        raise InputError(
            f"at= has {len(at)} positions for {heads} heads in the path: one for each."
        )
    unembed = lm.weight("logits").detach()
    row = torch.stack([value * unembed[n].double() for n, value in numbers.items()]).sum(dim=0)
    found = [_back(lm, batch.example(e), row, steps, at) for e in range(len(batch))]
    each, cosine, positions = zip(*found)
    return Vectors(
        each=torch.stack(each).float(),
        norm_cosine=torch.stack(cosine).float(),
        observable={word(lm, number): value for number, value in numbers.items()},
        path=steps,
        positions=positions,
        settings={"at": at, "prompts": len(batch)},
        seed=None,
        provenance=lm.provenance,
    )


def _back(
    lm: LM, one: Batch, row: Tensor, path: Sequence[_paths.Step], at: Sequence[int] | None
) -> tuple[Tensor, Tensor, list[int]]:
    """Vectors (hop, dim), the cosine at the final norm, and the positions of one prompt."""
    layers, reads = Layers(lm, one), [_paths.reads(lm, path[:n]) for n in range(len(path) + 1)]
    seen = capture(lm, one, *reads, *_paths.inside(path))
    positions = [int(lm.readout.positions(one)[0])]
    x = seen[reads[0]][0, positions[0]]
    vectors = [through_norm(final_norm(lm, x), row)]
    cosine = torch.cosine_similarity(vectors[0], true_gradient(lm, x, row), dim=0)
    given = iter(at or ())
    for (kind, layer, *head), read in zip(path, reads[1:]):
        x, here = seen[read][0], positions[-1]
        if kind == "mlp":
            positions.append(here)
            vectors.append(through_mlp(layers, layer, x, here, vectors[-1]))
            continue
        z, pattern = (seen[f"layers.{layer}.attn.{point}"][0] for point in ("z", "pattern"))
        y = to_heads(lm, layer, z[here, None], vectors[-1][None])[0, 0, head[0]]
        carried = layers.attention(layer, x[None]).v[0, head[0]].double() @ y
        key = next(given, int((carried * pattern[head[0], here]).abs().argmax()))
        if not -len(x) <= key < len(x):
            raise InputError(f"at= names position {key} of a prompt of {len(x)} tokens.")
        positions.append(key % len(x))
        vectors.append(through_values(layers, layer, head[0], x, positions[-1], y))
    return torch.stack(vectors).cpu(), cosine.cpu(), positions


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    vectors: Vectors | str | Path,
    corrupt: Any = None,
    others: Sequence[Vectors] = (),
    draws: int = 20,
    seed: int = 0,
) -> xr.Dataset:
    """contribution (example, layer, head) of every head to the last vector of the path, NaN for
    heads that come after it; null_contribution with `draw`; score and through (example, position);
    coupling (edge).

    vectors: a fit, or its folder. corrupt: prompts in pairs of equal token length; contributions
    and scores are then of the difference, inputs less corrupt, under the attention that the inputs
    have. others: fits of other observables or paths, whose last vectors are coupled with all of
    `vectors`. Raises InputError for a fit of another width, or pairs of unequal length.
    """
    fitted = vectors if isinstance(vectors, Vectors) else Vectors.load(vectors)
    wires, runs = _paths.wires(lm), [lm.batch(x) for x in (inputs, corrupt) if x is not None]
    if fitted.each.shape[-1] != lm.dims.dim:
        raise InputError(
            f"the vectors have width {fitted.each.shape[-1]} and the stream of {lm.family.name} "
            f"{lm.dims.dim}: they were fitted to another model."
        )
    if len({(len(run), *map(len, run.tokens)) for run in runs}) > 1:
        raise InputError("inputs and corrupt differ in length: pairs need equally many tokens.")
    heard, read = _paths.heard(wires, fitted.path), _paths.reads(lm, fitted.path)
    sites = [read, *(f"layers.{layer}.attn.z" for layer in range(heard))]
    seen = [
        capture(lm, run, *sites, *(() if number else _paths.inside(fitted.path)))
        for number, run in enumerate(runs)
    ]
    y = fitted.vector[-1].double()
    noise = torch.randn(draws, len(y), generator=torch.Generator().manual_seed(seed)).double()
    y = torch.cat([y[None], noise * (y.norm() / noise.norm(dim=1, keepdim=True))])
    y = y.to(seen[0][read].device)
    through = _paths.through(
        lm, runs[0], fitted.path, seen[0], y.new_zeros(seen[0][read].shape[:2])
    )
    written = [_written(lm, wires, one, y, through, heard) for one in seen]
    score = [one[read].double() @ y[0] for one in seen]
    real = torch.ones_like(through) if runs[0].mask is None else runs[0].mask
    places = [x.masked_fill(real == 0, torch.nan) for x in (score[0] - sum(score[1:]), through)]
    found = written[0] - sum(written[1:])
    axes = ("example", "layer", "head")
    features = torch.cat([fitted.vector, *(other.vector[-1:] for other in others)])
    names = [*fitted.names, *(other.names[-1] for other in others)]
    return dataset(
        {
            "contribution": (axes, found[0].float()),
            "null_contribution": (("draw", *axes), found[1:].float()),
            "score": (("example", "position"), places[0].float()),
            "through": (("example", "position"), places[1].float()),
            "coupling": (("edge",), coupling(features, features).flatten()),
        },
        method="circuits.feature_vectors",
        provenance=lm.provenance,
        settings={"observable": fitted.observable, "path": fitted.path, "corrupt": len(runs) > 1},
        seed=seed,
        coords=runs[0].coords() | _paths.pairs(names),
        null_kind="random directions of the vector's length",
    )


def _written(
    lm: LM, wires: Wiring, seen: Trace, y: Tensor, through: Tensor, heard: int
) -> Float[Tensor, "vector example layer head"]:
    """What each head that is heard writes along each vector, over the positions that pass."""
    found = y.new_full((len(y), len(through), wires.layers, wires.heads), torch.nan)
    for layer in range(heard):
        z = seen[f"layers.{layer}.attn.z"].flatten(0, 1)
        along = torch.einsum("vrhk,rhk->vrh", to_heads(lm, layer, z, y), z.double())
        found[:, :, layer] = torch.einsum(
            "veph,ep->veh", along.unflatten(1, through.shape), through
        )
    return found
