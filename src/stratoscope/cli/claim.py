"""Run the claims of one paper, or all that are due: print what is expected, measure, judge, and
keep the verdict.

Ctrl-C stops without keeping anything of the claim that runs; the same command goes on from there.
Examples:

stratoscope claim llm-drop --seed 0

stratoscope claim llm-drop --model my/model --out mine.jsonl

stratoscope claim llm-drop --register --seeds 0-2

stratoscope claim --all --stale --seeds 0-2 --budget 30m
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stratoscope._threads import use_free_cores
from stratoscope.cli import _claims

if TYPE_CHECKING:
    from stratoscope.claims.claim import Claim
    from stratoscope.claims.paper import Paper
    from stratoscope.models import LM


@click.command(help=__doc__)
@click.argument("key", required=False)
@click.option(
    "--tier", type=click.Choice(["identity", "small", "paper"]), default="small", show_default=True
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of everything random in the claim."
)
@click.option("--claim", "name", help="Only the claim of this name.")
@click.option("--subject", help="Only on this one of the claim's subjects.")
@click.option(
    "--model",
    help="Your model: a name, a folder or a hub id. The verdict goes to your own file, never to "
    "the atlas.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With --model: the file that verdicts are added to.  [default: ./claims/KEY.jsonl]",
)
@click.option(
    "--register",
    is_flag=True,
    help="Measure nothing; write down what is expected, to be committed before it is measured.",
)
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
    "--seeds",
    default="0-2",
    show_default=True,
    help="With --all or --register: the seeds, as 0-2 or 0,1,5.",
)
@click.option(
    "--budget",
    default="30m",
    show_default=True,
    help="With --all: begin no more after 90s, 30m or 2h.",
)
@click.option("--dry-run", is_flag=True, help="With --all: only list what is due.")
def command(key: str | None, everything: bool, **options: Any) -> None:
    queue = {word: options.pop(word) for word in ("stale", "budget", "dry_run")}
    if everything and options["model"]:
        raise click.UsageError("--all measures the atlas's own subjects; give --model a KEY alone.")
    if everything:
        _all([key] if key else [], options["seeds"], **queue)
    elif key is None:
        raise click.UsageError("Name a paper (`stratoscope papers` lists them), or give --all.")
    else:
        _one(key, **options)


def _all(keys: list[str], seeds: str, stale: bool, budget: str, dry_run: bool) -> None:
    from stratoscope.claims import due, ledger
    from stratoscope.cli import _apart

    measure = lambda piece: _apart.run(piece.arguments)  # noqa: E731
    numbers, seconds = due.read_seeds(seeds), due.read_budget(budget)
    pieces = due.due(ledger.atlas(), numbers, stale=stale, keys=keys)
    known = sum(piece.seconds for piece in pieces if piece.seconds == piece.seconds)
    unknown = sum(piece.seconds != piece.seconds for piece in pieces)
    summary = f"{len(pieces)} measurements are due, about {known / 60:.0f} min"
    click.echo(summary + (f" and {unknown} that never ran." if unknown else "."))
    became: dict[str, int] = {}
    if dry_run:
        for piece in pieces:
            click.echo(f"  {piece}: {piece.why}")
        return
    end, tried = time.monotonic() + seconds, set()
    while pieces and "left" not in became:
        for piece, word in due.work(pieces, end - time.monotonic(), measure):
            tried.add(str(piece))
            became[word] = became.get(word, 0) + 1
            if word == "failed":
                click.echo(f"  {piece} did not run to its end.", err=True)
        # seeds that the first did not confirm are due now
        later = due.due(ledger.atlas(), numbers, stale=stale, keys=keys)
        pieces = [piece for piece in later if str(piece) not in tried]
    counts = ", ".join(f"{count} {word}" for word, count in became.items())
    click.echo(f"\n{counts or 'Nothing to do'}.")


def _one(
    key: str,
    tier: str,
    seed: int,
    seeds: str,
    name: str | None,
    subject: str | None,
    model: str | None,
    out: Path | None,
    register: bool,
) -> None:
    if out is not None and model is None:
        raise click.UsageError("--out is for --model: verdicts on the atlas's subjects go there.")
    paper = _paper(key)
    if tier == "paper" and not any(claim.tier == tier for claim in paper.claims):
        click.echo(f"{key} on the paper's own models:\n{paper.protocol or 'no protocol'}")
        return
    claims = paper.named(name, tier, subject)
    if register:
        _register(paper, claims, seeds)
    elif model is not None:
        use_free_cores()
        _measure(
            paper, _on(paper, claims, model), seed, model, out or Path("claims", f"{key}.jsonl")
        )
    else:
        use_free_cores()
        _measure(paper, claims, seed)


def _paper(key: str) -> Paper:
    from stratoscope.claims import ledger
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
    return paper


def _on(paper: Paper, claims: list[Claim], model: str) -> list[Claim]:
    """The claims that can be measured on any model, about this one."""
    from dataclasses import replace

    from stratoscope.errors import ClaimError

    claims_of = {c.name: replace(c, subject=model, kind="real") for c in claims if c.any_model}
    if not claims_of:
        able = ", ".join(dict.fromkeys(c.name for c in paper.claims if c.any_model))
        raise ClaimError(
            f"{', '.join(dict.fromkeys(c.name for c in claims))} of {paper.key} brings a subject "
            f"of its own and cannot be measured on {model}; {able or 'none of its claims'} can."
        )
    return list(claims_of.values())


def _register(paper: Paper, claims: list[Claim], seeds: str) -> None:
    from stratoscope.claims import due, ledger, register

    known = ledger.atlas().find(paper.key).verdicts
    file = register.write(paper, claims, due.read_seeds(seeds), known)
    for claim in claims:
        click.echo(f"  {claim.name} on {claim.subject}: {claim.expect}")
    click.echo(
        f"Registered in {file}, for those of the seeds {seeds} on which nothing is known. Commit "
        "that file, then measure."
    )


def _measure(
    paper: Paper, claims: list[Claim], seed: int, model: str | None = None, out: Path | None = None
) -> None:
    from stratoscope.claims import verdicts
    from stratoscope.claims.run import run

    console = _claims.console()
    lm = _loaded(model) if model else None
    for number, claim in enumerate(claims):
        if number:
            console.print()
        _claims.expectation(console, claim)
        try:
            with console.status(f"measuring {claim.name} on {claim.subject} ..."):
                verdict = run(paper, claim, seed, lm)
        except BaseException:  # Ctrl-C as well: it goes on up, and says why
            click.echo(
                f"  {claim.name} was not measured to its end: nothing is kept of it.", err=True
            )
            raise
        file = verdicts.append(verdict) if out is None else verdicts.append_to(verdict, out)
        _claims.measured(console, verdict)
        console.print()
        at_home = out is not None or file.parent == verdicts.home()
        _claims.facts(console, {"kept in": f"{file}{_elsewhere(at_home)}"})


def _loaded(model: str) -> LM:
    import stratoscope.models as models

    return models.load(model)


def _elsewhere(at_home: bool) -> str:
    return "" if at_home else " (the package's own folder cannot be written to)"
