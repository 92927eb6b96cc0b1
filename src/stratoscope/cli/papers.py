"""List the papers of the ledger, level by level, with what became of each; then the files of ours
that run several papers together, and what nobody has written down yet of those that are built.

Papers are counted by their word on real models; `stratoscope paper KEY` tells more of one.
"""

from __future__ import annotations

from difflib import get_close_matches
from itertools import groupby
from typing import TYPE_CHECKING

import click

from stratoscope.claims.words import RULE, WORST_FIRST
from stratoscope.cli import _claims
from stratoscope.errors import ClaimError

if TYPE_CHECKING:
    from stratoscope.claims.ledger import Entry


@click.command(help=f"{__doc__}\n{RULE}")
@click.option("--level", help="Only this level, such as token, neuron or layer.")
@click.option("--status", help="Only this status, such as 'reproduced' or 'not built'.")
@click.option(
    "--stale", is_flag=True, help="Only those whose verdicts are stale, and what has changed since."
)
def command(level: str | None, status: str | None, stale: bool) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from stratoscope.claims import ledger

    levels = [*ledger.levels(), ledger.ACROSS]
    _known("level", level, levels)
    _known("status", status, ledger.STATUSES)
    atlas = ledger.atlas()
    chosen = [
        e
        for e in (*atlas.entries.values(), *atlas.across.values())
        if level in (None, e.row.level) and status in (None, e.status)
    ]
    if stale:
        _say_stale([entry for entry in chosen if entry.stale()])
        return
    chosen.sort(
        key=lambda e: (
            levels.index(e.row.level),
            ledger.STATUSES.index(e.status),
            e.row.key,
        )
    )
    console = _claims.console()
    mechanisms = {e.row.key: e.words.mechanism for e in chosen if e.paper}
    for name, group in groupby(chosen, key=lambda e: e.row.level):
        table = Table(
            box=box.SIMPLE_HEAD, title=name, title_justify="left", title_style="bold", expand=True
        )
        table.add_column("paper", no_wrap=True, width=max(len(e.row.key) for e in chosen))
        table.add_column("status", no_wrap=True, width=max(map(len, ledger.STATUSES)))
        if any(mechanisms.values()):
            table.add_column("miniatures", no_wrap=True, width=max(map(len, WORST_FIRST)))
        table.add_column("title", no_wrap=True, overflow="ellipsis", ratio=1)
        for entry in group:
            word = Text(entry.status, style=_claims.STYLES.get(entry.status, ""))
            small = mechanisms.get(entry.row.key, "")
            shown = [Text(small, style=_claims.STYLES.get(small, ""))]
            shown = shown if any(mechanisms.values()) else []
            table.add_row(entry.row.key, word, *shown, Text(entry.row.title))
        console.print(table)
    rows = [e for e in chosen if e.row.key not in atlas.across]
    counted = ((sum(e.status == word for e in rows), word) for word in ledger.STATUSES)
    counts = ", ".join(f"{n} {word}" for n, word in counted if n)
    beside = f" And {len(chosen) - len(rows)} across papers." if len(chosen) > len(rows) else ""
    console.print(
        Text(f"{len(rows)} of {len(atlas.entries)} papers{': ' if counts else ''}{counts}.{beside}")
    )
    _claims.facts(console, _unwritten(chosen))
    _claims.warn(console, atlas.problems)


def _unwritten(entries: list[Entry]) -> dict[str, str]:
    """The parts that are missing in files of built papers, with the papers' keys."""
    from stratoscope.claims.paper import OPTIONAL

    lacking = {
        part: ", ".join(e.row.key for e in entries if e.paper and part in e.paper.unsaid)
        for part in OPTIONAL
    }
    parts = [f"{part}: {keys}." for part, keys in lacking.items() if keys]
    return {"not written": "\n".join(parts)} if parts else {}


def _say_stale(entries: list[Entry]) -> None:
    console = _claims.console()
    for entry in entries:
        names: dict[str, list[str]] = {}
        for name, reasons in entry.stale().items():
            names.setdefault("; ".join(reasons), []).append(name)
        lines = (f"{why}: {', '.join(claims)}" for why, claims in names.items())
        _claims.facts(console, {entry.row.key: "\n".join(lines)})
    click.echo(
        f"{len(entries)} papers are stale. `stratoscope claim --all --stale` measures them again."
    )


def _known(what: str, given: str | None, words: list[str] | tuple[str, ...]) -> None:
    if given is not None and given not in words:
        near = get_close_matches(given, words, 2, 0.5)
        hint = f"Nearest: {', '.join(near)}." if near else f"There are {', '.join(words)}."
        raise ClaimError(f"There is no {what} {given!r}. {hint}")
