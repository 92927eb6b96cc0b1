"""The word sets that the Python package gensim carries for its own tests: one archive, fetched once
for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stratoscope.store.packages import Package
from stratoscope.store.source import Source

SOURCE = Source(
    packages=(
        Package(
            "pypi",
            "gensim",
            "4.4.0",
            "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
            27809988,
            python="3.11",
            platform="manylinux_2_28_x86_64",
        ),
    ),
    inside=tuple(
        f"gensim/test/test_data/{file}"
        for file in ("questions-words.txt", "wordsim353.tsv", "simlex999.txt")
    ),
    shared="gensim-words",
)


def rated(file: Path) -> list[dict[str, Any]]:
    """Two words and the mean rating of people, a line each: {"a", "b", "score"}."""
    rows = (
        line.split("\t")
        for line in file.read_text("utf-8").splitlines()
        if not line.startswith("#")
    )
    return [{"a": a, "b": b, "score": float(score)} for a, b, score in rows]
