"""One paper's page under `docs/papers/`, in lines of Markdown, what was found first.

All that is said here of words, marks and reasons comes from `words.py` and `ledger.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from stratoscope import catalogue
from stratoscope.claims import code, statement, words
from stratoscope.claims.claim import Claim
from stratoscope.claims.ledger import Entry
from stratoscope.claims.paper import MIND, OBJECT, Paper
from stratoscope.claims.statement import loud, prose

GLOSSARY = (
    "- *Reproduced*: the comparison written down beforehand holds on every seed; *direction only*: "
    "a weaker one does; *not reproduced*: neither does, and could not within the interval; *no "
    "test*: the model or the instrument cannot do what the test needs, so that nothing is said.",
    "- A *null* is what a rival without the thing would give. `x_low` and `x_high` are the ends of "
    "the 95 % interval of `x`; `x_bound` and `x_floor` are what one more draw of the null exceeds, "
    "or falls below, in 5 of 100 cases.",
    "- *Confirmatory*: git shows that the comparison was committed before it was measured; "
    "*exploratory*: it does not. *Stale*: code that the number came of has changed since.",
    "- A *miniature* is a small model trained here in minutes: it can show a mechanism, and never "
    "counts for real models.",
)


def lines(entry: Entry, paper: Paper) -> Iterator[str]:
    """The page of an entry that is built."""
    yield from (f"# {prose(paper.title)}", "", _source(paper), "")
    yield f"**{words.sentence(entry.words)}**{' *Stale.*' if entry.stale() else ''}"
    yield from ("", f"{'What we ask' if paper.across else 'What the paper says'}:", "")
    yield from (f"> {prose(paper.claim[:1].upper() + paper.claim[1:])}", "", *_marks(entry))
    yield from _stale(entry, paper)
    shown: dict[str, str] = {}
    for claims in paper.statements():
        if claims[0].tier != "identity":
            yield from statement.lines(entry, paper, claims, shown)
    yield from _on_yours(paper)
    for title, text in (
        (MIND, paper.would_change),
        (OBJECT, paper.may_object),
        ("On the paper's own models", paper.protocol),
    ):
        yield from ("", f"## {title}", "", prose(text) or "Nobody has written this down yet.")
    yield from _identities(paper)
    yield from _not_counting(entry)
    yield from ("", "## How to read this page", "", *GLOSSARY, "")
    yield (
        f"Level: {entry.row.level}. Methods: {', '.join(map(_method, paper.methods))}. Claims: "
        f"{_link(paper.path.stem, 'papers', paper.path.stem)}. Code as it stands: "
        f"`{as_it_stands(paper)}`."
    )


def _source(paper: Paper) -> str:
    source = prose(paper.source)
    if paper.arxiv:
        link = f"[arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"
        source = re.sub(r"arXiv:\s*" + re.escape(paper.arxiv), link, source)
    if paper.across:
        source += f" Across {', '.join(f'[{key}]({key}.md)' for key in paper.across)}."
    return source


def _stale(entry: Entry, paper: Paper) -> Iterator[str]:
    if old := entry.stale():
        yield ""
        yield (
            f"*Stale*: the code that {', '.join(f'`{name}`' for name in old)} ran on has changed "
            "since. `stratoscope papers --stale` says what has, `stratoscope claim "
            f"{paper.key}` measures again."
        )
    for name, seeds in entry.confirmed().items():
        named = ", ".join(map(str, seeds))
        yield ""
        yield (
            f"*Confirmed*: code that `{name}` ran on has changed since seeds {named} were run; "
            "another seed, measured again, gave the same numbers."
        )


def _on_yours(paper: Paper) -> Iterator[str]:
    yield from ("", "## Run it on yours", "", "```")
    if any(claim.any_model for claim in paper.claims):
        yield f"stratoscope claim {paper.key} --model YOUR/MODEL    # your model, your own file"
    yield from (f"stratoscope claim {paper.key}    # the subjects of this page", "```")
    if own := dict.fromkeys(f"`{c.name}`" for c in paper.claims if _brings_its_own(c)):
        whose = f"{', '.join(own)} {'brings its' if len(own) == 1 else 'bring their'} own subject"
        yield from (
            "",
            f"{whose}{'s' if len(own) > 1 else ''}, and cannot be run on another model.",
        )


def _brings_its_own(claim: Claim) -> bool:
    return claim.tier != "identity" and not claim.any_model


def _identities(paper: Paper) -> Iterator[str]:
    """What is known to be so, and is checked whenever the tests run."""
    if known := [claim for claim in paper.claims if claim.tier == "identity"]:
        yield from ("", "## Checked in every test run, where the answer is known", "")
    for claim in known:
        yield f"- {prose(_sentence(claim.says))} On {prose(claim.subject)}: `{claim.expect}`."
        yield f"  {prose(claim.about)}"


def _not_counting(entry: Entry) -> Iterator[str]:
    others = [pair for pair in entry.superseded() if pair[0].tier != "identity"]
    if others:
        yield from ("", "## Verdicts that do not count", "")
    for verdict, why in others:
        yield (
            f"- {verdict.date[:10]} `{verdict.claim}` on {prose(verdict.subject)}, seed "
            f"{verdict.seed}: {loud(verdict.status)}; {prose(why)}."
        )


def as_it_stands(paper: Paper) -> str:
    """Eight characters that change with what the paper's file or its methods compute: a page that
    was made before such a change is not up to date."""
    names = dict.fromkeys(claim.name for claim in paper.claims)
    parts = [code.of_claim(paper.path, name) for name in names]
    parts += [code.of_module(address) for address in paper.methods]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


def _marks(entry: Entry) -> Iterator[str]:
    marks = words.marks(entry.small, [v for claim in entry.small for v in entry.seeds(claim)])
    yield f"| {' | '.join(marks)} |"
    yield f"|{'---|' * len(marks)}"
    yield f"| {' | '.join(('yes: ' if good else 'no: ') + why for good, why in marks.values())} |"


def _sentence(text: str) -> str:
    return f"{text.rstrip('.')}."


def _method(address: str) -> str:
    room, _, name = address.partition(".")
    return _link(address, room, name)


def _link(text: str, room: str, name: str) -> str:
    """A link to the source, if it is there: a page must not point at nothing."""
    there = Path(catalogue.ROOT / room / f"{name}.py").is_file()
    return f"[`{text}`](../../src/stratoscope/{room}/{name}.py)" if there else f"`{text}`"
