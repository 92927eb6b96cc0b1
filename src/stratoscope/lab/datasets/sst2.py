"""SST-2: 872 sentences of film reviews, positive (label 1) or negative (label 0)."""

from __future__ import annotations

from pathlib import Path

from stratoscope.lab.datasets import _olmo
from stratoscope.lab.datasets._data import Splits, cut

SOURCE = _olmo.SOURCE
LICENCE = "none stated (Socher et al., 2013; GLUE); the package: Apache-2.0"
SPLITS = (
    "80, 10, 10 % of the validation set (the package has no other), by the hash of the sentence"
)


def load(folder: Path) -> Splits:
    """Lists of {"text": str, "label": 0 or 1}."""
    rows = _olmo.arrow(folder, "glue/sst2/validation")
    return cut(
        [{"text": row["sentence"].strip(), "label": row["label"]} for row in rows],
        key=lambda row: row["text"],
    )
