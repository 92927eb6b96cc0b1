"""`data` loads a dataset by name; its splits are fixed, so that a number measured on `test` means
the same for everyone.

Where the source has its own splits they are kept. Where it has one, `cut` deals its examples out:
80 % train, 10 % validation, 10 % test. An example's split depends on its own words alone, never on
its neighbours or on a random state: it is the same in every release, and two copies of one text can
not end on both sides.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stratoscope.lab import _subjects
from stratoscope.store import source
from stratoscope.store.cache import Say

Splits = Sequence[Any]  # train, validation, test


@dataclass(frozen=True)
class Data:
    """A dataset: three splits of one type (list of str or dict, `Pictures`, `Vectors`), and its
    card."""

    name: str
    train: Any
    validation: Any
    test: Any
    card: Mapping[str, Any]

    @cached_property
    def all(self) -> list[Any]:
        """Every example of the three splits, for a dataset that comes as lists."""
        return [*self.train, *self.validation, *self.test]


@dataclass(frozen=True)
class Pictures:
    """Pictures and their classes: x uint8 (example, row, column) or (..., 3) for red, green, blue;
    y int64 (example,)."""

    x: np.ndarray
    y: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> Pictures:
        """Some of them: a slice, indices or a mask."""
        return Pictures(self.x[rows], self.y[rows], self.names)


@dataclass(frozen=True)
class Vectors:
    """Words and their vectors: x float32 (word, dim), most frequent first; `vectors["king"]` is one
    row."""

    words: list[str]
    x: np.ndarray

    @cached_property
    def row(self) -> dict[str, int]:
        """Where each word is."""
        return {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self.row

    def __getitem__(self, word: str) -> np.ndarray:
        return self.x[self.row[word]]


def data(
    name: str, *, path: str | os.PathLike[str] | None = None, progress: Say | None = None
) -> Data:
    """The dataset `name`, fetched now if it is not in the cache.

    path: its archive, or a folder that holds it, instead of the registry. progress is called with a
    sentence at each slow step. Raises InputError for an unknown name (the nearest are offered);
    LoadError when the archive can not be had or is not the one we trust, or the cache can not be
    written.
    """
    module = _module(name)
    train, validation, test = module.load(fetch(name, path=path, progress=progress))
    sizes = {"train": len(train), "validation": len(validation), "test": len(test)}
    return Data(name, train, validation, test, {**card(name), "examples": sizes})


def fetch(
    name: str, *, path: str | os.PathLike[str] | None = None, progress: Say | None = None
) -> Path:
    """The folder of the dataset `name` in the cache, made now if it is absent; nothing is loaded
    from it."""
    module = _module(name)
    given = {"licence": module.LICENCE, "path": path, "progress": progress}
    prepare = getattr(module, "prepare", None)  # without one the files are read as they came
    return source.fetch("data", name, module.SOURCE, prepare=prepare, **given)


def card(name: str) -> dict[str, Any]:
    """What is known of a dataset without fetching it; `folder` is None while it is not in the
    cache."""
    module = _module(name)
    folder = source.place("data", name, module.SOURCE)
    return _subjects.card(name, module, splits=module.SPLITS, folder=folder and str(folder))


def names() -> list[str]:
    """Every dataset there is."""
    from stratoscope.lab import datasets

    return _subjects.names(datasets)


def cut(
    examples: Iterable[Any], key: Callable[[Any], str] = str
) -> tuple[list[Any], list[Any], list[Any]]:
    """Deal examples out to train, validation and test (80, 10, 10 %) by the sha256 of
    `key(example)`, in their order.

    Examples of one key stay together: a key such as the title of a page keeps its questions on one
    side.
    """
    splits: tuple[list[Any], list[Any], list[Any]] = [], [], []
    for example in examples:
        splits[max(0, _tenth(key(example)) - 7)].append(example)
    return splits


def held_out(
    examples: Iterable[Any], key: Callable[[Any], str] = str
) -> tuple[list[Any], list[Any]]:
    """The same for a source with a test set of its own: 90 % train, 10 % validation."""
    splits: tuple[list[Any], list[Any]] = [], []
    for example in examples:
        splits[_tenth(key(example)) == 9].append(example)
    return splits


def _tenth(text: str) -> int:
    """A number from 0 to 9 that only `text` decides."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) * 10 >> 32


def _module(name: str) -> Any:
    from stratoscope.lab import datasets

    return _subjects.find(datasets, name, "dataset")


def pictures(folder: Path, names: Sequence[str], sizes: Sequence[int]) -> Splits:
    """The splits of `folder`'s x.npy and y.npy, in their order: as many as `sizes` says for train,
    validation, test."""
    x, y = np.load(folder / "x.npy"), np.load(folder / "y.npy")
    ends = np.cumsum(sizes)
    whole = Pictures(x, y.astype(np.int64), tuple(names))
    return tuple(whole[end - size : end] for end, size in zip(ends, sizes))
