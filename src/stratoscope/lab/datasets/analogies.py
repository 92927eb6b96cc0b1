"""Google's analogies: 19,544 questions of the kind Athens is to Greece as Baghdad is to Iraq, in 14
sections."""

from __future__ import annotations

from pathlib import Path

from stratoscope.lab.datasets import _gensim
from stratoscope.lab.datasets._data import Splits, cut

SOURCE = _gensim.SOURCE
LICENCE = "Apache-2.0 (Mikolov et al., 2013); the package: LGPL-2.1"
SPLITS = (
    "80, 10, 10 % of the questions, by the hash of the four words; a pair occurs in "
    "questions "
    "of all three"
)


def load(folder: Path) -> Splits:
    """Lists of {"a", "b", "c", "d", "section"}: a is to b as c is to d."""
    rows, section = [], ""
    for line in (folder / "questions-words.txt").read_text("utf-8").splitlines():
        if line.startswith(":"):
            section = line[1:].strip()
        elif line.strip():
            rows.append(dict(zip("abcd", line.split())) | {"section": section})
    return cut(rows, key=lambda row: " ".join(row[word] for word in "abcd"))
