"""Run the claims of one paper: print what is expected, measure, judge, and keep the verdict.

Ctrl-C stops without keeping anything of the claim that runs. Example:

stratoscope claim llm-drop --tier small --seed 0
"""

from __future__ import annotations

import click

from stratoscope._threads import use_free_cores
from stratoscope.cli import _claims


@click.command(help=__doc__)
@click.argument("key")
@click.option("--tier", type=click.Choice(["identity", "small", "paper"]), default="small", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True, help="Of everything random in the claim.")
@click.option("--claim", "name", help="Only the claim of this name.")
def command(key: str, tier: str, seed: int, name: str | None) -> None:
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
            click.echo(f"  {claim.name} was not measured to its end: nothing is kept of it.", err=True)
            raise
        file = verdicts.append(verdict)
        _claims.measured(console, verdict)
        console.print()
        _claims.facts(console, {"kept in": f"{file}{_elsewhere(file.parent == verdicts.home())}"})


def _elsewhere(at_home: bool) -> str:
    return "" if at_home else " (the package's own folder cannot be written to)"
