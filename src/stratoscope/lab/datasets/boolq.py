"""BoolQ: 3,270 questions that a passage of Wikipedia answers with yes or no."""

from __future__ import annotations

from pathlib import Path

from stratoscope.lab.datasets import _olmo
from stratoscope.lab.datasets._data import Splits, cut

SOURCE = _olmo.SOURCE
LICENCE = "CC-BY-SA-3.0 (Clark et al., 2019); the package: Apache-2.0"
SPLITS = "80, 10, 10 % of the validation set (the package has no other), by the hash of the passage"


def load(folder: Path) -> Splits:
    """Lists of {"question", "passage", "answer": bool}."""
    return cut(_olmo.arrow(folder, "boolq/none/validation"), key=lambda row: row["passage"])
