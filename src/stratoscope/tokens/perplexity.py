"""Perplexity: how unlikely a causal model holds texts, and what an edit costs in it.

Paper: llm-drop

    loss[example]  = mean over the tokens but the first of -ln p(token | what stands before it)
    after[example] = the same inside the edit
    perplexity     = exp(sum of all losses / number of predictions)
    rise           = perplexity inside the edit / perplexity - 1

Predictions are pooled, so that a long text counts for more than a short one; the interval of `rise`
draws whole texts. Perplexities of models with different tokenizers are not comparable.

Reads as: what a change costs the model in the task that it was trained for. Does not show which
answers change: the same rise can be a little on every token or a lot on a few.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from stratoscope.engine.edit import Edit
from stratoscope.errors import InputError
from stratoscope.maths import resample
from stratoscope.models.lm import LM
from stratoscope.results import dataset
from stratoscope.tokens._surprisal import surprisal


def perplexity(result: xr.Dataset, name: str = "loss") -> float:
    """Of all texts of a result together: exp of their mean nats a prediction. name: "loss", or
    "after" for inside the edit."""
    counts = result.predictions.values
    return float(np.exp((result[name].values * counts).sum() / counts.sum()))


def rise(result: xr.Dataset, seed: int = 0) -> resample.Interval:
    """By which part of itself perplexity grows inside the edit, with 95 % over texts drawn anew.

    Raises InputError for a result that was measured without `after`.
    """
    if "after" not in result:
        raise InputError("this result has no edit: measure it with `after=` an edit.")
    counts = result.predictions.values.astype(float)
    more = (result.after.values - result.loss.values) * counts
    made = resample.interval(more, counts, seed=seed)
    value, low, high = (float(np.expm1(x)) for x in made[:3])
    return made._replace(value=value, low=low, high=high)


def measure(lm: LM, inputs: Any, *, after: Edit | None = None) -> xr.Dataset:
    """loss (example) in nats and predictions (example), their number; with an edit, `after`
    (example), the loss inside it.

    Raises SiteError unless the model is a causal LM; InputError for a text of a single token, of
    which nothing is predicted, or an edit of another model.
    """
    if after is not None and after.lm.model is not lm.model:
        raise InputError("after: an edit of another model; make it for this one.")
    batch = lm.batch(inputs)
    ids, mask = batch.text
    rows = [row[real].tolist() for row, real in zip(ids, mask)]
    if short := [number for number, row in enumerate(rows) if len(row) < 2]:
        raise InputError(
            f"texts {short} have one token, and the first token of a text is not predicted: give "
            "longer ones."
        )
    losses = {"loss": surprisal(lm, rows).nanmean(dim=1)}
    if after is not None:
        with after:
            losses["after"] = surprisal(lm, rows).nanmean(dim=1)
    return dataset(
        {name: (("example",), value) for name, value in losses.items()}
        | {"predictions": (("example",), [len(row) - 1 for row in rows])},
        method="tokens.perplexity",
        provenance=lm.provenance,
        settings={"after": after.note if after is not None else ""},
        coords={"example_text": batch.coords()["example_text"]} if batch.tokens else {},
    )
