"""HellaSwag: 10,042 descriptions of everyday activities with four endings, one of them written by a
person."""

from __future__ import annotations

from pathlib import Path

from stratoscope.lab.datasets import _olmo
from stratoscope.lab.datasets._data import Splits, cut

SOURCE = _olmo.SOURCE
LICENCE = "MIT (Zellers et al., 2019); the package: Apache-2.0"
SPLITS = (
    "80, 10, 10 % of the validation set (the package has no other), by the hash of the clip "
    "it describes"
)


def load(folder: Path) -> Splits:
    """Lists of {"question": the beginning, "choices": [str] * 4, "answer": index, "activity"}."""
    rows = _olmo.arrow(folder, "hellaswag/none/validation")
    return tuple(
        [
            {
                "question": r["ctx"],
                "choices": r["endings"],
                "answer": int(r["label"]),
                "activity": r["activity_label"],
            }
            for r in part
        ]
        for part in cut(rows, key=lambda row: row["source_id"])
    )
