"""Copying: random symbols, a bar, and the same symbols again.

    x1 x2 ... xn | x1 x2 ... xn         after the bar, every symbol is a target
    best:  the symbol n + 1 places before the target, with certainty

The bar is the last id.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stratoscope.lab.synthetic._stream import Stream, other


def stream(*, seed: int = 0, split: str = "train", symbols: int = 16, length: int = 16) -> Stream:
    """Rows of 2 * length + 1 ids; symbols may occur more than once."""

    def draw(generator: torch.Generator, n: int) -> Int[Tensor, "row position"]:
        first = torch.randint(symbols, (n, length), generator=generator)
        return torch.cat([first, torch.full((n, 1), symbols), first], dim=1)

    def best(ids: Int[Tensor, "row position"]) -> Float[Tensor, "row position vocab"]:
        """Before the bar, any symbol."""
        probabilities = torch.full((*ids.shape, symbols + 1), 1 / symbols)
        probabilities[..., symbols] = 0.0
        after = max(0, ids.shape[1] - length)
        copied = torch.nn.functional.one_hot(ids[:, :after], symbols + 1)
        probabilities[:, length : length + after] = copied.float()
        return probabilities

    def pair(ids: Tensor, generator: torch.Generator) -> tuple[list[int], list[int], int, int]:
        """Another symbol stands at the place that is to be copied next."""
        place = int(torch.randint(length, (1,), generator=generator))
        clean = ids[: length + 1 + place].tolist()
        answer = clean[place]
        foil = other(answer, range(symbols), generator)
        return clean, [*clean[:place], foil, *clean[place + 1 :]], answer, foil

    places = torch.arange(2 * length + 1)
    return Stream(
        "copying",
        seed,
        split,
        symbols + 1,
        2 * length + 1,
        places > length,
        1 / symbols,
        "Which symbol comes next in the copy. In the corrupt prompt another one stands at its "
        "place. Where a symbol occurs once, matching it is enough: positions need not be counted.",
        "the copy task (Graves et al. 2014, arXiv:1410.5401)",
        draw,
        best,
        pair,
    )
