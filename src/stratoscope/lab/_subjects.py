"""What datasets, nets and miniatures have in common: a folder of files, one for each subject, and
what is told of one."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from stratoscope.errors import InputError
from stratoscope.store.source import Source


def card(name: str, module: ModuleType, **more: Any) -> dict[str, Any]:
    """What is known of a subject without fetching it: about, licence, packages, sha256, size in
    bytes."""
    source: Source = module.SOURCE
    return {
        "name": name,
        "about": about(module),
        "licence": module.LICENCE,
        "packages": [f"{package.registry}: {package.requirement}" for package in source.packages],
        "sha256": [package.sha256 for package in source.packages],
        "download_bytes": source.size,
        **({"shared": source.shared} if source.shared else {}),
        **more,
    }


def about(module: ModuleType) -> str:
    """The first paragraph of its docstring, on one line."""
    return " ".join((inspect.getdoc(module) or "").split("\n\n")[0].split())


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
