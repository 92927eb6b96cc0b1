"""The Hugging Face hub and its library: kept quiet, and what to say when they do not answer."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from pathlib import Path

from stratoscope.errors import LoadError
from stratoscope.store.named import NAMED


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


def refuse_misspelt(name: str) -> None:
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


def explain_failure(name: str, error: BaseException) -> LoadError:
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
