"""Fashion-MNIST: 70,000 pictures of clothes from a shop's catalogue, 28 x 28 grey pixels."""

from __future__ import annotations

from pathlib import Path

from stratoscope.lab.datasets._data import Splits, pictures
from stratoscope.lab.datasets._idx import arrays
from stratoscope.store.packages import Package
from stratoscope.store.source import Source

SOURCE = Source(
    packages=(
        Package(
            "debian",
            "dataset-fashion-mnist",
            "0.0~git20200523.55506a9-1",
            "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
            30900652,
        ),
    ),
    inside=("usr/share/datasets/fashion-mnist/*.gz",),
)
LICENCE = "MIT (Zalando SE)"
SPLITS = (
    "the usual 60,000 for training, of which the last 10,000 are validation; the usual "
    "10,000 "
    "for test"
)

NAMES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


prepare = arrays


def load(folder: Path) -> Splits:
    """`Pictures`, x uint8 (example, 28, 28)."""
    return pictures(folder, NAMES, (50_000, 10_000, 10_000))
