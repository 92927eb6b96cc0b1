"""Any sequence: items, residues, patches of a series, as well as tokens.

A `Batch` knows one layout: ids, or a series (`signal.py`), from position 0 on, and a mask, under
the names that text models have. What the model at hand calls its sequence and its mask stands in
its family, and is translated here on the way in and on the way out. A model may name its positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from stratoscope.errors import FamilyError, InputError
from stratoscope.models.batch import Batch
from stratoscope.models.family import Family


def as_tokens(family: Family, inputs: Any) -> Any:
    """A mapping of model inputs with its sequence and mask under a Batch's names; anything else as
    it is. Raises InputError for a mapping that holds names of both kinds."""
    if not isinstance(inputs, Mapping):
        return inputs
    names = family.names
    twice = [new for old, new in names.items() if old != new and {old, new} <= inputs.keys()]
    if twice:
        raise InputError(f"inputs hold `{twice[0]}` beside the model's own name for it: give one.")
    return {names.get(name, name): value for name, value in inputs.items()}


def arguments(family: Family, batch: Batch) -> dict[str, Tensor]:
    """Keyword arguments of the model's forward. Raises InputError where a model that takes no mask
    would see padding."""
    given, main = batch.forward_arguments(), family.towers[""]
    if batch.source is not None:
        return given
    if not main.mask:
        if batch.padded:
            raise InputError(
                f"sequences of {batch.lengths.tolist()} positions in one batch, and this model "
                "takes no mask, so padding would reach the short ones: run each length by itself."
            )
        given.pop("attention_mask", None)
    own = {new: old for old, new in family.names.items()}
    return {own.get(name, name): value for name, value in given.items()}


def named(model: Any, batch: Batch) -> Batch:
    """The batch with its positions called as `model.name_positions(batch)` calls them, if the model
    has that: for each example one text for each real position. Raises FamilyError for another
    number."""
    namer = getattr(model, "name_positions", None)
    if namer is None or batch.mask is None:
        return batch
    rows: Sequence[Sequence[str]] = tuple(tuple(map(str, row)) for row in namer(batch))
    counts, real = [len(row) for row in rows], batch.lengths.tolist()
    if counts != real:
        raise FamilyError(
            f"{type(model).__name__}.name_positions gave {counts} names for {real} positions: it "
            "must name every real position of every example."
        )
    return replace(batch, tokens=rows, words=True)
