"""The smaller sister of tiny-gpt: 0.8 million parameters, the same text, tokens and context."""

from __future__ import annotations

from collections.abc import Callable

from stratoscope.engine.train import Recipe
from stratoscope.lab.miniatures import tiny_gpt

VERSION = tiny_gpt.VERSION
# to its end, seed 0, one thread: how long it took, and how well it does
TRAINED = "8 CPU minutes: 2.08 bits a byte"


def recipe(
    seed: int,
    say: Callable[[str], object],
    *,
    layers: int = 4,
    dim: int = 96,
    heads: int = 3,
    steps: int = 1500,
    context: int = 256,
    megabytes: float = 16.0,
) -> Recipe:
    """tiny-gpt's recipe with other sizes; all else is tiny-gpt's."""
    sizes = {
        "layers": layers,
        "dim": dim,
        "heads": heads,
        "steps": steps,
        "context": context,
        "megabytes": megabytes,
    }
    return tiny_gpt.recipe(seed, say, **sizes)
