"""Activation patching of the residual stream: put one clean vector into the corrupt run and see how
much comes back.

Paper: textbook (Meng et al., "Locating and Editing Factual Associations in GPT", 2022; Zhang and
Nanda, 2024)

    effect[layer, position] = (d(corrupt with resid[layer, position] <- clean) - d(corrupt)) /
        (d(clean) - d(corrupt))

d is the logit difference answer - foil at the last token: 0 means nothing came back, 1 the whole
clean prediction. direction="noise" runs the other way: clean with one corrupt vector, 0 nothing was
lost, 1 everything.

null: the same sweep with, at each place, a random direction as long as the clean vector is far from
the corrupt one. bound: the largest |null| of all places in `draws` such sweeps (`engine.chance`);
were all places chance, the largest effect would exceed it in 1 of draws + 1 cases.
Reads as: where and when the information that tells the two prompts apart passes. Does not show
which component put it there, and says nothing about information that both prompts share.
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
    "at each place a random direction, as long as the difference between the clean and the "
    "corrupt vector there"
)
EXACTLY = 480  # cells of further draws that are swept: large changes are guessed less well


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    corrupt: Any,
    answer: Words = None,
    foil: Words = None,
    site: str = "resid_pre",
    direction: Literal["denoise", "noise"] = "denoise",
    draws: int = 24,
    seed: int = 0,
    save: str | Path | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Effect and null at every layer and position (example, layer, position), NaN at padding, and
    the bound (example).

    inputs: clean prompts. corrupt: as many prompts, of the same token length each. answer, foil:
    default the clean run's top token, and the corrupt run's; `metric.Whole` texts are scored with
    all their tokens. site: resid_pre, resid_mid, resid_post, attn.out or mlp.out. draws: of the
    bound; 24 make it one of 5 %. seed: of the null. save: a file that keeps what is finished, so
    that an interrupted sweep goes on. Raises InputError when prompts differ in length, or when both
    runs give the same logit difference.
    """
    prompts = pair(lm, inputs, corrupt, answer, foil, direction, sites=f"layers.*.{site}")
    layers = range(lm.dims.layers)

    def patch(layer: int, position: int, vectors: Tensor, examples: list[int]) -> Intervention:
        value = vectors[examples, position : position + 1]
        place = f"layers.{layer}.{site}"
        return replaced(place, value, positions=position, examples=examples)

    effect, null, bound = patched(
        lm,
        prompts,
        prompts.base_values,
        prompts.source_values,
        [f"layers.{layer}.{site}" for layer in layers],
        patch,
        exactly=EXACTLY,
        draws=draws,
        seed=seed,
        save=save,
        progress=progress,
    )
    axes = ("example", "layer", "position")
    real = (
        prompts.base.mask if prompts.base.mask is not None else torch.ones_like(effect[:, 0]).bool()
    )
    gap = torch.where(real, 0.0, torch.nan)[:, None].to(effect.device)
    return dataset(
        {
            "effect": (axes, effect + gap),
            "null": (axes, null + gap),
            "bound": (axes[:1], bound),
        }
        | prompts.differences,
        method="layers.activation_patching",
        provenance=lm.provenance,
        settings={"site": site, "direction": direction, "draws": draws},
        seed=seed,
        coords=prompts.coords | {"layer": list(layers)},
        site=site,
        null_kind=NULL,
        draws=draws,
        notes=prompts.notes(null),
    )
