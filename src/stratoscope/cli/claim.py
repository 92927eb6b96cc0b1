"""Run the claims of one paper, or all that are due: print what is expected, measure, judge, and
keep the verdict.

Ctrl-C stops without keeping anything of the claim that runs; the same command goes on from there.
Examples:

stratoscope claim llm-drop --tier small --seed 0

stratoscope claim --all --stale --seeds 0-2 --budget 30m
"""

from __future__ import annotations

from typing import Any

import click

from stratoscope._threads import use_free_cores
from stratoscope.cli import _claims


@click.command(help=__doc__)
@click.argument("key", required=False)
@click.option(
    "--tier", type=click.Choice(["identity", "small", "paper"]), default="small", show_default=True
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of everything random in the claim."
)
@click.option("--claim", "name", help="Only the claim of this name.")
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Every small claim that is due (of KEY, if given), quickest first.",
)
@click.option(
    "--stale",
    is_flag=True,
    help="With --all: also those whose code has changed since they were measured.",
)
@click.option(
    "--seeds", default="0-2", show_default=True, help="With --all: the seeds, as 0-2 or 0,1,5."
)
@click.option(
    "--budget",
    default="30m",
    show_default=True,
    help="With --all: begin no more after 90s, 30m or 2h.",
)
@click.option("--dry-run", is_flag=True, help="With --all: only list what is due.")
def command(
    key: str | None, tier: str, seed: int, name: str | None, everything: bool, **queue: Any
) -> None:
    if not everything:
        if key is None:
            raise click.UsageError("Name a paper (`stratoscope papers` lists them), or give --all.")
        _one(key, tier, seed, name)
    else:
        _all([key] if key else [], **queue)


def _all(keys: list[str], stale: bool, seeds: str, budget: str, dry_run: bool) -> None:
    from stratoscope.claims import due, ledger

    numbers, seconds = due.read_seeds(seeds), due.read_budget(budget)
    pieces = due.due(ledger.atlas(), numbers, stale=stale, keys=keys)
    known = sum(piece.seconds for piece in pieces if piece.seconds == piece.seconds)
    unknown = sum(piece.seconds != piece.seconds for piece in pieces)
    told = f"{len(pieces)} measurements are due, about {known / 60:.0f} min"
    click.echo(told + (f" and {unknown} that never ran." if unknown else "."))
    became: dict[str, int] = {}
    if dry_run:
        for piece in pieces:
            click.echo(f"  {piece.entry.row.key} {piece.claim.name} seed {piece.seed}: {piece.why}")
        return
    for piece, word in due.work(pieces, seconds):
        became[word] = became.get(word, 0) + 1
        if word == "failed":
            click.echo(
                f"  {piece.entry.row.key} {piece.claim.name} seed {piece.seed} did not run to its "
                "end.",
                err=True,
            )
    click.echo(
        "\n"
        + (", ".join(f"{count} {word}" for word, count in became.items()) or "Nothing to do")
        + "."
    )


def _one(key: str, tier: str, seed: int, name: str | None) -> None:
    use_free_cores()
    from stratoscope.claims import ledger, verdicts
    from stratoscope.claims.run import run
    from stratoscope.errors import ClaimError

    atlas = ledger.atlas()
    paper = atlas.find(key).paper
    if paper is None:
        file = f"{key.replace('-', '_')}.py"
        why = next(
            (problem for problem in atlas.problems if problem.startswith(file)),
            f"src/stratoscope/papers/{file} would be its file.",
        )
        raise ClaimError(f"{key} is not built: there is nothing to run. {why}")
    console = _claims.console()
    for number, claim in enumerate(paper.named(name, tier)):
        if number:
            console.print()
        _claims.expectation(console, claim)
        try:
            with console.status(f"measuring {claim.name} ..."):
                verdict = run(paper, claim, seed)
        except BaseException:  # Ctrl-C as well: it goes on up, and says why
            click.echo(
                f"  {claim.name} was not measured to its end: nothing is kept of it.", err=True
            )
            raise
        file = verdicts.append(verdict)
        _claims.measured(console, verdict)
        console.print()
        _claims.facts(console, {"kept in": f"{file}{_elsewhere(file.parent == verdicts.home())}"})


def _elsewhere(at_home: bool) -> str:
    return "" if at_home else " (the package's own folder cannot be written to)"
