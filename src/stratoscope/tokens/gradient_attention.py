"""Gradient-weighted attention: how much of each token reaches the place where the answer is read,
counting attention by how far more of it would help the answer.

Paper: textbook (Chefer et al., "Generic Attention-model Explainability for Interpreting Bi-Modal
and Encoder-Decoder Transformers", 2021)

    A[layer] = mean over heads of  max(0, pattern * d difference / d pattern)
    R        = (1 + A[last]) ... (1 + A[1]) (1 + A[0])                        (query, key)
    attribution[position] = (R - 1)[read, position]

difference is answer - foil, in logits, where the answer is read. Where the model has a class token
(ViT) or reads the last token, `read` is that one; of a model that reads a mean, the mean of rows.

Reads as: where paths of attention begin that speak for the answer, in first order. **A weak
answer** (`docs/attribution.md` has the numbers): what speaks against is dropped, what MLPs do is
taken for the identity, and a pattern that is nearly one-hot has hardly a gradient however much
hangs on it. Does not show what the answer hangs on: for that, `tokens.exchange` or
`tokens.shapley`.
Cost: one run and one backward pass that keep every pattern.
"""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.gradients import gradients
from stratoscope.engine.metric import Words, target
from stratoscope.models.lm import LM
from stratoscope.results import dataset
from stratoscope.tokens.attention_rollout import patterned, read_row


def relevance(
    patterns: Float[Tensor, "layer example head query key"],
    slopes: Float[Tensor, "layer example head query key"],
) -> Float[Tensor, "example query key"]:
    """R - 1 of the equation above."""
    total = eye = torch.eye(patterns.shape[-1], dtype=patterns.dtype, device=patterns.device)
    for weighed in (patterns * slopes).clamp_min(0).mean(dim=2):
        total = total + weighed @ total
    return total - eye


def measure(lm: LM, inputs: Any, *, answer: Words = None, foil: Words = None) -> xr.Dataset:
    """attribution (example, position), in logits and never below 0, and logit_difference (example);
    NaN at padding.

    inputs: prompts, or pictures, whose positions are their patches. answer, foil: one for all
    examples or one each, one token (or class); default as `target` chooses. Raises SiteError for a
    model whose attention cannot be seen, that has layers without it, or an encoder beside.
    """
    sites, batch = patterned(lm), lm.batch(inputs)
    wanted = target(lm, batch, answer, foil, single="its gradient is taken at one position")
    difference, seen, slopes = gradients(lm, batch, sites, wanted.difference)
    total = relevance(
        *(torch.stack([table[site].float() for site in sites]) for table in (seen, slopes))
    )
    return dataset(
        {
            "attribution": (("example", "position"), read_row(lm, batch, total)),
            "logit_difference": (("example",), difference.float()),
        },
        method="tokens.gradient_attention",
        provenance=lm.provenance,
        coords=batch.coords() | wanted.coords,
        notes=" ".join(wanted.notes),
    )
