"""What methods there are: found by reading the text of the rooms, so listing them imports nothing.

A method is a module of a method room that defines `measure`, `fit`, `edit` or `build` at its top
level. Adding a file adds a method; there is no list to edit.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from stratoscope.errors import MethodError

if TYPE_CHECKING:
    import xarray as xr

ROOT = Path(__file__).parent
OTHER_ROOMS = {
    "store",
    "models",
    "engine",
    "results",
    "maths",
    "lab",
    "claims",
    "papers",
    "plots",
    "report",
    "cli",
    "workbench",
}

_QUOTED = re.compile(r'''[rR]?("""|\'{3})(?:\\.|[^\\])*?\1''', re.DOTALL)
_BEFORE_IT = re.compile(r"(?:\s|#[^\n]*\n)*")  # a docstring comes first, but for comments
_VERB = re.compile(r"^def (measure|fit|edit|build)\(", re.MULTILINE)
_PAPER = re.compile(r"^\s*Paper:\s*([\w-]+)", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """One method, as its file describes it; `paper` is the key in the docstring's `Paper:` line, or
    ""."""

    room: str
    name: str
    verbs: tuple[str, ...]
    summary: str
    paper: str
    path: Path

    @property
    def address(self) -> str:
        """The name a person uses: `layers.logit_lens`."""
        return f"{self.room}.{self.name}"


def methods(root: Path | None = None) -> list[Entry]:
    """Return every method under `root` (default: this package), ordered by room and name."""
    return list(_scan(ROOT if root is None else root))


def find(address: str, root: Path | None = None) -> Entry:
    """Return the method `ROOM.METHOD`. Raises MethodError, with the nearest names, if there is
    none."""
    known = {entry.address: entry for entry in methods(root)}
    if address in known:
        return known[address]
    bare = address.rpartition(".")[2]
    near = [name for name in known if name.endswith(f".{bare}")] or get_close_matches(
        address, known, 3
    )
    hint = f"Nearest: {', '.join(near)}." if near else "`stratoscope methods` lists them all."
    raise MethodError(f"There is no method {address!r} among {len(known)}. {hint}")


def module(address: str) -> ModuleType:
    """Import the method `ROOM.METHOD` and return its module. Raises MethodError as `find` does."""
    return import_module(f"stratoscope.{find(address).address}")


def docstring(text: str) -> str:
    """Return the module docstring of Python source `text` without running it, or "" if there is
    none."""
    start = _BEFORE_IT.match(text)
    literal = _QUOTED.match(text, start.end() if start else 0)
    return ast.literal_eval(literal[0]).strip() if literal else ""


def summary(text: str) -> str:
    """Return the first paragraph of the module docstring of `text`, on one line."""
    return " ".join(docstring(text).partition("\n\n")[0].split())


def _scan(root: Path) -> Iterator[Entry]:
    # architectures alone have shelves: `architectures.vision.metaformer`
    for path in sorted([*root.glob("*/[!_]*.py"), *root.glob("architectures/*/[!_]*.py")]):
        room, *shelf = path.parent.relative_to(root).parts
        if room in OTHER_ROOMS or not (path.parent / "__init__.py").is_file():
            continue
        text = path.read_text(encoding="utf-8")
        # Quoted text goes first, so that a docstring which shows `def measure(` at a margin is not
        # one.
        defined = set(_VERB.findall(_QUOTED.sub("", text)))
        if defined:
            verbs = tuple(verb for verb in ("measure", "fit", "edit", "build") if verb in defined)
            paper = _PAPER.search(docstring(text))
            name = ".".join((*shelf, path.stem))
            yield Entry(room, name, verbs, summary(text), paper[1] if paper else "", path)


# What a module with each verb looks like to a type checker; a module satisfies as many as it has
# verbs.


class Measure(Protocol):
    """`measure(lm, inputs, *, ...)` gives a labelled result and leaves the model as it was."""

    @property
    def measure(self) -> Callable[..., xr.DataArray | xr.Dataset]: ...


class Fit(Protocol):
    """`fit(lm, inputs, *, ...)` gives a fitted value that can be saved and loaded."""

    @property
    def fit(self) -> Callable[..., Any]: ...


class EditMethod(Protocol):
    """`edit(lm, request, *, ...)` gives an edit: outputs change inside `with`, and not a bit
    afterwards."""

    @property
    def edit(self) -> Callable[..., Any]: ...


class Build(Protocol):
    """`build(config, *, ...)` gives a `torch.nn.Module`."""

    @property
    def build(self) -> Callable[..., Any]: ...
