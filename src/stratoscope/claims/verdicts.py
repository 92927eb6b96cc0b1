"""The files that remember: `papers/verdicts/KEY.jsonl`, one verdict a line, only ever appended to.

A line is written at once, under a lock, and forced to the disk, so that two claims at the same time
cannot mix. Where the package's folder cannot be written to, verdicts go to the user's cache; both
are read. One file for each paper, so that two people who measure two papers change no file of each
other's.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stratoscope.claims import paper
from stratoscope.claims.verdict import Verdict, rejudged
from stratoscope.errors import ClaimError
from stratoscope.store.cache import cache_root

_NUMBERS = ("values", "null")
_ROWS = ("draws", "units")


def places() -> list[Path]:
    """The folders of verdicts: beside the papers, and in the user's cache."""
    return [home(), cache_root() / "verdicts"]


def home() -> Path:
    """The folder of this package's own verdicts."""
    return paper.FOLDER / "verdicts"


def append(verdict: Verdict, folders: Sequence[Path] | None = None) -> Path:
    """Add one line to the paper's file in the first folder that can be written to, and return that
    file.

    Raises ClaimError when none can.
    """
    line = (to_line(verdict) + "\n").encode()
    refused = []
    for folder in places() if folders is None else folders:
        file = folder / f"{verdict.key}.jsonl"
        try:
            add(file, line)
        except OSError as error:
            refused.append(f"{file}: {error.strerror or error}")
        else:
            return file
    raise ClaimError(
        f"The verdict of {verdict.key} could not be kept ({'; '.join(refused)}). Make room, or set "
        "STRATOSCOPE_CACHE "
        f"to a folder you can write to, and run it again. It was: {verdict.status}, "
        f"{dict(verdict.values)}."
    )


def append_to(verdict: Verdict, file: Path) -> Path:
    """Add one line to a file of the reader's own. Raises ClaimError when it cannot be written."""
    try:
        add(file, (to_line(verdict) + "\n").encode())
    except OSError as error:
        raise ClaimError(
            f"The verdict could not be kept in {file} ({error.strerror or error}); give --out a "
            f"file you can write. It was: {verdict.status}, {dict(verdict.values)}."
        ) from error
    return file


def read(folders: Sequence[Path]) -> tuple[list[Verdict], list[str]]:
    """All verdicts, a paper's in order, and a sentence for each line that is none: nothing is
    dropped in silence."""
    verdicts: list[Verdict] = []
    problems: list[str] = []
    for file in (file for folder in folders for file in sorted(folder.glob("*.jsonl"))):
        try:
            text = file.read_bytes().decode("utf-8", errors="replace")
        except OSError as error:
            problems.append(f"{file} cannot be read: {error.strerror or error}.")
            continue
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                verdict = from_line(line)
                _believe(verdict)
                verdicts.append(verdict)
            except (ValueError, TypeError, KeyError, AttributeError, ClaimError) as error:
                torn = number == text.count("\n") + 1  # a whole line ends with a newline
                what = "is cut short: its writing was interrupted" if torn else "is no verdict"
                problems.append(
                    f"Line {number} of {file} {what} ({error}). Remove that line; the others count."
                )
    return verdicts, problems


def to_line(verdict: Verdict) -> str:
    """One verdict as strict JSON on one line; NaN and infinities as text."""
    data = {field.name: getattr(verdict, field.name) for field in dataclasses.fields(verdict)}
    data |= {name: {key: _out(value) for key, value in data[name].items()} for name in _NUMBERS}
    data["interval"] = {
        key: [_out(low), _out(high)] for key, (low, high) in verdict.interval.items()
    }
    data |= {name: {k: [_out(x) for x in row] for k, row in data[name].items()} for name in _ROWS}
    data["units"] = {name: [*map(_briefly, row)] for name, row in data["units"].items()}
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def from_line(line: str) -> Verdict:
    """The verdict of one line. Raises ValueError, TypeError, KeyError or ClaimError for anything
    else."""
    data = json.loads(line)
    data |= {name: {key: float(value) for key, value in data[name].items()} for name in _NUMBERS}
    data["interval"] = {
        key: (float(low), float(high)) for key, (low, high) in data["interval"].items()
    }
    data |= {
        name: {key: tuple(map(float, row)) for key, row in data.get(name, {}).items()}
        for name in _ROWS
    }
    return Verdict(**data)


def _believe(verdict: Verdict) -> None:
    """Raises ClaimError when the word that stands there is not the one its numbers give."""
    judged = rejudged(verdict)
    if judged.status != verdict.status or (verdict.form > 1 and judged.added != verdict.added):
        raise ClaimError(
            f"it says {verdict.status!r} of {verdict.claim}, and its numbers give {judged.status!r}"
        )


def add(file: Path, line: bytes) -> None:
    """Add one whole line to a file, under a lock, and force it to the disk. Raises OSError."""
    from filelock import FileLock

    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(handle).st_size
            # A line that was cut short before stays alone: ours starts on a line of its own.
            whole = not size or _last_byte(handle, size) == b"\n"
            data = line if whole else b"\n" + line
            if os.write(handle, data) != len(data):
                os.ftruncate(handle, size)
                raise OSError("the disk is full")
            os.fsync(handle)
        finally:
            os.close(handle)


def _last_byte(handle: int, size: int) -> bytes:
    os.lseek(handle, size - 1, os.SEEK_SET)
    return os.read(handle, 1)


def _briefly(number: float | str) -> float | int | str:
    """A unit's number, of which no word is judged: six digits are enough to draw and to compare."""
    if isinstance(number, str):
        return number
    return int(number) if number == int(number) else float(f"{number:.6g}")


def _out(value: Any) -> float | str:
    return float(value) if math.isfinite(value) else str(float(value))
