"""The file format of MNIST: a header of 16 (pictures) or 8 bytes (labels), then one byte a pixel or
label."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np


def arrays(raw: Path, ready: Path) -> None:
    """The four idx files of `raw`, gzipped or not, as x.npy and y.npy: the training examples, then
    the test ones."""
    x = np.concatenate([_bytes(raw, f"{part}-images-idx3-ubyte", 16) for part in ("train", "t10k")])
    y = np.concatenate([_bytes(raw, f"{part}-labels-idx1-ubyte", 8) for part in ("train", "t10k")])
    np.save(ready / "x.npy", x.reshape(-1, 28, 28))
    np.save(ready / "y.npy", y)


def _bytes(raw: Path, name: str, header: int) -> np.ndarray:
    packed = raw / f"{name}.gz"
    whole = gzip.decompress(packed.read_bytes()) if packed.is_file() else (raw / name).read_bytes()
    return np.frombuffer(whole, np.uint8)[header:]
