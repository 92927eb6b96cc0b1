"""Lists of nouns that a story reads twice, and how much of a list is recalled at the second time:
what the files across papers measure of verbatim-memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stratoscope.models import LM
from stratoscope.tokens import verbatim_recall

NOUNS = """apple bell candle desk engine feather garden hammer island jacket kettle ladder market
orange pencil quilt ribbon saddle table umbrella violin wagon yard zebra blanket castle
drum""".split()
OPENING = "Anna read a list of words to the class:"
PAUSE = " Then the bell rang and everybody went home. The next morning she read the list again:"


def lists(count: int, seed: int, length: int = 10) -> list[str]:
    """Lists of different nouns, as text."""
    generator = np.random.default_rng(seed)
    return [f" {', '.join(generator.choice(NOUNS, length, replace=False))}." for _ in range(count)]


def recall(lm: LM, texts: Sequence[str], seed: int) -> np.ndarray:
    """1 less the median surprisal of the second reading over that of the same nouns read first,
    each list's first token left out: 1 recalls all, 0 nothing; (list,)."""
    found = verbatim_recall.measure(
        lm, list(texts), opening=OPENING, between=PAUSE, words=True, skip=1, seed=seed
    )
    return 1 - found.repeat.values
