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
the corrupt one.
Reads as: where and when the information that tells the two prompts apart passes. Does not show
which component put it there, and says nothing about information that both prompts share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import xarray as xr

from stratoscope.engine.intervene import replaced
from stratoscope.engine.metric import Words
from stratoscope.engine.pair import pair, random_like
from stratoscope.engine.sequence import swept
from stratoscope.engine.sweep import Progress
from stratoscope.engine.trace import capture
from stratoscope.models.lm import LM
from stratoscope.results import dataset

NULL = (
    "at each place a random direction, as long as the difference between the clean and the "
    "corrupt vector there"
)


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
    seed: int = 0,
    save: str | Path | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Effect and null at every layer and position: (example, layer, position), NaN at padding.

    inputs: clean prompts. corrupt: as many prompts, of the same token length each. answer, foil:
    default the clean run's top token, and the corrupt run's; `metric.Whole` texts are scored with
    all their tokens. site: resid_pre, resid_mid, resid_post, attn.out or mlp.out. seed: of the
    null. save: a file that keeps what is finished, so that an interrupted sweep goes on. Raises
    InputError when prompts differ in length, or when both runs give the same logit difference.
    """
    both = pair(lm, inputs, corrupt, answer, foil, direction)
    name = f"layers.*.{site}"
    base, source = (capture(lm, batch, name).stack(name) for batch in (both.base, both.source))
    noise = random_like(base, source, seed)
    shape = (lm.dims.layers, base.shape[2])
    has = [
        (both.base.lengths > p).nonzero()[:, 0].tolist() for p in range(shape[1])
    ]  # examples that reach position p
    cells = [
        replaced(
            f"layers.{layer}.{site}",
            vectors[layer, has[p], p : p + 1],
            positions=p,
            examples=has[p],
        )
        for vectors in (source, noise)
        for layer in range(shape[0])
        for p in range(shape[1])
    ]
    difference = swept(lm, both.base, cells, both.target, save=save, progress=progress)
    effect, null = both.normalise(difference).T.unflatten(1, (2, *shape)).unbind(1)
    axes = ("example", "layer", "position")
    gap = torch.where(both.base.mask, 0.0, torch.nan)[:, None].to(effect.device)
    return dataset(
        {"effect": (axes, effect + gap), "null": (axes, null + gap)} | both.differences,
        method="layers.activation_patching",
        provenance=lm.provenance,
        settings={"site": site, "direction": direction},
        seed=seed,
        coords=both.coords | {"layer": list(range(lm.dims.layers))},
        site=site,
        null_kind=NULL,
        notes=both.notes(null),
    )
