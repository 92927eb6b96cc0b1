"""Activation patching of heads: put one head's clean output into the corrupt run and see how much
comes back.

Paper: textbook (Wang et al., "Interpretability in the Wild", 2022; Zhang and Nanda, 2024)

    effect[layer, head] = (d(corrupt with z[layer, head] <- clean) - d(corrupt)) / (d(clean) -
        d(corrupt))

z is what a query head reads, before the output projection, at all positions; with grouped queries
it is one query head's, and the others of its group stay. d is the logit difference answer - foil at
the last token: 0 means nothing came back, 1 the whole clean prediction. direction="noise" runs the
other way: clean with one corrupt head, 0 nothing was lost, 1 everything.

null: the same sweep with, at each position, a random direction as long as clean z is far from
corrupt z. bound: the largest |null| of all heads in `draws` such sweeps (`engine.chance`); were all
heads chance, the largest effect would exceed it in 1 of draws + 1 cases.
Reads as: which heads carry what tells the two prompts apart. Does not show at which token, nor
whether a head writes to the answer itself or feeds another; a head whose work another one repeats
can score zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import xarray as xr
from torch import Tensor

from stratoscope.engine.chance import patched
from stratoscope.engine.intervene import Intervention, replaced
from stratoscope.engine.metric import Words
from stratoscope.engine.pair import pair
from stratoscope.engine.sweep import Progress
from stratoscope.models.lm import LM
from stratoscope.results import dataset

NULL = (
    "at each position a random direction, as long as the difference between the head's clean "
    "and corrupt z"
)
EXACTLY = 160  # cells of further draws that are swept; 60 do on SmolLM2


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    corrupt: Any,
    answer: Words = None,
    foil: Words = None,
    direction: Literal["denoise", "noise"] = "denoise",
    draws: int = 24,
    seed: int = 0,
    save: str | Path | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Effect and null of every query head (example, layer, head), and the bound (example).

    inputs: clean prompts. corrupt: as many prompts, of the same token length each. answer, foil:
    default the clean run's top token, and the corrupt run's; `metric.Whole` texts are scored with
    all their tokens. draws: of the bound; 24 make it one of 5 %. seed: of the null. save: a file
    that keeps what is finished, so that an interrupted sweep goes on. Raises InputError when
    prompts differ in length, or when both runs give the same logit difference.
    """
    prompts = pair(lm, inputs, corrupt, answer, foil, direction, sites="layers.*.attn.z")
    layers, heads = range(lm.dims.layers), range(lm.dims.heads)
    effect, null, bound = patched(
        lm,
        prompts,
        prompts.base_values,
        prompts.source_values,
        [f"layers.{layer}.attn.z" for layer in layers],
        _patch,
        exactly=EXACTLY,
        draws=draws,
        seed=seed,
        save=save,
        progress=progress,
    )
    axes = ("example", "layer", "head")
    return dataset(
        {"effect": (axes, effect), "null": (axes, null), "bound": (axes[:1], bound)}
        | prompts.differences,
        method="heads.activation_patching",
        provenance=lm.provenance,
        settings={"direction": direction, "draws": draws},
        seed=seed,
        coords=prompts.coords | {"layer": list(layers), "head": list(heads)},
        null_kind=NULL,
        draws=draws,
        notes=prompts.notes(null),
    )


def _patch(layer: int, head: int, z: Tensor, examples: list[int]) -> Intervention:
    # all positions, padding too: what stands there is read by no real token
    value = z[examples, :, head : head + 1]
    return replaced(f"layers.{layer}.attn.z", value, units=[head], examples=examples)
