"""What several commands take alike: options, the verb of a method, and a hint at what was meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from stratoscope import catalogue
from stratoscope.errors import MethodError

model = click.option(
    "--model", required=True, help="Hugging Face name, or folder or file of weights."
)

device = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, mps; auto: a CUDA GPU where there is one, else the CPU.",
)


dtype = click.option(
    "--dtype", default="float32", show_default=True, help="float32, bfloat16 or float16."
)


def models(more: str = "") -> Callable[..., Any]:
    """--model NAME, any number of them, as `models`; smollm2 where none is given."""
    return click.option(
        "--model",
        "models",
        multiple=True,
        default=("smollm2",),
        show_default=True,
        help=f"A name, a Hugging Face id or a local folder; repeatable{more}.",
    )


def folder(what: str) -> Callable[..., Any]:
    """--folder DIR that is there, as `folder`; default the current one."""
    return click.option(
        "--folder",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        default=".",
        show_default="this one",
        help=what,
    )


def pairs(what: str = "An option of the method") -> Callable[..., Any]:
    """--set KEY=VALUE, any number of them, as `pairs`."""
    help_text = f"{what}, as JSON or text."
    return click.option("--set", "pairs", multiple=True, metavar="KEY=VALUE", help=help_text)


def edits(verb: str) -> Callable[..., Any]:
    """--edit FILE, any number of them, as `edits`. verb: what is done with the model, `Measure`."""
    return click.option(
        "--edit",
        "edits",
        multiple=True,
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        help=f"{verb} the model as this saved edit makes it (see `stratoscope edit`).",
    )


def split(pairs: Iterable[str], hint: str = "") -> dict[str, str]:
    """The texts of KEY=VALUE by their keys. Raises MethodError for a text without a sign."""
    texts: dict[str, str] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise MethodError(f"--set takes KEY=VALUE, and got {pair!r}.{hint}")
        texts[key] = text
    return texts


def function(method: str, verb: str) -> Callable[..., Any]:
    """The method's function of this name. Raises MethodError where there is no such method, and
    where it has other verbs."""
    entry = catalogue.find(method)
    if verb not in entry.verbs:
        raise MethodError(f"{method} does not {verb}: it can only {' and '.join(entry.verbs)}.")
    return getattr(catalogue.module(method), verb)


def meant(word: str, known: Iterable[str], otherwise: str = "", *, most: int = 3) -> str:
    """A question with the known words that are near to this one; without any, `otherwise`."""
    near = get_close_matches(word, list(known), most)
    return f"Did you mean {' or '.join(near)}?" if near else otherwise
