"""Gradient times input: how the logit difference would change if each token's embedding faded a
little.

Paper: textbook (Shrikumar et al., "Not Just a Black Box: Learning Important Features Through
Propagating Activation Differences", 2016; Denil et al., 2014)

    attribution[position] = sum_dim  (x - blank)[position, dim] * d difference / d x[position, dim]

x enters layer 0; blank would enter it if all token embeddings were zero. Where positions are
rotary, blank is zero and this is gradient . x; with learned positions x - blank is the token's
embedding alone: the position counts for nothing.

Reads as: the first-order effect of each token, one backward pass. Does not show what removing a
token does: a saturated softmax or norm has a small gradient however decisive the token, and the
values sum to nothing in particular.
"""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.entry import entry, evidence
from stratoscope.engine.metric import Words
from stratoscope.engine.sequence import slope, target
from stratoscope.models.lm import LM
from stratoscope.results import dataset


def along(
    gradient: Float[Tensor, "example position dim"], step: Float[Tensor, "example position dim"]
) -> Float[Tensor, "example position"]:
    """The first-order change of each position's step."""
    return (gradient * step).sum(dim=-1)


def measure(lm: LM, inputs: Any, *, answer: Words = None, foil: Words = None) -> xr.Dataset:
    """attribution (example, position) and logit_difference (example): answer minus foil at the last
    token.

    answer, foil: one for all examples or one each (default: as `target` chooses); `metric.Whole`
    texts are scored with all their tokens. attribution is in logits, positive towards the answer;
    NaN at padding and at image tokens. Raises SiteError for a
    model without token embeddings or vocabulary read-out, InputError for inputs without tokens.
    """
    batch = lm.batch(inputs)
    x, blank = entry(lm, batch, "zero")
    wanted = target(lm, batch, answer, foil)
    difference, gradient = slope(lm, batch, wanted)
    gap = torch.where(evidence(batch), 0.0, torch.nan)
    return dataset(
        {
            "attribution": (
                ("example", "position"),
                along(gradient.float(), (x - blank).float()) + gap,
            ),
            "logit_difference": (("example",), difference.float()),
        },
        method="tokens.gradient_times_input",
        provenance=lm.provenance,
        coords=batch.coords() | wanted.coords,
        notes=" ".join(wanted.notes),
    )
