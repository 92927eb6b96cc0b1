"""The user's cache: a folder in it is whole or it is not there.

`cached("models", "smollm2", ...)` returns the folder `models/smollm2` of the cache, and makes it
first if it must. Everything is built in a workshop beside the target and moved there in one step,
so an interruption leaves nothing half-made; a second process waits at the lock, and then finds the
folder done. Its `card.json` says what it was made of, and how many bytes each file has.

The cache is `$STRATOSCOPE_CACHE`, or `$XDG_CACHE_HOME/stratoscope`, or `~/.cache/stratoscope`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from stratoscope.errors import LoadError

Say = Callable[[str], object]

_CARD_FORMAT = 1  # raise it when a folder made by older code must be made again


def cache_root() -> Path:
    """The folder that holds everything stratoscope keeps for this user; it need not exist yet."""
    if chosen := os.environ.get("STRATOSCOPE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stratoscope"


def cached(
    kind: str,
    name: str,
    origin: str,
    card: Mapping[str, object],
    make: Callable[[Path, Path], None],
    say: Say,
) -> Path:
    """The cache folder `kind/name` if it was made of `origin` (a sha256); else `make(workshop,
    ready)` makes it.

    `card` is written into it as card.json, with the sizes of the files and the sha256 of the
    weights. `say` is called with a sentence when it is done. Raises `LoadError` when the cache
    cannot be written, and what `make` raises.
    """
    folder = cache_root() / kind / name
    if is_whole(folder, origin):
        return folder
    workshop, lock = (
        folder.with_name(f".{name}.making"),
        FileLock(folder.with_name(f".{name}.lock")),
    )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            if is_whole(folder, origin):
                return folder
            # left there by a process that was killed outright
            shutil.rmtree(workshop, ignore_errors=True)
            try:
                (workshop / "ready").mkdir(parents=True)
                make(workshop, workshop / "ready")
                _write_card(workshop / "ready", {**card, "origin_sha256": origin})
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(workshop / "ready", folder)
            finally:
                shutil.rmtree(workshop, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise LoadError(
            f"{name} should be kept in {folder}, but that could not be written: {error}. Make room "
            "there, or set STRATOSCOPE_CACHE to a folder you can write to."
        ) from error
    say(f"{name} is ready")
    return folder


def is_whole(folder: Path, origin: str) -> bool:
    """Whether `folder` was made of `origin` and no file has changed its size. Cheap: reads no
    weights."""
    try:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        sizes = {file: (folder / file).stat().st_size for file in card["bytes"]}
        return sizes == card["bytes"] and (card["origin_sha256"], card["format"]) == (
            origin,
            _CARD_FORMAT,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _write_card(folder: Path, card: Mapping[str, object]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    written: dict[str, object] = {
        **card,
        "format": _CARD_FORMAT,
        "made_by": f"stratoscope {importlib.metadata.version('stratoscope')}",
        "sha256": {path.name: sha256(path) for path in files if path.suffix == ".safetensors"},
        "bytes": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
    }
    (folder / "card.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
