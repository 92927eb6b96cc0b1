"""Attention rollout: how much of each token reaches the place where the answer is read, if
attention were all that moved anything.

Paper: textbook (Abnar and Zuidema, "Quantifying Attention Flow in Transformers", 2020)

    A[layer]   = (mean over heads of pattern[layer] + 1) / 2          rows sum to 1
    rollout    = A[last] ... A[1] A[0]                                (query, key)
    attribution[position] = rollout[read, position]

read is the position at which the model's answer is read; of a model that reads a mean, the mean of
its rows. The 1 is the residual stream, said to carry half.

Reads as: where paths of attention begin, all heads alike. **A weak answer**: it knows neither what
a head reads from a token nor what it is good for, nor the answer; a token that every head rests on
comes out first. `docs/attribution.md` has the numbers beside the other methods'. Does not show what
the answer hangs on: for that, `tokens.exchange` or `tokens.shapley`.
Cost: one run that keeps every pattern.
"""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.trace import capture
from stratoscope.errors import SiteError
from stratoscope.models import source
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.models.sites import Site
from stratoscope.results import dataset


def rollout(
    patterns: Float[Tensor, "layer example head query key"], stream: float = 0.5
) -> Float[Tensor, "example query key"]:
    """The product over layers of mean patterns mixed with the identity; `stream` is its share."""
    size = patterns.shape[-1]
    total = eye = torch.eye(size, dtype=patterns.dtype, device=patterns.device)
    for pattern in patterns.mean(dim=2):
        total = ((1 - stream) * pattern + stream * eye) @ total
    return total


@torch.no_grad()
def measure(lm: LM, inputs: Any) -> xr.Dataset:
    """attribution (example, position), which sums to 1 over a prompt; NaN at padding.

    inputs: prompts, or pictures, whose positions are their patches. Raises SiteError for a model
    whose attention cannot be seen, that has layers without it, or an encoder beside.
    """
    sites, batch = patterned(lm), lm.batch(inputs)
    seen = capture(lm, batch, *sites)
    total = rollout(torch.stack([seen[site].float() for site in sites]))
    return dataset(
        {"attribution": (("example", "position"), read_row(lm, batch, total))},
        method="tokens.attention_rollout",
        provenance=lm.provenance,
        coords=batch.coords(),
    )


def patterned(lm: LM) -> list[Site]:
    """The patterns of all layers. Raises SiteError where attention is not all that moves things
    between positions."""
    source.refuse(lm, "paths of attention are followed through one stack")
    sites = lm.layout.resolve("layers.*.attn.pattern")
    if len(sites) < lm.dims.layers:
        raise SiteError(
            f"{lm.family.name} has attention in {len(sites)} of {lm.dims.layers} layers: the "
            "patterns (`attn.pattern`) of the others do not exist, and paths cannot be followed "
            "through them."
        )
    return sites


def read_row(
    lm: LM, batch: Batch, total: Float[Tensor, "example query key"]
) -> Float[Tensor, "example position"]:
    """The row of the position that is read, or the mean of all real rows; NaN at padding."""
    real = torch.ones(total.shape[:2], dtype=torch.bool, device=total.device)
    real = real if batch.mask is None else batch.mask.to(total.device)
    if lm.readout.single:
        at = lm.readout.positions(batch).to(total.device)
        row = total[torch.arange(len(at), device=total.device), at]
    else:
        weight = real.to(total) / real.sum(dim=1, keepdim=True)
        row = (weight[:, None] @ total)[:, 0]
    return row.masked_fill(~real, torch.nan)
