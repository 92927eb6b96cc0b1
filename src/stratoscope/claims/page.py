"""One paper's page under `docs/papers/`, in lines of Markdown, what was found first.

All that is said here of words, marks and reasons comes from `words.py` and `ledger.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from stratoscope import catalogue
from stratoscope.claims import code, draw, figure, forest, words
from stratoscope.claims.claim import Claim
from stratoscope.claims.draw import short
from stratoscope.claims.ledger import Entry
from stratoscope.claims.paper import Paper
from stratoscope.claims.verdict import FAILED, Verdict


def lines(entry: Entry, paper: Paper) -> Iterator[str]:
    """The page of an entry that is built."""
    source = prose(paper.source)
    if paper.arxiv:
        link = f"[arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"
        source = re.sub(r"arXiv:\s*" + re.escape(paper.arxiv), link, source)
    yield from (f"# {prose(paper.title)}", "", source, "")
    old = entry.stale()
    yield f"**{words.found(entry.words)}**{' *Stale.*' if old else ''}"
    yield from ("", *_marks(entry), "", f"> {prose(paper.claim)}", "")
    if old:
        yield (
            f"*Stale*: what {', '.join(f'`{name}`' for name in old)} was measured with has "
            "changed since. `stratoscope papers --stale` says what, `stratoscope claim "
            f"{paper.key}` measures again."
        )
        yield ""
    yield (
        f"Level: {entry.row.level}. Methods: {', '.join(map(_method, paper.methods))}. Claims: "
        f"{_link(paper.path.stem, 'papers', paper.path.stem)}. Code as it stands: "
        f"`{as_it_stands(paper)}`."
    )
    for claims in paper.statements():
        if claims[0].tier != "identity":
            yield from _statement(entry, claims)
    yield from _own_model(paper)
    for claim in paper.claims:
        if claim.tier == "identity":
            yield from ("", f"## Identity: {prose(claim.says)}", "")
            yield (
                f"`{claim.name}` on {prose(claim.subject)} expects `{claim.expect}`; it runs in "
                "every test run."
            )
            yield from _after(claim.about)
    if others := [pair for pair in entry.superseded() if pair[0].tier != "identity"]:
        yield from ("", "## Verdicts that do not count", "")
        for verdict, why in others:
            yield (
                f"- {verdict.date[:10]} `{verdict.claim}` on {prose(verdict.subject)}, seed "
                f"{verdict.seed}: {_loud(verdict.status)}; {prose(why)}."
            )


def picture(verdict: Verdict) -> str:
    """The file of a verdict's figure; its name changes with what it shows."""
    name = figure.digest(verdict.figure or {}, verdict.null)
    return f"figures/{verdict.key}.{verdict.claim}.{name}.svg"


def pictures(entry: Entry, paper: Paper) -> dict[str, Callable[[], str]]:
    """How each picture of the page is drawn, by its file."""
    found: dict[str, Callable[[], str]] = {}
    for claims in paper.statements():
        if (drawn := _forest(entry, claims)) and claims[0].tier != "identity":
            found[_forest_file(entry, claims, drawn)] = partial(str, drawn)
        for verdict in filter(None, map(entry.verdict, claims)):
            if verdict.figure:
                found[picture(verdict)] = partial(_figure, verdict)
    return found


def _forest(entry: Entry, claims: Sequence[Claim]) -> str:
    seeds = [sorted(entry.seeds(claim), key=lambda v: v.seed) for claim in claims]
    return forest.svg(claims[0], [verdict for found in seeds for verdict in found])


def _forest_file(entry: Entry, claims: Sequence[Claim], drawn: str) -> str:
    digest = hashlib.sha256(drawn.encode()).hexdigest()[:8]
    return f"figures/{entry.row.key}.{claims[0].name}.all.{digest}.svg"


def _figure(verdict: Verdict) -> str:
    return draw.svg(figure.drawing(figure.decode(verdict.figure or {})), verdict.null)


def as_it_stands(paper: Paper) -> str:
    """Eight characters that change with what the paper's file or its methods compute: a page that
    was made before such a change is not up to date."""
    names = dict.fromkeys(claim.name for claim in paper.claims)
    parts = [code.of_claim(paper.path, name) for name in names]
    parts += [code.of_module(address) for address in paper.methods]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


def prose(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def cell(text: str) -> str:
    return prose(text).replace("|", "\\|")


def _marks(entry: Entry) -> Iterator[str]:
    marks = words.marks(entry.small, [v for claim in entry.small for v in entry.seeds(claim)])
    yield f"| {' | '.join(marks)} |"
    yield f"|{'---|' * len(marks)}"
    yield f"| {' | '.join(('yes: ' if good else 'no: ') + why for good, why in marks.values())} |"


def _statement(entry: Entry, claims: Sequence[Claim]) -> Iterator[str]:
    claim = claims[0]
    yield from ("", f"## {prose(claim.says)}", "")
    read = f"; read: {claim.read}{' (provisional)' if claim.read == 'abstract' else ''}"
    beside = " A side show of the paper." if claim.side else ""
    named = " and ".join(f"**{prose(one.subject)}**" for one in claims)
    yield f"*{prose(claim.where)}*{read}. Here on {named} ({claim.kind}).{beside}"
    if claim.we_add:
        yield from ("", f"We add: {prose(claim.we_add)}.")
    yield from ("", "| | |", "|---|---|")
    if claim.valid:
        yield f"| a test only if | `{claim.valid}` |"
    yield f"| expected | `{claim.expect}` |"
    if claim.direction:
        yield f"| the direction alone | `{claim.direction}` |"
    if claim.we_expect:
        yield f"| what we add | `{claim.we_expect}` |"
    for name, said in claim.null.items():
        yield f"| null: {cell(_plain(name))} | {cell(said)} |"
    if not claim.names_a_null:
        yield "| no null is compared with | judged against a stated bound alone |"
    if claim.thresholds:
        yield f"| the numbers | {cell(claim.thresholds)} |"
    yield f"| units | at least {claim.n} |"
    for name, value in claim.found_there.items():
        yield f"| the paper's {cell(_plain(name))} | {short(value)} |"
    for one in claims:
        yield from _rows(entry.seeds(one), one)
    if drawn := _forest(entry, claims):
        yield from ("", f"![{prose(claim.says)}]({_forest_file(entry, claims, drawn)})")
    for one in claims:
        if counts := entry.verdict(one):
            yield from _details(counts)
    yield from _after(claim.about)
    model = " --model YOUR/MODEL" if claim.any_model else ""
    yield from ("", "```", f"stratoscope claim {entry.row.key} --claim {claim.name}{model}", "```")


def _rows(seeds: Sequence[Verdict], claim: Claim) -> Iterator[str]:
    """A row of the table for each seed of one subject."""
    if not seeds:
        yield f"| {cell(claim.subject)} | {words.NOT_RUN} |"
    for verdict in sorted(seeds, key=lambda v: v.seed):
        why = f" ({prose(verdict.why)})" if verdict.why else ""
        added = f"; what we add {verdict.added}" if verdict.added else ""
        kind = "confirmatory" if verdict.registered else "exploratory"
        yield (
            f"| {cell(claim.subject)}, seed {verdict.seed} | **{_loud(verdict.status)}**{why}"
            f"{added}, *{kind}*, {verdict.date[:10]}, n = {verdict.n:,}, {verdict.seconds:,.0f} s |"
        )


def _details(verdict: Verdict) -> Iterator[str]:
    """The numbers of the seed that counts and its own figure, folded."""
    yield from ("", "<details>")
    yield f"<summary>{prose(verdict.subject)}, seed {verdict.seed}: the numbers</summary>"
    yield from ("", "| measured | value | interval |", "|---|---|---|")
    for name, value in {**verdict.values, **verdict.null}.items():
        null = " (null)" if name in verdict.null else ""
        around = " to ".join(map(short, verdict.interval[name])) if name in verdict.interval else ""
        if name in verdict.draws:
            around = f"{len(verdict.draws[name])} draws"
        yield f"| {cell(_plain(name))}{null} | {short(value)} | {around} |"
    yield from _after(verdict.note)
    versions = ", ".join(f"{name} {v}" for name, v in verdict.versions.items())
    yield from ("", f"Measured with {versions}.")
    if verdict.figure:
        yield from ("", f"![More of {prose(verdict.subject)}]({picture(verdict)})")
    yield from ("", "</details>")


def _own_model(paper: Paper) -> Iterator[str]:
    yield from ("", "## On the paper's own models", "")
    yield prose(paper.protocol) or "No protocol has been written down."


def _loud(word: str) -> str:
    return word.upper() if word == FAILED else word


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _after(text: str) -> tuple[str, ...]:
    return ("", prose(text)) if text else ()


def _method(address: str) -> str:
    room, _, name = address.partition(".")
    return _link(address, room, name)


def _link(text: str, room: str, name: str) -> str:
    """A link to the source, if it is there: a page must not point at nothing."""
    there = Path(catalogue.ROOT / room / f"{name}.py").is_file()
    return f"[`{text}`](../../src/stratoscope/{room}/{name}.py)" if there else f"`{text}`"
