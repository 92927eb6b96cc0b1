"""Show one paper: what it says, what is built of it, what was expected and what was measured.

Example:

stratoscope paper llm-drop --out llm-drop.html
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stratoscope import catalogue
from stratoscope.cli import _claims
from stratoscope.errors import MethodError

if TYPE_CHECKING:
    from rich.console import Console

    from stratoscope.claims.ledger import Entry
    from stratoscope.claims.paper import Paper


@click.command(help=__doc__)
@click.argument("key")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Also write it as one HTML page that works offline.",
)
def command(key: str, out: Path | None) -> None:
    from rich.text import Text

    from stratoscope.claims import ledger

    atlas = ledger.atlas()
    entry = atlas.find(key)
    console = _claims.console()
    console.print(Text(entry.paper.title if entry.paper else entry.row.title, style="bold"))
    status = Text(entry.status, style=_claims.STYLES.get(entry.status, ""))
    if entry.paper is None:
        facts = {
            "key": key,
            "year": str(entry.row.year),
            "level": entry.row.level,
            "status": status,
        }
        facts |= {
            "to build": entry.row.component,
            "to check": entry.row.claim_check,
            "needs": entry.row.needs,
        }
        _claims.facts(console, facts)
    else:
        built = "\n".join(_summary(address) for address in entry.paper.methods)
        facts = {
            "source": entry.paper.source,
            "level": entry.row.level,
            "it says": entry.paper.claim,
        }
        shown_status = Text(entry.words.summary, style=_claims.STYLES.get(entry.status, ""))
        facts |= {"we built": built, "status": shown_status, "own models": entry.paper.protocol}
        _claims.facts(console, facts)
        _show_claims(console, entry, entry.paper)
    about = [
        problem
        for problem in atlas.problems
        if problem.startswith(f"{key.replace('-', '_')}.py") or "Line" in problem
    ]
    _claims.warn(console, about)
    if out is not None:
        from stratoscope.report import paper as page

        click.echo(f"\nPage: {page.write(entry, out).absolute().as_uri()}")


def _show_claims(console: Console, entry: Entry, paper: Paper) -> None:
    for claim in sorted(paper.claims, key=lambda claim: claim.tier == "identity"):
        console.print()
        _claims.expectation(console, claim)
        if seeds := entry.seeds(claim):
            _claims.measured(console, seeds[0], seeds[1:])
        elif claim.tier == "identity":
            _claims.facts(console, {"verdict": "checked in every test run"})
        else:
            _claims.facts(console, {"verdict": "built, not run"})
    for verdict, why in entry.superseded():
        if verdict.tier != "identity":
            what = f"A verdict on {verdict.claim} ({verdict.status}, {verdict.date[:10]})"
            _claims.warn(console, [f"{what} does not count: {why}."])
    tiers = dict.fromkeys(claim.tier for claim in paper.claims)
    console.print()
    _claims.facts(
        console,
        {"run it": "\n".join(f"stratoscope claim {entry.row.key} --tier {tier}" for tier in tiers)},
    )


def _summary(address: str) -> str:
    try:
        return f"{address}: {catalogue.find(address).summary}"
    except MethodError:
        return f"{address} (not in the catalogue)"
