"""Texts a few at a time, and which of their tokens count."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Bool
from torch import Tensor

from stratoscope.engine.harvest import begins
from stratoscope.models.batch import Batch
from stratoscope.models.lm import LM

AT_ONCE = 1024  # tokens that run at the same time


def parts(lm: LM, batch: Batch) -> Iterator[Batch]:
    """Some examples at a time, in order; those with pictures one by one."""
    ids, mask = batch.text
    if batch.extra:
        yield from (batch.example(number) for number in range(len(batch)))
        return
    size = max(1, AT_ONCE // ids.shape[1])
    for begin in range(0, len(batch), size):
        some = slice(begin, begin + size)
        yield lm.batch([row[real].tolist() for row, real in zip(ids[some], mask[some])])


def counted(lm: LM, batch: Batch) -> Bool[Tensor, "example position"]:
    """The real tokens but BOS, whose vector is as no other's."""
    ids, mask = batch.text
    found = mask.clone()
    if first := begins(lm):
        found[:, 0] &= ids[:, 0] != first[0]
    return found
