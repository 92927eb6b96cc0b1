"""What commands read and write beside a model: rows of a file, a changed model, a place for a
result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from stratoscope.errors import InputError, LoadError, ResultError


def rows(path: Path) -> list[Any]:
    """A text on each line of a .txt; a text or object on each line of a .jsonl. Raises InputError
    for another kind, a line that is no JSON, and a file without rows."""
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(f"{path}: give a .txt (a text on each line) or a .jsonl (JSON lines).")
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(f"{path} holds no row.")
    return [line if path.suffix == ".txt" else _json(path, n, line) for n, line in rows]


def value(text: str) -> Any:
    """JSON, or the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def refuse_no_folder(path: Path | None) -> None:
    """Raise ResultError where `path` could not be written after long work."""
    if path is not None and not path.absolute().parent.is_dir():
        raise ResultError(
            f"The folder of {path} does not exist. Create it, or give another path to --out."
        )


def save(result: Any, out: Path | None) -> None:
    """Keep a result where it was asked for, and say so."""
    if out is not None:
        from stratoscope import results

        results.save(result, out)
        click.echo(f"Saved to {out}")


@contextmanager
def changed(lm: Any, edits: tuple[Path, ...]) -> Iterator[None]:
    """Inside, the saved edits are at work, in the order in which they were given."""
    from contextlib import ExitStack

    with ExitStack() as opened:
        for path in edits:
            opened.enter_context(_edit(lm, path))
        yield


def _edit(lm: Any, path: Path) -> Any:
    """A saved edit; one that runs dictionaries or steers has a file of its own kind."""
    from stratoscope import catalogue
    from stratoscope.engine.edit import Edit

    for method, name in (("features.splice", "Splice"), ("editing.steer", "Steer")):
        with suppress(LoadError):
            return getattr(catalogue.module(method), name).load(lm, path)
    return Edit.load(lm, path)  # which says what is wrong with it


def _json(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, row {number} is no JSON ({error}).") from error
