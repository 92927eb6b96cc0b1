"""The folder that the workbench was given: its saved results, reports and atlas, and nothing beside
it."""

from __future__ import annotations

from pathlib import Path

from stratoscope.errors import InputError

KINDS = (".nc", ".html")
MOST = 500  # files that are listed
DEPTH = 3  # folders below


def listed(folder: Path) -> list[str]:
    """Results (.nc) and pages (.html) in the folder and below, newest first, as relative paths."""
    found = []
    for depth in range(DEPTH + 1):
        for path in folder.glob("/".join(["*"] * depth + ["*.*"])):
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if path.suffix in KINDS and not hidden and path.is_file() and _inside(folder, path):
                found.append((path.stat().st_mtime, path.relative_to(folder).as_posix()))
    return [name for _, name in sorted(found, reverse=True)[:MOST]]


def inside(folder: Path, name: str) -> Path:
    """The file of that name. Raises InputError for one that is not there, of another kind, or
    outside the folder, by whatever way (.., an absolute path, a link)."""
    path = folder / name if "\0" not in name else folder
    if path.suffix not in KINDS or not _inside(folder, path) or not path.is_file():
        raise InputError(f"{name!r:.80} is no result (.nc) or page (.html) of this folder.")
    return path


def _inside(folder: Path, path: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
