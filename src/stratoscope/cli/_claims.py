"""How a claim and its verdict look in a terminal: shared by `paper` and `claim`."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from stratoscope.errors import ClaimError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from stratoscope.claims.claim import Claim
    from stratoscope.claims.verdict import Verdict

STYLES = {
    "reproduced": "bold green",
    "direction only": "bold yellow",
    "not reproduced": "bold red",
    "no test": "bold magenta",
    "mechanism only": "bold cyan",
    "not built": "dim",
}


def console() -> Console:
    from rich.console import Console

    return Console(highlight=False, width=min(shutil.get_terminal_size().columns, 120))


def facts(to: Console, rows: Mapping[str, str | Text]) -> None:
    """Words at the left, what they stand for at the right, wrapped under itself; what is empty is
    left out."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True, min_width=11)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value:
            table.add_row(f"  {name}", Text(value) if isinstance(value, str) else value)
    to.print(table)


def expectation(to: Console, claim: Claim) -> None:
    """What is said before anything is measured."""
    from rich.text import Text

    to.print(Text(claim.says, style="bold"))
    rows = {
        "where": f"{claim.where}; here on {claim.subject}, tier {claim.tier}",
        "valid": claim.valid,
        "expected": claim.expect,
        "direction": claim.direction,
        "we add": f"{claim.we_add}: {claim.we_expect}" if claim.we_add else "",
        "null": "\n".join(f"{name}: {meaning}" for name, meaning in claim.null.items()),
        "numbers": claim.thresholds,
    }
    facts(to, rows)


def measured(to: Console, verdict: Verdict, others: Iterable[Verdict] = ()) -> None:
    """The verdict, its numbers and its figure; of other seeds the word alone."""
    from rich.text import Text

    from stratoscope.claims import draw, figure
    from stratoscope.claims.draw import short

    word = Text(verdict.status, style=STYLES[verdict.status])
    word.append(
        f"  {verdict.date[:10]}, n = {verdict.n:,}, {verdict.seconds:,.1f} s, seed {verdict.seed}",
        style="not bold dim",
    )
    kind = "confirmatory" if verdict.registered else "exploratory: not registered before"
    numbers: dict[str, str | Text] = {
        "verdict": word,
        "why": verdict.why,
        "we add": verdict.added,
        "kind": kind if verdict.tier != "identity" else "",
    }
    for name, value in {**verdict.values, **verdict.null}.items():
        shown = Text(short(value))
        if name in verdict.interval:
            shown.append(f"  [{' to '.join(map(short, verdict.interval[name]))}]", style="dim")
        if name in verdict.null:
            drawn = len(verdict.draws.get(name, ()))
            shown.append(f"  the null{f', {drawn} draws' if drawn else ''}", style="dim")
        numbers[name.replace("_", " ")] = shown
    seeds = ", ".join(f"{other.seed} {other.status}" for other in others)
    facts(to, numbers | {"seeds": seeds, "note": verdict.note})
    if verdict.figure:
        try:
            drawn = figure.drawing(figure.decode(verdict.figure))
        except ClaimError as error:
            return warn(to, [str(error)])
        to.print()
        to.print(draw.terminal(drawn, to.width, verdict.null), soft_wrap=True)
    return None


def warn(to: Console, problems: Iterable[str]) -> None:
    """What could not be read, in sentences."""
    from rich.text import Text

    for problem in problems:
        to.print(Text(f"Warning: {problem}", style="yellow"))
