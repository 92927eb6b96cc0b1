"""Rows of a JSON file, one by one, with errors that say which row and which field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stratoscope.errors import InputError


class Row:
    """One row of a file: `row.text("question")` is that field, or an error that says where."""

    def __init__(self, path: Path, number: int, fields: Mapping[str, Any]) -> None:
        self.path, self.number, self.fields = path, number, fields

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def wrong(self, name: str, needed: str) -> InputError:
        value = repr(self.fields[name]) if name in self.fields else "absent"
        return InputError(
            f"{self.path}, row {self.number}: `{name}` must be {needed}, and is {value:.80}."
        )

    def text(self, name: str) -> str:
        if not isinstance(value := self.fields.get(name), str):
            raise self.wrong(name, "a text")
        return value

    def texts(self, name: str) -> list[str]:
        value = self.fields.get(name)
        if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
            raise self.wrong(name, "a list of texts")
        return value

    def number_in(self, name: str, below: int) -> int:
        """A whole number from 0, or a text of one (as HellaSwag has it)."""
        value = self.fields.get(name)
        value = int(value) if isinstance(value, str) and value.isdigit() else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
            raise self.wrong(name, f"a number from 0 to {below - 1}")
        return value

    def inner(self, name: str) -> Row:
        if not isinstance(value := self.fields.get(name), dict):
            raise self.wrong(name, "an object")
        return Row(self.path, self.number, value)


def rows(path: Path) -> Iterator[Row]:
    """The objects of a JSON Lines file, counted from 1 as lines are. Raises InputError for a file
    that is not there, and for a line that is no object."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{path}, row {number} is no JSON ({error}): one object on each line."
            ) from error
        if not isinstance(fields, dict):
            raise InputError(f"{path}, row {number} is {line!r:.60}: one object on each line.")
        yield Row(path, number, fields)


def write(path: Path, objects: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in objects), "utf-8")
