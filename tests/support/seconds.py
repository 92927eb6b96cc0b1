"""The CPU seconds of each test file, as `pytest --record-seconds` last wrote them down."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_suffix(".tsv")


def read() -> dict[str, float]:
    """Seconds by test file; {} when nothing was recorded."""
    lines = TABLE.read_text("utf-8").splitlines() if TABLE.is_file() else []
    return {file: float(spent) for spent, file in (line.split("\t") for line in lines)}


def write(table: dict[str, float]) -> None:
    """The dearest first."""
    rows = sorted(table.items(), key=lambda row: (-row[1], row[0]))
    TABLE.write_text("".join(f"{spent:.1f}\t{file}\n" for file, spent in rows), "utf-8")
