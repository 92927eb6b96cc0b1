"""Neuron ablation: how much of the answer's lead is lost when one neuron is switched off.

Paper: textbook (Morcos et al., "On the importance of single directions for generalization", 2018)

    effect[unit] = d - d(act[layer, neuron] <- value at every token)

d is the logit difference answer - foil at the last token. A positive effect is a neuron that spoke
for the answer; it counts whatever way the neuron had to the end, also through later layers.

null: the same of random neurons, drawn from the layers of the given ones in turn.
Reads as: whether the prediction rests on this neuron, once the effect is larger than those of
random ones. Does not show what the neuron is for; a neuron whose work another one repeats scores
zero, and 0 may be far from anything the neuron is (take its mean as `value`).
Cost: one cell of a sweep for each neuron, from its own layer on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from stratoscope.engine.intervene import replaced
from stratoscope.engine.metric import Words, last_logits
from stratoscope.engine.precision import spacing
from stratoscope.engine.sequence import swept, target, unchanged
from stratoscope.engine.sweep import Progress
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.results import dataset

Unit = tuple[int, int]  # layer, neuron
NULL = "random neurons of the same layers, switched off one by one"


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    units: Sequence[Sequence[int]],
    answer: Words = None,
    foil: Words = None,
    value: float = 0.0,
    draws: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Effect of each neuron (example, unit), null (example, draw), and the difference as it is
    (example).

    units: neurons as (layer, neuron). answer, foil: default as `target` chooses; `metric.Whole`
    texts are scored with all their tokens. value: at which a neuron is held. draws, seed: of the
    null. Raises InputError for no neuron or one that is not there, SiteError for a layer that is
    not there or a mixture of experts.
    """
    chosen = [_unit(lm, unit) for unit in units]
    if not chosen or draws < 1:
        raise InputError(
            f"{len(chosen)} neurons and draws={draws}: give at least one neuron as (layer, "
            "neuron), and draws of 1 or more."
        )
    batch = lm.batch(inputs)
    logits = last_logits(lm, batch)
    wanted = target(lm, batch, answer, foil, logits=logits)
    others = random_units(chosen, lm.dims.neurons, draws, seed)
    cells = [replaced(f"layers.{at}.mlp.act", value, units=[n]) for at, n in (*chosen, *others)]
    before = unchanged(lm, batch, wanted, logits).float().cpu()
    lost = before - swept(lm, batch, cells, wanted, progress=progress).float().cpu()
    effect, null = lost.T.split([len(chosen), draws], dim=1)
    notes = [*wanted.notes, *_rounded(spacing(logits.abs().amax(dim=1), lm.model.dtype), null)]
    return dataset(
        {
            "effect": (("example", "unit"), effect),
            "null": (("example", "draw"), null),
            "difference": (("example",), before),
        },
        method="neurons.ablation",
        provenance=lm.provenance,
        settings={"value": value, "draws": draws},
        seed=seed,
        coords={
            "layer": (("unit",), [at for at, _ in chosen]),
            "neuron": (("unit",), [neuron for _, neuron in chosen]),
        }
        | ({"example_text": batch.coords()["example_text"]} if batch.tokens else {})
        | wanted.coords,
        null_kind=NULL,
        notes=" ".join(notes),
    )


def _rounded(step: Tensor, null: Tensor) -> list[str]:
    """A note where one step of rounding of a logit is as large as what random neurons do."""
    most, largest = float(step.max()), float(null.abs().max())
    if most < max(largest, 1e-5):  # in float32 it never is
        return []
    return [
        f"One step of rounding of a logit is up to {most:.2g}, the largest effect of a random "
        f"neuron {largest:.2g}: effects of that size are rounding. Measure them in float32 "
        "(engine.precision.in_float32)."
    ]


def random_units(units: Sequence[Unit], neurons: int, draws: int, seed: int) -> list[Unit]:
    """Neurons drawn from the layers of these in turn, none of them these: (layer, neuron). Raises
    InputError where a layer has no other."""
    generator, others = np.random.default_rng(seed), []
    for number in range(draws):
        layer = units[number % len(units)][0]
        free = np.setdiff1d(np.arange(neurons), [neuron for at, neuron in units if at == layer])
        if not len(free):
            raise InputError(f"all {neurons} neurons of layer {layer} are given: none is random.")
        others.append((layer, int(generator.choice(free))))
    return others


def _unit(lm: LM, unit: Sequence[int]) -> Unit:
    if len(unit) != 2:
        raise InputError(f"neurons are given as (layer, neuron); got {unit!r:.40}.")
    [site] = lm.layout.resolve(f"layers.{unit[0]}.mlp.act")
    if not 0 <= unit[1] < lm.dims.neurons:
        raise InputError(
            f"neuron {unit[1]} of layer {site.layer}: this model has 0 to {lm.dims.neurons - 1}."
        )
    return int(site.layer or 0), int(unit[1])
