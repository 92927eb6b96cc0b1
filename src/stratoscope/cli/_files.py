"""What commands read and write beside a model: rows of a file, a changed model, a place for a
result."""

from __future__ import annotations

import json
import math
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
    """Keep a result where it was asked for, and say so: .csv a table, .json, .svg and .html a
    picture, anything else netCDF."""
    if out is None:
        return
    from stratoscope import results
    from stratoscope.report import sheet, show

    if out.suffix in (".svg", ".html"):
        show.show(result).save(out)
    elif out.suffix == ".csv":
        sheet.write(_table(result).to_csv(index=False), out)
    elif out.suffix == ".json":
        sheet.write(json.dumps(_numbers(result.to_dict()), ensure_ascii=False), out)
    else:
        results.save(result, out)
    click.echo(f"Saved to {out}")


def _table(result: Any) -> Any:
    """A row for each place, a column for each axis and number."""
    import xarray as xr

    named = (
        result.to_dataset(name=result.name or "value")
        if isinstance(result, xr.DataArray)
        else result
    )
    return named.to_dataframe().reset_index()


def _numbers(data: Any) -> Any:
    """The same as strict JSON has it: no NaN, and text for what is none of its kinds."""
    if isinstance(data, dict):
        return {str(name): _numbers(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_numbers(value) for value in data]
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    return data if data is None or isinstance(data, (bool, int, str)) else str(data)


@contextmanager
def changed(lm: Any, edits: tuple[Path, ...]) -> Iterator[None]:
    """Inside, the saved edits are at work, in the order in which they were given."""
    from contextlib import ExitStack

    with ExitStack() as opened:
        for path in edits:
            opened.enter_context(_edit(lm, path))
        yield


def _edit(lm: Any, path: Path) -> Any:
    """A saved edit; one that runs dictionaries, steers or retrieves has a file of its own."""
    from stratoscope import catalogue
    from stratoscope.engine.edit import Edit

    kinds = {"features.splice": "Splice", "editing.steer": "Steer"}
    for method, name in (kinds | {"tokens.kv_retrieval": "Retrieval"}).items():
        with suppress(LoadError):
            return getattr(catalogue.module(method), name).load(lm, path)
    return Edit.load(lm, path)  # which says what is wrong with it


def _json(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, row {number} is no JSON ({error}).") from error
