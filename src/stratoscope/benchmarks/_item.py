"""A question with several choices, and what share of them is answered right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stratoscope.errors import InputError


@dataclass(frozen=True)
class Item:
    """context: what is read before a choice; "" where the choices are whole texts. choices: at
    least two different ones; a space stands between context and choice. gold: which one is right.
    group: what belongs together (a subject, a template), for intervals and tables. id: its name."""

    context: str
    choices: tuple[str, ...]
    gold: int
    group: str = ""
    id: str = ""

    def __post_init__(self) -> None:
        what = f"item {self.id!r}" if self.id else "an item"
        if len(self.choices) < 2 or len(set(self.choices)) < len(self.choices):
            raise InputError(
                f"{what} has the choices {list(self.choices)!r:.120}: at least two, all different."
            )
        if not all(self.choices):
            raise InputError(f"{what} has an empty choice, which nothing can be said of.")
        if not 0 <= self.gold < len(self.choices):
            raise InputError(
                f"{what} has gold {self.gold}, and choices 0 to {len(self.choices) - 1}."
            )


def checked(inputs: Any) -> list[Item]:
    """A list of items. Raises InputError for what is none, and for two of one name."""
    items = list(inputs) if isinstance(inputs, Sequence) and not isinstance(inputs, str) else []
    if not items or not all(isinstance(item, Item) for item in items):
        raise InputError(
            f"a list of benchmark items is needed, got {type(inputs).__name__} {inputs!r:.60}: "
            "read them with benchmarks.formats.read(path), or make Item(context, choices, gold)."
        )
    names = [item.id for item in items if item.id]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"two items are called {twice!r}: give each its own id.")
    return items


def right(scores: np.ndarray, items: Sequence[Item]) -> np.ndarray:
    """(item,): 1 where the gold choice alone has the highest of scores (item, choice), 0 where
    another is higher; of several that are equally high, an equal share. NaN stands where an item
    has no such choice."""
    shares = np.zeros(len(items))
    for number, item in enumerate(items):
        row = scores[number, : len(item.choices)]
        best = row == row.max()
        shares[number] = best[item.gold] / best.sum()
    return shares
