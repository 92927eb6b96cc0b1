"""ARC-Challenge: school science questions that word statistics answer wrongly, most with four
choices."""

from __future__ import annotations

from pathlib import Path

from stratoscope.lab.datasets import _olmo
from stratoscope.lab.datasets._data import Splits, held_out

SOURCE = _olmo.SOURCE
LICENCE = "CC-BY-SA-4.0 (Clark et al., 2018); the package: Apache-2.0"
SPLITS = (
    "test: the usual one. train and validation: 90 and 10 % of the usual validation set, by "
    "the hash of the question"
)


def load(folder: Path) -> Splits:
    """Lists of {"question", "choices": [str], "answer": index}."""
    rows = [_olmo.lettered(row) for row in _olmo.arrow(folder, "ai2_arc/ARC-Challenge/validation")]
    test = [
        _olmo.question(document)
        for document in _olmo.documents(folder, "arc_challenge/test_rc_5shot")
    ]
    return (*held_out(rows, key=lambda row: row["question"]), test)
