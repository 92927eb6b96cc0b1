"""Keep weights: the model with the weights of a mask alone, or without them, while it runs.

Paper: bigram-subnetworks

    w'[weight] = w[weight] if it is kept, else 0        invert: the other way round

Biases, norms, embeddings and the read-out are of no mask, and stay.

Reads as: with these weights alone, what they are enough for; without them (`invert`), what the
model needs them for, once outputs with and without the edit are compared. Does not show how they do
it, and zero is far from anything a weight has of itself: compare with as many weights in the same
matrices, at random (`engine.masks.random_like`) or the largest (`largest_like`).
"""

from __future__ import annotations

from pathlib import Path

from stratoscope.engine.edit import Edit
from stratoscope.engine.masks import Mask, applied
from stratoscope.models.lm import LM


def edit(lm: LM, request: Mask | str | Path, *, invert: bool = False) -> Edit:
    """An edit that keeps these weights: `with keep_weights.edit(lm, mask): lm(...)`.

    request: a mask such as `circuits.bigram_subnetwork.fit` gives, or the folder it was saved to.
    invert: these weights are left out, and the others kept. Raises InputError for a mask of another
    model, LoadError for a folder that holds none.
    """
    mask = Mask.load(request) if isinstance(request, (str, Path)) else request
    return applied(lm, mask, invert=invert)
