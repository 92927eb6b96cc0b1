"""SimLex-999: pairs of words and how similar people find them; being related does not count."""

from __future__ import annotations

from pathlib import Path

from stratoscope.lab.datasets import _gensim
from stratoscope.lab.datasets._data import Splits, cut

SOURCE = _gensim.SOURCE
LICENCE = "none stated (Hill, Reichart and Korhonen, 2015); the package: LGPL-2.1"
SPLITS = (
    "80, 10, 10 % of the pairs, by the hash of the two words; for the usual rank correlation "
    "take `all`"
)


def load(folder: Path) -> Splits:
    """Lists of {"a", "b", "score": 0 to 10}."""
    return cut(_gensim.rated(folder / "simlex999.txt"), key=lambda row: f"{row['a']} {row['b']}")
