"""Streams of made sequences whose best possible predictor is known: one file for each.

    stream = synthetic.recall.stream(seed=0, split="train")
    stream.batch(step, 32)                  # input_ids and labels, a pure function of (seed, split,
                                            # step)
    stream.optimal(ids)                     # what the best predictor gives the next token
    stream.floor(ids, labels)               # its loss: what a trained model can reach at most
    stream.pairs(16, seed=0)                # a task: clean, corrupt, answer, foil

A file here that defines `stream(*, seed, split, ...)` is one; there is no list to edit.
"""

from __future__ import annotations

from pkgutil import iter_modules
from typing import TYPE_CHECKING

from stratoscope._lazy import lazy

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, __path__)


def names() -> list[str]:
    """Every stream there is."""
    return sorted(module.name for module in iter_modules(__path__) if module.name[0] != "_")
