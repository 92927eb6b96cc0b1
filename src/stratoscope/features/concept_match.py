"""Concept match: how near a prompt's last token is, in every layer, to the nearest of some concept
prompts; and a small classifier on these numbers, such as a detector of harmful requests.

Paper: toxicdetector

    e[layer]            = (resid_post[layer, last token] - mean) / deviation
    match[layer]        = max over concepts of e[layer] . e_concept[layer]
    score               = sigmoid(W2 relu(W1 z + b1) + b2)       z: match, standardised over layers

mean and deviation of every dimension, and those of match, are of the prompts that were learned
from; `cosine=True` takes directions alone, so that the size of a state counts for nothing. Concepts
are short abstractions of what is looked for ("a request to harm somebody"), written before the
test is seen.

Reads as: a probability, before a token of the answer exists, at the cost of reading the prompt.
Does not show that the model knows harm: a prompt's length or its words may tell the kinds apart as
well. `controls` gives the scores of both from the same prompts; texts of one wrapping or template
in both halves are found by that. Held-out prompts alone say what a detector is worth.
Cost: one run over the prompts; the classifier has (layers + 2) * hidden numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.engine.trace import capture
from stratoscope.errors import InputError
from stratoscope.features._texts import parts
from stratoscope.models.lm import LM
from stratoscope.results import dataset
from stratoscope.store.fitted import Fitted

SITE = "layers.*.resid_post"


def match(
    states: Float[Tensor, "example layer dim"],
    concepts: Float[Tensor, "concept layer dim"],
    *,
    cosine: bool = False,
) -> tuple[Float[Tensor, "example layer"], Int[Tensor, "example layer"]]:
    """The largest product with a concept in every layer, and which concept that is."""
    if cosine:
        states, concepts = (torch.nn.functional.normalize(x, dim=-1) for x in (states, concepts))
    best = torch.einsum("eld,cld->elc", states, concepts).max(dim=-1)
    return best.values, best.indices


@dataclass(frozen=True, eq=False, kw_only=True)
class Detector(Fitted):
    """Concept prompts in units of the learned prompts' mean and deviation, and the classifier."""

    mean: Float[Tensor, "layer dim"]
    deviation: Float[Tensor, "layer dim"]
    concepts: Float[Tensor, "concept layer dim"]
    centre: Float[Tensor, " layer"]
    spread: Float[Tensor, " layer"]
    hidden_weight: Float[Tensor, "layer hidden"]
    hidden_bias: Float[Tensor, " hidden"]
    weight: Float[Tensor, " hidden"]
    bias: Float[Tensor, ""]

    def matched(
        self, states: Float[Tensor, "example layer dim"]
    ) -> tuple[Float[Tensor, "example layer"], Int[Tensor, "example layer"]]:
        """`match` of the last tokens' states, as the model gives them."""
        cosine = bool(self.settings["cosine"])
        return match((states - self.mean) / self.deviation, self.concepts, cosine=cosine)

    def score(self, matched: Float[Tensor, "example layer"]) -> Float[Tensor, " example"]:
        """The probability of label 1."""
        z = (matched - self.centre) / self.spread
        hidden = (z @ self.hidden_weight + self.hidden_bias).relu()
        return (hidden @ self.weight + self.bias).sigmoid()


@torch.no_grad()
def fit(
    lm: LM,
    inputs: Any,
    *,
    labels: Sequence[int],
    concepts: Any,
    hidden: int = 64,
    cosine: bool = False,
    seed: int = 0,
) -> Detector:
    """A detector of label 1. labels: 0 or 1 for each prompt, two or more of each.

    concepts: prompts that say in other words what is looked for. hidden: units of the classifier.
    seed: of its first weights. Raises InputError for labels of one kind, or too few or many.
    """
    kinds = _labels(labels, len(lm.batch(inputs)))
    if hidden < 1:
        raise InputError(f"hidden={hidden}: the classifier needs one unit or more.")
    states, ideas = _last(lm, inputs), _last(lm, concepts)
    mean, deviation = states.mean(dim=0), _not_zero(states.std(dim=0))
    ideas = (ideas - mean) / deviation
    matched, _ = match((states - mean) / deviation, ideas, cosine=cosine)
    centre, spread = matched.mean(dim=0), _not_zero(matched.std(dim=0))
    w1, b1, w2, b2 = _classifier(((matched - centre) / spread).numpy(), kinds, hidden, seed)
    return Detector(
        mean=mean,
        deviation=deviation,
        concepts=ideas,
        centre=centre,
        spread=spread,
        hidden_weight=w1,
        hidden_bias=b1,
        weight=w2[:, 0],
        bias=b2[0],
        provenance=lm.provenance,
        settings={"hidden": hidden, "cosine": cosine, "prompts": len(kinds)},
        seed=seed,
    )


@torch.no_grad()
def measure(lm: LM, inputs: Any, *, fitted: Detector | str | Path) -> xr.Dataset:
    """score (example), the probability of label 1; match and nearest, the number of the concept
    that matches best (example, layer).

    fitted: a detector, or a folder of one. Raises InputError for one of another model's size.
    """
    own = fitted if isinstance(fitted, Detector) else Detector.load(fitted)
    shape = (lm.dims.layers, lm.dims.dim)
    if own.mean.shape != shape:
        raise InputError(
            f"the detector was fitted on states of (layer, dim) = {tuple(own.mean.shape)}, and "
            f"this model has {shape}: fit one for it."
        )
    batch = lm.batch(inputs)
    matched, nearest = own.matched(_last(lm, batch))
    axes = ("example", "layer")
    return dataset(
        {
            "score": (("example",), own.score(matched)),
            "match": (axes, matched),
            "nearest": (axes, nearest),
        },
        method="features.concept_match",
        provenance=lm.provenance,
        settings={"concepts": len(own.concepts), **own.settings},
        coords={"layer": list(range(lm.dims.layers))}
        | ({"example_text": batch.coords()["example_text"]} if batch.tokens else {}),
    )


def controls(
    lm: LM, inputs: Any, *, labels: Sequence[int], other: Any
) -> dict[str, Float[np.ndarray, " example"]]:
    """Scores of `other` prompts by what needs no model: "length", their number of tokens, and
    "words", which tokens they hold; logistic regressions on the same prompts and labels.

    Raises InputError as `fit` does.
    """
    from sklearn.linear_model import LogisticRegression

    one, two = lm.batch(inputs), lm.batch(other)
    kinds, found = _labels(labels, len(one)), {}
    for name in ("length", "words"):
        x, y = (_counts(lm, batch, name) for batch in (one, two))
        mean, deviation = x.mean(axis=0), x.std(axis=0)
        deviation[deviation == 0] = 1.0
        line = LogisticRegression(C=1.0, max_iter=1000).fit((x - mean) / deviation, kinds)
        found[name] = line.predict_proba((y - mean) / deviation)[:, 1]
    return found


def _counts(lm: LM, batch: Any, name: str) -> Float[np.ndarray, "example count"]:
    ids, mask = (x.cpu() for x in batch.text)
    if name == "length":
        return mask.sum(dim=1, keepdim=True).double().numpy()
    held = torch.zeros(len(ids), lm.dims.vocab)
    held.scatter_add_(1, ids.clamp(0, lm.dims.vocab - 1), mask.float())
    return (held > 0).double().numpy()


def _last(lm: LM, inputs: Any) -> Float[Tensor, "example layer dim"]:
    """The last token's stream after every layer, a few prompts at a time."""
    found = [
        capture(lm, part, SITE, positions=-1).stack(SITE).transpose(0, 1).float().cpu()
        for part in parts(lm, lm.batch(inputs))
    ]
    return torch.cat(found)


def _not_zero(deviation: Tensor) -> Tensor:
    """A number that never varies is not divided."""
    return torch.where(deviation > 1e-9, deviation, torch.ones_like(deviation))


def _labels(labels: Sequence[int], prompts: int) -> Int[np.ndarray, " example"]:
    kinds = np.asarray(labels)
    counts = [int((kinds == kind).sum()) for kind in (0, 1)]
    if kinds.ndim != 1 or len(kinds) != prompts or sum(counts) != len(kinds) or min(counts) < 2:
        raise InputError(
            f"labels are 0 or 1 for each of {prompts} prompts, two or more of each; got "
            f"{len(kinds)} labels, {counts[0]} times 0 and {counts[1]} times 1."
        )
    return kinds


def _classifier(
    z: Float[np.ndarray, "example layer"],
    kinds: Int[np.ndarray, " example"],
    hidden: int,
    seed: int,
) -> list[Tensor]:
    """Weight and bias of both layers, learned on all prompts to the end."""
    from sklearn.neural_network import MLPClassifier

    net = MLPClassifier((hidden,), solver="lbfgs", alpha=1.0, max_iter=500, random_state=seed)
    net.fit(z.astype(np.float64), kinds)
    (w1, w2), (b1, b2) = net.coefs_, net.intercepts_
    return [torch.tensor(x).float() for x in (w1, b1, w2, b2)]
