"""What answers that need no understanding are worth on these questions, and the right ones.

Paper: textbook

    oracle      the gold choice: 1, or the scorer is broken
    chance      every choice alike: the mean of 1 / choices
    position    always the place that is most often right
    majority    always the text that is most often right; chance where it is no choice
    longest     the longest choice
    blind       the model, without the context

Reads as: what a model must beat before it is said to have read. Does not show that what beats them
has understood: a cue that no control here looks for may tell. Position and majority are chosen on
the same items, so they are as good as such an answer can be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stratoscope.benchmarks import likelihood
from stratoscope.benchmarks._item import Item, checked, right
from stratoscope.benchmarks._shared import Progress, silent
from stratoscope.models.lm import LM
from stratoscope.results import dataset


def score(
    lm: LM | None,
    inputs: Any,
    *,
    normalise: str = "sum",
    save: str | Path | None = None,
    progress: Progress = silent,
) -> xr.Dataset:
    """right (control, item) and its mean, accuracy (control). lm: None leaves blind out. normalise:
    of the blind score, as `benchmarks.likelihood` has it; its "blind" is "sum" here.

    save: the file that `benchmarks.likelihood.score` was given; the blind scores go on from the one
    beside it. progress(done, all): their choices. Raises InputError for what is no item.
    """
    items = checked(inputs)
    right_by = {name: right(_scores(items, rule(items)), items) for name, rule in RULES.items()}
    if lm is not None:
        bare = [replace(item, context="") for item in items]
        how = "sum" if normalise == "blind" else normalise
        file = likelihood.blind_file(save)
        scored = likelihood.score(lm, bare, save=file, normalise=how, progress=progress)
        right_by["blind"] = scored["right"].to_numpy()
    table = np.stack(list(right_by.values()))
    return dataset(
        {
            "right": (("control", "item"), table),
            "accuracy": (("control",), table.mean(axis=1)),
        },
        method="benchmarks.controls",
        provenance=None if lm is None else lm.provenance,
        settings={"normalise": normalise},
        coords={"control": list(right_by), "id": (("item",), [item.id for item in items])},
    )


Rule = Callable[[Item], Sequence[float]]  # the score of each choice


def _oracle(items: Sequence[Item]) -> Rule:
    return lambda item: [float(n == item.gold) for n in range(len(item.choices))]


def _chance(items: Sequence[Item]) -> Rule:
    return lambda item: [0.0] * len(item.choices)


def _position(items: Sequence[Item]) -> Rule:
    place = Counter(item.gold for item in items).most_common(1)[0][0]
    return lambda item: [float(n == place) for n in range(len(item.choices))]


def _majority(items: Sequence[Item]) -> Rule:
    text = Counter(item.choices[item.gold] for item in items).most_common(1)[0][0]
    return lambda item: [float(choice == text) for choice in item.choices]


def _longest(items: Sequence[Item]) -> Rule:
    return lambda item: [float(len(choice)) for choice in item.choices]


RULES: dict[str, Callable[[Sequence[Item]], Rule]] = {
    "oracle": _oracle,
    "chance": _chance,
    "position": _position,
    "majority": _majority,
    "longest": _longest,
}


def _scores(items: Sequence[Item], rule: Rule) -> np.ndarray:
    table = np.full((len(items), max(len(item.choices) for item in items)), np.nan)
    for number, item in enumerate(items):
        table[number, : len(item.choices)] = rule(item)
    return table
