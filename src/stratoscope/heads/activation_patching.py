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
corrupt z.
Reads as: which heads carry what tells the two prompts apart. Does not show at which token, nor
whether a head writes to the answer itself or feeds another; a head whose work another one repeats
can score zero.
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
    "at each position a random direction, as long as the difference between the head's clean "
    "and corrupt z"
)


@torch.no_grad()
def measure(
    lm: LM,
    inputs: Any,
    *,
    corrupt: Any,
    answer: Words = None,
    foil: Words = None,
    direction: Literal["denoise", "noise"] = "denoise",
    seed: int = 0,
    save: str | Path | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Effect and null of every query head: (example, layer, head).

    inputs: clean prompts. corrupt: as many prompts, of the same token length each. answer, foil:
    default the clean run's top token, and the corrupt run's; `metric.Whole` texts are scored with
    all their tokens. seed: of the null. save: a file that keeps what is finished, so that an
    interrupted sweep goes on. Raises InputError when prompts differ in length, or when both runs
    give the same logit difference.
    """
    both = pair(lm, inputs, corrupt, answer, foil, direction)
    site = "layers.*.attn.z"
    base, source = (capture(lm, batch, site).stack(site) for batch in (both.base, both.source))
    shape = (lm.dims.layers, lm.dims.heads)
    cells = [
        # all positions, padding too: what stands there is read by no real token
        replaced(f"layers.{layer}.attn.z", z[layer, :, :, head : head + 1], units=[head])
        for z in (source, random_like(base, source, seed))
        for layer in range(shape[0])
        for head in range(shape[1])
    ]
    difference = swept(lm, both.base, cells, both.target, save=save, progress=progress)
    effect, null = both.normalise(difference).T.unflatten(1, (2, *shape)).unbind(1)
    axes = ("example", "layer", "head")
    return dataset(
        {"effect": (axes, effect), "null": (axes, null)} | both.differences,
        method="heads.activation_patching",
        provenance=lm.provenance,
        settings={"direction": direction},
        seed=seed,
        coords=both.coords | {"layer": list(range(shape[0])), "head": list(range(shape[1]))},
        null_kind=NULL,
        notes=both.notes(null),
    )
