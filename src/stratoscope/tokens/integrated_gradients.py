"""Integrated gradients: the logit difference shared out over the tokens, along the way from a blank prompt to this one.

Paper: textbook (Sundararajan et al., "Axiomatic Attribution for Deep Networks", 2017)

    attribution[position] = sum_dim (x - blank)[position, dim] * integral_0^1  dF(blank + a (x - blank)) / dx[position, dim]  da

F is the logit difference answer - foil at the last token, x what enters layer 0, blank what would enter it if every
token's embedding were the baseline. Positions are the same at both ends, so they count for nothing. The integral is
Gauss-Legendre quadrature. Exactly, the attributions sum to F(x) - F(blank); `completeness_error` is by how much they miss.

Reads as: each token's share of the difference between this prompt and a blank one. Does not show what removing one token
does; another baseline gives other shares. The zero baseline starts where RMSNorm is singular (a model with rotary
positions reads only direction, and zero has none), so that its integral converges slowly; see `completeness_error`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from stratoscope.engine.entry import ENTRY, entry, evidence
from stratoscope.engine.gradients import gradients
from stratoscope.engine.intervene import intervene, replaced
from stratoscope.engine.metric import Words, last_logits, target
from stratoscope.errors import InputError
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM
from stratoscope.results import dataset

Points = Float[Tensor, "step example position dim"]


def shares(
    gradient: Callable[[Points], Points],
    x: Float[Tensor, "example position dim"],
    blank: Float[Tensor, "example position dim"],
    steps: int,
    at_once: int = 1,
) -> Float[Tensor, "example position"]:
    """The integral along the straight path, exact where the gradient is a polynomial of degree below 2 * steps.

    gradient: points on the path (step, example, position, dim) -> gradients there; called with `at_once` points.
    """
    nodes, weights = np.polynomial.legendre.leggauss(steps)  # on [-1, 1]
    way = x - blank
    mean = torch.zeros_like(way, dtype=torch.float64)
    for a, w in zip(torch.tensor((nodes + 1) / 2).split(at_once), torch.tensor(weights / 2).split(at_once)):
        points = blank + a.to(x)[:, None, None, None] * way
        mean += torch.einsum("s,sepd->epd", w.to(mean), gradient(points).to(mean))
    return (mean * way).sum(dim=-1).float()


def measure(
    lm: LM,
    inputs: Any,
    *,
    answer: Words = None,
    foil: Words = None,
    steps: int = 32,
    baseline: Literal["mean", "zero"] = "mean",
    batch_size: int = 8,
) -> xr.Dataset:
    """attribution (example, position); logit_difference, baseline_difference, completeness_error (example), in logits.

    answer, foil: one for all examples or one each (default: the model's top token and its runner-up). steps: points of the
    path. baseline: the mean embedding of the vocabulary, or zero. batch_size: prompts in one pass (at least the examples
    given). NaN at padding and at image tokens. Raises SiteError for a model without token embeddings or vocabulary
    read-out, InputError for inputs without tokens or a bad option.
    """
    if baseline not in ("mean", "zero"):
        raise InputError(f"baseline {baseline!r}: choose 'mean' or 'zero'.")
    if steps < 1 or batch_size < 1:
        raise InputError(f"steps={steps}, batch_size={batch_size}: both must be at least 1.")
    batch = lm.batch(inputs)
    x, blank = entry(lm, batch, baseline)
    asked = target(lm, batch, answer, foil)
    order = torch.arange(len(batch))

    def gradient(points: Points) -> Points:
        """Every point of the path is the whole batch once more, so that a pass takes several points."""
        many = _again(batch, len(points))
        metric = lambda logits: asked.difference(logits, order.repeat(len(points)))  # noqa: E731
        _, _, found = gradients(lm, many, [ENTRY], metric, start=points.flatten(0, 1))
        [gradient] = found.values()
        return gradient.unflatten(0, (len(points), len(batch)))

    attribution = shares(gradient, x, blank, steps, max(1, batch_size // len(batch)))
    difference = asked.difference(last_logits(lm, batch)).float()
    with intervene(lm, replaced(ENTRY, blank)):
        before = asked.difference(last_logits(lm, batch)).float()
    real = evidence(batch)
    error = torch.where(real, attribution, 0.0).sum(dim=1) - (difference - before)
    return dataset(
        {
            "attribution": (("example", "position"), attribution + torch.where(real, 0.0, torch.nan)),
            "logit_difference": (("example",), difference),
            "baseline_difference": (("example",), before),
            "completeness_error": (("example",), error),
        },
        method="tokens.integrated_gradients",
        provenance=lm.provenance,
        settings={"steps": steps, "baseline": baseline},
        coords=batch.coords() | asked.coords,
        notes=" ".join(asked.notes),
    )


def _again(batch: Batch, times: int) -> Batch:
    """The whole batch several times over."""
    extra = {name: torch.cat([value] * times) for name, value in batch.extra.items()}
    image = None if batch.image is None else batch.image.repeat(times, 1)
    return Batch(batch.ids.repeat(times, 1), batch.mask.repeat(times, 1), extra, batch.tokens * times, image)
