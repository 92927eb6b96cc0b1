"""What `fit` says of a sparse dictionary: how faithful it is to texts that it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stratoscope.cli import _files

EVERY, MOST, CONTEXT = 20, 32, 64  # one row in so many; so many windows of so many tokens


def apart(rows: list[Any], held_out: Path | None) -> tuple[list[Any], list[Any]]:
    """What is fitted to, and what is judged by: the rows of a file, else every twentieth of these
    rows; of fewer than twenty none."""
    if held_out is not None:
        return rows, _files.rows(held_out)
    kept = [row for number, row in enumerate(rows) if (number + 1) % EVERY]
    return kept, rows[EVERY - 1 :: EVERY]


def faithful(lm: Any, dictionary: Any, rows: list[Any]) -> str:
    """Fidelity on the first windows of the rows, as a line to print."""
    from stratoscope import catalogue
    from stratoscope.engine.harvest import begins
    from stratoscope.models.inputs import rows_of

    bos, room = begins(lm), min(CONTEXT, lm.context or CONTEXT)
    ids = [row[len(bos) :] if bos and row[: len(bos)] == bos else row
           for row in rows_of(rows, lm.tokenizer)]  # fmt: skip
    room -= len(bos)
    windows = [row[at : at + room] for row in ids for at in range(0, len(row), room)]
    windows = [[*bos, *row] for row in windows if len(row) > 1][:MOST]
    if not windows:
        return "The held-out texts have no two tokens together: nothing to judge by."
    fidelity = catalogue.module("features.fidelity")
    found = fidelity.measure(lm, windows, dictionary=dictionary)
    tokens = int(found.predictions.sum())
    return (
        f"On {tokens:,} held-out tokens: {float(found.l0.mean()):.1f} features a token, "
        f"{float(found.fvu.mean()):.3f} of the variance unexplained, "
        f"{float(found.increase):+.3f} nats a token; of the loss recovered "
        f"{float(found.recovered_mean):.3f} against the mean, "
        f"{float(found.recovered_zero):.3f} against zero; "
        f"{float(found.dead):.1%} of the features silent there"
    )
