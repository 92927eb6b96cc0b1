"""WordSim-353: pairs of words and how related people find them."""

from __future__ import annotations

from pathlib import Path

from stratoscope.lab.datasets import _gensim
from stratoscope.lab.datasets._data import Splits, cut

SOURCE = _gensim.SOURCE
LICENCE = "CC-BY-4.0 (Finkelstein et al., 2002); the package: LGPL-2.1"
SPLITS = (
    "80, 10, 10 % of the pairs, by the hash of the two words; for the usual rank correlation "
    "take `all`"
)


def load(folder: Path) -> Splits:
    """Lists of {"a", "b", "score": 0 to 10}."""
    return cut(_gensim.rated(folder / "wordsim353.tsv"), key=lambda row: f"{row['a']} {row['b']}")
