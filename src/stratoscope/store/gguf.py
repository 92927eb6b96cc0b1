"""GGUF files, decoded once to the float32 safetensors of an ordinary Hugging Face folder."""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stratoscope.errors import LoadError
from stratoscope.store.cache import Say, cached, sha256
from stratoscope.store.hub import quiet


def folder(gguf: Path, say: Say) -> Path:
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
        convert(gguf, ready)

    card = {"source": gguf.name, "precision": "GGUF decoded to float32"}
    return cached("models", f"gguf-{digest[:16]}", digest, card, make, say)


def joined(parts: Sequence[Path]) -> Path:
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


def convert(gguf: Path, folder: Path) -> None:
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
