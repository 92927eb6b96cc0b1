"""List the methods, room by room: what each does, its verbs and its paper.

With ROOM, only that room's.
"""

from __future__ import annotations

from itertools import groupby

import click

from stratoscope import catalogue
from stratoscope.errors import MethodError


@click.command(help=__doc__)
@click.argument("room", required=False)
def command(room: str | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    entries = catalogue.methods()
    rooms = sorted({entry.room for entry in entries})
    if room is not None and room not in rooms:
        raise MethodError(f"There is no method room {room!r}. The rooms are {', '.join(rooms)}.")
    console = Console(highlight=False)
    for name, group in groupby(entries, key=lambda entry: entry.room):
        if room not in (None, name):
            continue
        table = Table(
            box=box.SIMPLE_HEAD, title=name, title_justify="left", title_style="bold", expand=True
        )
        table.add_column("method", no_wrap=True)
        table.add_column("verbs", no_wrap=True)
        table.add_column("what it does", ratio=1)
        for entry in group:
            # Text, not str: rich would read square brackets in a summary as markup.
            says = Text(entry.summary)
            if entry.paper:
                says.append(f"\npaper: {entry.paper}", style="dim")
            table.add_row(entry.name, "\n".join(entry.verbs), says)
        console.print(table)
