"""SQuAD: 1,000 questions on paragraphs of Wikipedia, each answered by a span of its paragraph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stratoscope.lab.datasets import _olmo
from stratoscope.lab.datasets._data import Splits, cut

SOURCE = _olmo.SOURCE
LICENCE = "CC-BY-SA-4.0 (Rajpurkar et al., 2016); the package: Apache-2.0"
SPLITS = (
    "80, 10, 10 % of 1,000 questions of the validation set (the package has no more), by the "
    "hash of the title"
)


def load(folder: Path) -> Splits:
    """Lists of {"title", "context", "question", "answers": [str]}; the pages of one title are on
    one side."""
    return cut(map(_row, _olmo.documents(folder, "squad/bpb_5shot")), key=lambda row: row["title"])


def _row(document: dict[str, Any]) -> dict[str, Any]:
    context, _, question = (
        document["query"].partition("\nBackground: ")[2].rpartition("\nQuestion: ")
    )
    question = question.removesuffix("\nAnswer:")
    title, answers = (
        document["title"].replace("_", " "),
        list(dict.fromkeys(document["answers_text"])),
    )
    return {"title": title, "context": context, "question": question, "answers": answers}
