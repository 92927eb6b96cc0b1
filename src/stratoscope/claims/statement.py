"""One statement on a paper's page: where it is said, what was found on each subject and seed, its
picture, and, folded, how it was judged and the numbers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence

from stratoscope.claims import draw, figure, forest, words
from stratoscope.claims.claim import Claim
from stratoscope.claims.draw import short
from stratoscope.claims.ledger import Entry
from stratoscope.claims.paper import Paper
from stratoscope.claims.verdict import FAILED, Verdict
from stratoscope.plots.text import shorten

TITLE = 86  # letters over a picture


def lines(
    entry: Entry, paper: Paper, claims: Sequence[Claim], shown_before: dict[str, str]
) -> Iterator[str]:
    """One statement; told: the pictures that the page has shown, and under which statement."""
    claim = claims[0]
    title = title_of(paper, claims)
    yield from ("", f"## {prose(title)}", "")
    read = f"; read: {claim.read}{' (provisional)' if claim.read == 'abstract' else ''}"
    beside = " This is a side show of the paper." if claim.side else ""
    named = " and ".join(f"**{prose(one.subject)}**" for one in claims)
    kind = {"real": "real models", "miniature": "miniatures"}[claim.kind]
    kind = kind if len(claims) > 1 else f"a {kind.removesuffix('s')}"
    yield f"*{prose(claim.where)}*{read}. Here on {named} ({kind}).{beside}"
    if claim.we_add:
        yield from ("", f"We add: {prose(claim.we_add)}.")
    yield from ("", "| measured on | word | units | registered | day and time it took |")
    yield "|---|---|---|---|---|"
    for one in claims:
        yield from _rows(entry.seeds(one), one)
    if drawn := forest_of(entry, claims):
        yield from ("", f"![{prose(title)}]({_file(entry, claim, drawn)})")
    yield from _folded("How it was measured and judged", _judged(claim))
    for one in claims:
        if counts := entry.verdict(one):
            where = f"{counts.subject}, seed {counts.seed}"
            yield from _folded(f"The numbers on {where}", _details(entry, one, title, shown_before))


def pictures(entry: Entry, paper: Paper) -> dict[str, str]:
    """Each picture of the page, by its file; none is there twice."""
    pictures: dict[str, str] = {}
    for claims in paper.statements():
        if claims[0].tier == "identity":
            continue
        if drawn := forest_of(entry, claims):
            pictures[_file(entry, claims[0], drawn)] = drawn
        for verdict in filter(None, map(entry.verdict, claims)):
            if verdict.figure:
                drawn = figure_of(verdict, title_of(paper, claims))
                if drawn not in pictures.values():
                    pictures[_file(entry, claims[0], drawn)] = drawn
    return pictures


def title_of(paper: Paper, claims: Sequence[Claim]) -> str:
    """What is said; with the subject where two functions measure the same."""
    claim = claims[0]
    twice = sum(other[0].says == claim.says for other in paper.statements()) > 1
    return f"{claim.says} ({claim.subject})" if twice else claim.says


def forest_of(entry: Entry, claims: Sequence[Claim]) -> str:
    """The picture of all subjects and seeds as SVG; "" where nothing of it was measured."""
    seeds = [sorted(entry.seeds(claim), key=lambda v: v.seed) for claim in claims]
    return forest.svg(claims[0], [verdict for group in seeds for verdict in group])


def _file(entry: Entry, claim: Claim, drawn: str) -> str:
    """A picture's name changes with what it shows."""
    digest = hashlib.sha256(drawn.encode()).hexdigest()[:8]
    return f"figures/{entry.row.key}.{claim.name}.{digest}.svg"


def figure_of(verdict: Verdict, title: str) -> str:
    """A verdict's own figure, which says in a sentence what it belongs to."""
    drawn = figure.drawing(figure.decode(verdict.figure or {}))
    named = drawn.title if (verdict.figure or {}).get("title") else title
    drawn = dataclasses.replace(drawn, title=shorten(named, TITLE))
    return draw.svg(drawn, verdict.null)


def _judged(claim: Claim) -> Iterator[str]:
    if claim.about:
        yield from (prose(claim.about), "")
    yield from ("| | |", "|---|---|")
    if claim.valid:
        yield f"| it is a test only if | `{claim.valid}` |"
    yield f"| reproduced if | `{claim.expect}` |"
    if claim.direction:
        yield f"| direction only if no more than | `{claim.direction}` |"
    if claim.we_expect:
        yield f"| what we add holds if | `{claim.we_expect}` |"
    for name, meaning in claim.null.items():
        yield f"| null: {cell(_plain(name))} | {cell(meaning)} |"
    if not claim.names_a_null:
        yield "| no null is compared with | it is judged against a stated bound alone |"
    if claim.thresholds:
        yield f"| where the bars come from | {cell(claim.thresholds)} |"
    yield f"| independent units | at least {claim.n} |"
    for name, value in claim.found_there.items():
        yield f"| the paper's own {cell(_plain(name))} | {short(value)} |"
    yield f"| its name | `--claim {claim.name}` |"


def _rows(seeds: Sequence[Verdict], claim: Claim) -> Iterator[str]:
    """A row of the table for each seed of one subject."""
    if not seeds:
        yield f"| {cell(claim.subject)} | {words.NOT_RUN} | | | |"
    for verdict in sorted(seeds, key=lambda v: v.seed):
        why = f": {cell(verdict.why)}" if verdict.why else ""
        added = f"; what we add {verdict.added}" if verdict.added else ""
        kind = "before: *confirmatory*" if verdict.registered else "not before: *exploratory*"
        yield (
            f"| {cell(claim.subject)}, seed {verdict.seed} | **{loud(verdict.status)}**{why}"
            f"{added} | {verdict.n:,} {cell(claim.unit)} | {kind} | {verdict.date[:10]}, "
            f"{verdict.seconds:,.0f} s |"
        )


def _details(entry: Entry, claim: Claim, title: str, shown_before: dict[str, str]) -> Iterator[str]:
    """The numbers of the seed that counts and its own figure."""
    verdict = entry.verdict(claim)
    if verdict is None:
        return
    yield from ("| measured | value | 95 % interval |", "|---|---|---|")
    for name, value in {**verdict.values, **verdict.null}.items():
        null = " (null)" if name in verdict.null else ""
        around = " to ".join(map(short, verdict.interval[name])) if name in verdict.interval else ""
        if name in verdict.draws:
            around = f"{len(verdict.draws[name])} draws"
        yield f"| {cell(_plain(name))}{null} | {short(value)} | {around} |"
    yield from after(verdict.note)
    versions = ", ".join(f"{name} {v}" for name, v in verdict.versions.items())
    yield from ("", f"Measured with {versions}.")
    if verdict.figure:
        shown = figure_of(verdict, title)
        if shown in shown_before:
            yield from ("", f"Its picture is the one under *{prose(shown_before[shown])}*.")
        else:
            shown_before[shown] = title
            alt = f"{title}: more of {verdict.subject}, seed {verdict.seed}"
            yield from ("", f"![{prose(alt)}]({_file(entry, claim, shown)})")


def _folded(summary: str, inside: Iterator[str]) -> Iterator[str]:
    yield from ("", "<details>", f"<summary>{prose(summary)}</summary>", "", *inside)
    yield from ("", "</details>")


def prose(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def cell(text: str) -> str:
    return prose(text).replace("|", "\\|")


def loud(word: str) -> str:
    return word.upper() if word == FAILED else word


def _plain(name: str) -> str:
    return name.replace("_", " ")


def after(text: str) -> tuple[str, ...]:
    return ("", prose(text)) if text else ()
