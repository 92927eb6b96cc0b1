"""Description length: how many bits it takes to tell texts' labels, one after another, to someone
who has their states at a depth and learns as he is told.

Paper: textbook (Voita and Titov, "Information-theoretic probing with minimum description length",
2020; the control task: Hewitt and Liang, "Designing and interpreting probes with control tasks",
2019)

    bits[depth]  = t_1 log2 K - sum over blocks i of sum over texts of block i
                   log2 p(label | resid[depth, last token]; probe of the texts before block i)
    compression  = n log2 K / bits            K: kinds, n: texts; 1 is no better than guessing

Blocks end at 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.25, 12.5, 25, 50 and 100 % of the texts, those of less
than one text left out. The probe is a logistic regression on states standardised over all texts,
which sender and receiver both have; a kind's probability is mixed with one
more sighting of each kind, (t p + 1) / (t + K) after t texts, so that no label costs infinitely
many bits. Each draw takes the texts in another order.

null: a control task, labels dealt out anew to `types` of texts (each text its own, by default):
what a probe learns by heart. blind: the same code without the states, from the labels' shares.
Reads as: how much of a label stands at a depth, and how easily it is had: a probe that needs many
examples pays for them, which accuracy does not show. Does not show that the model uses it. Where
bits are no fewer than blind, nothing was learnt.
Cost: one run of the texts; 2 x draws x blocks probes a depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int

from stratoscope.errors import InputError
from stratoscope.layers import concept_depth
from stratoscope.models.lm import LM
from stratoscope.results import dataset

SHARES = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
NULL = "a control task: labels dealt out anew to types of texts"


def ends(n: int) -> list[int]:
    """Where blocks of n texts end."""
    return sorted({int(share * n) for share in SHARES if share * n >= 1})


def probabilities(
    x: Float[np.ndarray, "seen dim"],
    kinds: Int[np.ndarray, " seen"],
    asked: Float[np.ndarray, "text dim"],
    count: int,
    strength: float,
) -> Float[np.ndarray, "text kind"]:
    """What a probe of seen texts says of others, mixed with one more sighting of each kind."""
    from sklearn.linear_model import LogisticRegression

    said, there = np.zeros((len(asked), count)), np.unique(kinds)
    if len(there) == 1:
        said[:, there] = 1
    else:
        line = LogisticRegression(C=strength, max_iter=1000).fit(x, kinds)
        said[:, there] = line.predict_proba(asked)
    return (len(x) * said + 1) / (len(x) + count)


def online_code(
    x: Float[np.ndarray, "text dim"],
    kinds: Int[np.ndarray, " text"],
    count: int,
    strength: float,
) -> float:
    """Bits of all labels in this order: the first block at log2 `count` each, every other by the
    probe of what came before."""
    scale = x.std(axis=0)
    scale[scale < 1e-12] = 1.0  # what never varies says nothing, and divides by nothing
    x, at = (x - x.mean(axis=0)) / scale, ends(len(x))
    bits = at[0] * np.log2(count)
    for start, end in pairwise(at):
        said = probabilities(x[:start], kinds[:start], x[start:end], count, strength)
        bits -= np.log2(said[np.arange(end - start), kinds[start:end]]).sum()
    return float(bits)


def control(
    kinds: Int[np.ndarray, " text"], types: Int[np.ndarray, " text"], generator: np.random.Generator
) -> Int[np.ndarray, " text"]:
    """A label for each type of text, drawn from the texts' own labels."""
    return generator.permutation(kinds)[: types.max() + 1][types]


def measure(
    lm: LM,
    inputs: Any,
    *,
    labels: Sequence[Any],
    types: Sequence[Any] | None = None,
    strength: float = 0.1,
    draws: int = 5,
    batch: int = 16,
    seed: int = 0,
) -> xr.Dataset:
    """bits, null_bits (depth, draw), blind_bits (draw), and compression (depth), the mean over
    draws; uniform_bits, what guessing costs.

    inputs: texts, or their `concept_depth.states`. labels: the name of each text's kind, of two or
    more. types: of each text the type whose control label it has (its last word, say). strength:
    inverse of the probe's penalty, each dimension standardised. draws, seed: of orders and control
    labels. batch: texts in one forward pass. Raises InputError for labels or types that are not
    one for each text, for one kind alone, and for fewer than eight texts.
    """
    _, kinds = np.unique(np.asarray(labels), return_inverse=True)
    count = int(kinds.max(initial=0)) + 1
    if len(kinds) < 8 or count < 2 or draws < 1 or strength <= 0:
        raise InputError(
            f"{len(kinds)} labels of {count} kinds, draws={draws}, strength={strength}: eight "
            "texts or more of two kinds or more, a draw or more, a penalty above 0."
        )
    given = isinstance(inputs, torch.Tensor) and inputs.ndim == 3
    read = inputs if given else concept_depth.states(lm, inputs, batch)
    own = np.arange(len(kinds))
    if types is not None:
        _, own = np.unique(np.asarray(types), return_inverse=True)
    if not len(read) == len(kinds) == len(own):
        raise InputError(
            f"{len(kinds)} labels and {len(own)} types for {len(read)} texts: give one for each."
        )
    x = read.cpu().numpy()
    bits, null = np.zeros((2, x.shape[1], draws))
    blind = np.zeros(draws)
    for draw in range(draws):
        generator = np.random.default_rng([seed, draw])
        order = generator.permutation(len(kinds))
        dealt = control(kinds, own, generator)
        blind[draw] = online_code(np.zeros((len(kinds), 1)), kinds[order], count, strength)
        for depth in range(x.shape[1]):
            for table, asked in ((bits, kinds), (null, dealt)):
                states = x[order, depth]
                table[depth, draw] = online_code(states, asked[order], count, strength)
    uniform = len(kinds) * np.log2(count)
    return dataset(
        {
            "bits": (("depth", "draw"), bits),
            "null_bits": (("depth", "draw"), null),
            "blind_bits": (("draw",), blind),
            "uniform_bits": ((), uniform),
            "compression": (("depth",), uniform / bits.mean(axis=1)),
        },
        method="layers.description_length",
        provenance=lm.provenance,
        settings={"strength": strength, "draws": draws, "texts": len(kinds), "kinds": count},
        seed=seed,
        coords={"depth": list(range(x.shape[1]))},
        null_kind=NULL,
    )
