"""List the architectures: which are proved, probed or refused and why, and what each lacks.

With MODEL_TYPE (the `model_type` of a config, such as qwen3_moe), only that one.
"""

from __future__ import annotations

import click

from stratoscope.cli import _options
from stratoscope.errors import FamilyError


@click.command(help=__doc__)
@click.argument("model_type", required=False)
def command(model_type: str | None) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from stratoscope.models.families._table import MEANING, entries

    every = entries()
    console = Console(highlight=False)
    if model_type is not None:
        named = [entry for entry in every if entry.type == model_type]
        if not named:
            known = [entry.type for entry in every]
            hint = _options.meant(model_type, known, "`stratoscope families` lists them.")
            raise FamilyError(
                f"{model_type!r} is not in the table, so it is probed and proved when wrapped. "
                f"{hint}"
            )
        for one in named:
            console.print(
                Text(f"{one.type} ({one.kind}): {one.status}, that is, {MEANING[one.status]}.")
            )
            if one.residual:
                console.print(Text(f"residual stream: {one.residual}"))
            for points, where, reason in one.lacks:
                console.print(Text(f"lacks {points} in {where}: {reason}"))
            if one.why:
                console.print(Text(f"why: {one.why}"))
        return
    table = Table(box=box.SIMPLE_HEAD, expand=True)
    for column in ("type", "status"):
        table.add_column(column, no_wrap=True)
    table.add_column("lacks, or why not", ratio=1)
    for entry in every:
        why = entry.why or "; ".join(f"{points} ({where})" for points, where, _ in entry.lacks)
        table.add_row(entry.type, entry.status, Text(why))
    console.print(table)
    counts = {status: sum(entry.status == status for entry in every) for status in MEANING}
    console.print(Text(", ".join(f"{count} {status}" for status, count in counts.items())))
