"""Steering grid: what vectors do at every layer and strength, on what is meant and on what is not,
beside directions that mean nothing.

Paper: textbook (Rimsky et al., "Steering Llama 2 via contrastive activation addition", 2024; the
nulls and the dose response are ours)

    effect[layer, strength, example] = F(x + strength v[layer]) - F(x)
    null_random     the same of a random direction as long as v[layer]
    null_shuffled   the same of the vector fitted on labels dealt out anew
    perplexity, kl  of unrelated texts: exp of the mean loss; mean of KL(before || after)
    slope[layer, example] = sum over strengths of s effect / sum of s^2           (`response`)

A shuffled vector is left as short as it comes out: made as long as v it would mostly be v again,
or its opposite, since the texts differ most along v whatever they are called.

F is logit(answer) - logit(foil), or any metric of the last position. All cells are one exact sweep:
each begins at the layer where it adds, and, where only named positions change, at the first of
them; texts, read at every position, are whole runs.

Reads as: where and how far to push, at what price. `response` gives each layer's slope with its
interval over examples, and how far it is above the steepest control; at or below 1 any direction
would have done. Does not show that the text is still good: perplexity of other texts says whether
the model still speaks, not what it says. A slope is of the strengths asked; look for the bend.
Cost: layers x strengths x (1 + 2 draws) cells on every example, half of a run each or less, and
layers x strengths runs of the texts.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.editing import _side_effects, steer
from stratoscope.editing._steered import fitting
from stratoscope.engine.intervene import Intervention, add
from stratoscope.engine.metric import Words, target, tokens_of
from stratoscope.engine.select import Positions
from stratoscope.engine.sweep import Metric, sweep
from stratoscope.errors import InputError
from stratoscope.maths.resample import interval
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.results import dataset

AXES = {
    "strength": "how far a model is pushed along a steering vector, in lengths of the vector",
    "text": "one of the texts that have nothing to do with what is asked",
}
FEWEST = 4  # pairs, below which labels dealt out anew are too often the same ones
Effect = Float[np.ndarray, "... strength example"]


def slopes(
    effect: Effect, strengths: Float[np.ndarray, " strength"]
) -> Float[np.ndarray, "... example"]:
    """The slope through the origin, where no strength is no effect."""
    return np.einsum("...se,s->...e", effect, strengths) / np.square(strengths).sum()


def controls(
    vector: Float[Tensor, "*units"], states: steer.States | None, how: str, draws: int, seed: int
) -> dict[str, list[Tensor]]:
    """Random directions as long as a vector, and, where what it was made of is known, the vectors
    of labels dealt out anew. (draw,) each."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(vector.shape, generator=generator) for _ in range(draws)]
    made = {"random": [x * (vector.norm() / x.norm()) for x in noise]}
    if states is not None and states.shape[1] >= FEWEST:
        every = states.flatten(0, 1)
        orders = [torch.randperm(len(every), generator=generator) for _ in range(draws)]
        dealt = [every[order].unflatten(0, states.shape[:2]) for order in orders]
        made["shuffled"] = [steer.direction(one, how) for one in dealt]
    return made


def log_probability(lm: LM, words: Sequence[str]) -> Metric:
    """A metric: the log of the probability that the next token is one of these words.

    Raises InputError for a word of several tokens, and for none.
    """
    found = [tokens_of(lm, word, "word") for word in words]
    if long := [word for word, ids in zip(words, found) if len(ids) != 1]:
        raise InputError(f"{long[0]!r} is several tokens: give words of one token each.")
    if not found:
        raise InputError("no word was given whose probability is asked.")
    ids = [one[0] for one in found]
    return lambda logits, _: logits.float().log_softmax(dim=-1)[:, ids].logsumexp(dim=-1)


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    vectors: steer.Steering | str | Path | Mapping[str, Tensor],
    strengths: Sequence[float],
    answer: Words = None,
    foil: Words = None,
    metric: Metric | None = None,
    layers: int | Sequence[int] | Literal["all"] = "all",
    positions: Positions = None,
    texts: Any = None,
    draws: int = 2,
    seed: int = 0,
) -> xr.Dataset:
    """effect (layer, strength, example) and its nulls (draw, layer, strength, example); base
    (example), what F is of the model as it is.

    vectors: a fit, its folder, or vectors by site, one for each layer. metric: in place of answer
    and foil, of logits (row, output) and the example of each row. texts: gives perplexity and kl
    (layer, strength, text) and base_perplexity (text) too. draws: directions of each null. Raises
    InputError for no strength or a strength that makes the metric infinite, naming it and the
    layer, two vectors in one layer, and what `steer.edit` refuses.
    """
    doses = [float(strength) for strength in strengths]
    if not doses or len(set(doses)) < len(doses) or not all(map(math.isfinite, doses)):
        raise InputError(f"strengths {doses}: give at least one number, each once.")
    fitted = steer.read(lm, vectors)
    chosen = fitted.at(layers)
    numbers = _layers(chosen)
    batch = lm.batch(inputs)
    if metric is None:
        metric = target(lm, batch, answer, foil, single="a grid asks one next token").difference
    how = str(fitted.settings.get("how", "mean"))
    every: dict[str, list[dict[Site, Tensor]]] = {"effect": [chosen]}
    held = fitted.states or {}
    drawn = {
        site: controls(vector, held.get(str(site)), how, draws, seed + layer)
        for layer, (site, vector) in zip(numbers, chosen.items())
    }
    for kind in min((made.keys() for made in drawn.values()), key=len):
        every[f"null_{kind}"] = [
            {site: made[kind][draw] for site, made in drawn.items()} for draw in range(draws)
        ]
    cells = [
        add(site, fitting(lm, site, vector, dose), positions=positions)
        for some in every.values()
        for vectors_of_all in some
        for site, vector in vectors_of_all.items()
        for dose in doses
    ]
    base, found = _swept(lm, batch, cells, metric, doses)
    found = found.unflatten(0, (-1, len(numbers), len(doses))).split([*map(len, every.values())])
    axes = ("layer", "strength", "example")
    variables = {
        name: (axes, x[0]) if name == "effect" else (("draw", *axes), x)
        for name, x in zip(every, found)
        if len(x)
    }
    if texts is not None:
        own = [cells[n : n + len(doses)] for n in range(0, len(numbers) * len(doses), len(doses))]
        variables |= _side_effects.measured(lm, texts, own)
    names = {"example_text": batch.coords()["example_text"]} if batch.tokens else {}
    return dataset(
        variables | {"base": (("example",), base)},
        method="editing.steering_grid",
        provenance=lm.provenance,
        settings={"layers": numbers, "strengths": doses, "positions": positions, "draws": draws}
        | {"fit": dict(fitted.settings)},
        seed=seed,
        coords={"layer": numbers, "strength": doses} | names,
        null_kind="random directions as long as the vector, and vectors of labels dealt out anew",
    )


def response(result: xr.Dataset, *, level: float = 0.95) -> xr.Dataset:
    """Of each layer slope, slope_low, slope_high (layer), null_slope (layer, draw) of all controls,
    bound, the steepest of these, and selectivity = |slope| / bound; effect, effect_low, effect_high
    (layer, strength), means over examples.

    result: as `measure` gives it. Intervals are over examples, NaN for fewer than five.
    """
    doses = result.strength.values
    each = slopes(result.effect.values, doses)
    nulls = [result[name].values for name in result.data_vars if str(name).startswith("null_")]
    steep = [slopes(null, doses).mean(axis=-1) for null in nulls]
    null = np.concatenate(steep).T if steep else np.full((len(each), 0), np.nan)
    bound = np.abs(null).max(axis=1) if steep else np.full(len(each), np.nan)
    of_slope = _intervals(each, level)
    variables = {
        name: (("layer",), of_slope[..., n])
        for n, name in enumerate(("slope", "slope_low", "slope_high"))
    }
    variables |= {"bound": (("layer",), bound), "selectivity": (("layer",), _over(each, bound))}
    if steep:
        variables["null_slope"] = (("layer", "draw"), null)
    of_effect = _intervals(result.effect.values, level)
    for n, name in enumerate(("effect", "effect_low", "effect_high")):
        variables[name] = (("layer", "strength"), of_effect[..., n])
    return dataset(
        variables,
        method="editing.steering_grid",
        provenance=json.loads(result.attrs["provenance"]),
        settings=json.loads(result.attrs["settings"]) | {"level": level},
        seed=result.attrs["seed"],
        coords={"layer": result.layer.values, "strength": doses},
    )


def _over(each: np.ndarray, bound: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.abs(each.mean(axis=-1)) / bound


def _intervals(values: Float[np.ndarray, "... example"], level: float) -> np.ndarray:
    """(..., 3) mean, low and high over examples."""
    flat = values.reshape(-1, values.shape[-1])
    return np.array([interval(row, level=level)[:3] for row in flat]).reshape(*values.shape[:-1], 3)


def _layers(chosen: Mapping[Site, Tensor]) -> list[int]:
    numbers = [site.layer for site in chosen]
    kinds = {(site.point, tuple(vector.shape)) for site, vector in chosen.items()}
    if None in numbers or len(set(numbers)) < len(numbers) or len(kinds) > 1:
        raise InputError(
            f"a grid is of one vector for each layer, at one kind of site; there are vectors of "
            f"{', '.join(map(str, chosen))!s:.200}."
        )
    return [int(number) for number in numbers if number is not None]


def _swept(
    lm: LM, batch: Any, cells: Sequence[Intervention], metric: Metric, doses: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The base metric (example,), and each cell's less it (cell, example)."""
    try:
        values = sweep(lm, batch, [(), *cells], metric)
    except InputError as error:
        number = re.search(r"for cell (\d+)", str(error))
        if number is None or number[1] == "0":
            raise
        cell = int(number[1]) - 1
        raise InputError(
            f"strength {doses[cell % len(doses)]:g} at `{cells[cell].site}` is too far: {error}"
        ) from error
    return values[0].cpu(), (values[1:] - values[0]).cpu()
