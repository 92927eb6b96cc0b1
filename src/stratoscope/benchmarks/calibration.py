"""Whether a model knows how sure it may be: its confidence in what it chooses, against how often it
is right.

Paper: lazy-neuron

    error = sum over bins of confidence of  share[bin] * |accuracy[bin] - mean confidence[bin]|

This is the expected calibration error with bins of equal width. Confidence is the probability of
the choice, after a softmax over an item's choices.

Reads as: 0, it is right as often as it says. Does not show that it is right: guessing evenly among
n choices, with confidence 1 / n, has no error either. Few items in a bin make it too large.
"""

from __future__ import annotations

from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.benchmarks import likelihood
from stratoscope.errors import InputError
from stratoscope.models.lm import LM
from stratoscope.results import dataset


def expected_error(
    probabilities: Float[Tensor, "example class"], truth: Int[Tensor, " truth"], *, bins: int = 15
) -> float:
    """The expected calibration error of probabilities. Raises InputError for no examples or
    bins."""
    if len(probabilities) != len(truth) or not len(probabilities) or bins < 1:
        raise InputError(
            f"{len(probabilities)} rows of probabilities, {len(truth)} truths, {bins} bins: "
            "give one truth for each row, and at least one bin."
        )
    sure, guess = probabilities.max(dim=1)
    return _error(sure, guess.eq(truth).to(sure), bins)


def score(lm: LM, inputs: Any, *, bins: int = 15, normalise: str = "sum") -> xr.Dataset:
    """confidence and right (item), and the calibration error.

    inputs: items. normalise: as `benchmarks.likelihood` has it. A tie counts as its share. Raises
    what `benchmarks.likelihood.score` raises, and InputError for no bins.
    """
    if bins < 1:
        raise InputError(f"bins={bins}: give at least one.")
    scored = likelihood.score(lm, inputs, normalise=normalise)
    scores = torch.from_numpy(scored["score"].to_numpy()).double()
    sure = scores.nan_to_num(nan=-torch.inf).softmax(dim=1).amax(dim=1)
    right = torch.from_numpy(scored["right"].to_numpy()).to(sure)
    return dataset(
        {
            "confidence": (("item",), sure),
            "right": (("item",), right),
            "error": ((), torch.tensor(_error(sure, right, bins))),
        },
        method="benchmarks.calibration",
        provenance=lm.provenance,
        settings={"bins": bins, "normalise": normalise},
        coords={"id": (("item",), scored["id"].values)},
    )


def _error(sure: Float[Tensor, " example"], right: Float[Tensor, " example"], bins: int) -> float:
    place = (sure * bins).long().clamp_max(bins - 1)
    gaps = torch.zeros(bins, dtype=sure.dtype, device=sure.device).index_add(0, place, right - sure)
    return float(gaps.abs().sum() / len(sure))
