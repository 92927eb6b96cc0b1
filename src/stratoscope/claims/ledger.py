"""The 243 papers of the ledger, and what became of each: the atlas."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from stratoscope.claims import code, verdicts
from stratoscope.claims import paper as papers
from stratoscope.claims.claim import DIRECTION, FAILED, REPRODUCED, Claim, Verdict
from stratoscope.claims.paper import Paper
from stratoscope.errors import ClaimError

TABLE = Path(__file__).parent.parent / "papers" / "ledger.tsv"
NOT_RUN, NOT_BUILT = "built, not run", "not built"
STATUSES = (REPRODUCED, DIRECTION, FAILED, NOT_RUN, NOT_BUILT)
WORST_FIRST = (FAILED, NOT_RUN, DIRECTION, REPRODUCED)


@dataclass(frozen=True)
class Row:
    """One line of the ledger, its columns as they stand there."""

    id: int
    key: str
    title: str
    year: int
    kind: str
    level: str
    component: str
    claim_check: str
    needs: str
    feasible: str
    wave: str


@dataclass(frozen=True)
class Entry:
    """A row with what was built for it: its paper file (or None) and all verdicts of its key, in
    order of recording."""

    row: Row
    paper: Paper | None
    verdicts: tuple[Verdict, ...] = ()

    @property
    def status(self) -> str:
        """The worst word among the paper's statements, each the best over its subjects; `built, not
        run` until all ran.

        Small claims that say the same (`says`, to the letter) of several subjects are one
        statement: a model too small for an effect does not refute it where a miniature built for it
        shows it. Both verdicts stay visible.
        """
        if self.paper is None:
            return NOT_BUILT
        statements: dict[str, list[str]] = {}
        for claim in self.small:
            statements.setdefault(claim.says, []).append(_word(self.verdict(claim)))
        best = (min if NOT_RUN in words else max for words in statements.values())
        found = {
            pick(words, key=WORST_FIRST.index) for pick, words in zip(best, statements.values())
        }
        return next((word for word in WORST_FIRST if word in found), NOT_RUN)

    @property
    def small(self) -> list[Claim]:
        return [claim for claim in self.paper.claims if claim.tier == "small"] if self.paper else []

    @property
    def tally(self) -> str:
        """How many small claims came out at least in direction, `2 of 3`; "" before any was run."""
        good = sum(_word(self.verdict(claim)) in (REPRODUCED, DIRECTION) for claim in self.small)
        return f"{good} of {len(self.small)}" if self.deciding() else ""

    @property
    def date(self) -> str:
        """The day of the newest verdict that counts, or ""."""
        found = [v.date for claim in self.small if (v := self.verdict(claim))]
        return max(found, default="")[:10]

    def seeds(self, claim: Claim) -> list[Verdict]:
        """The newest verdict of each seed about the claim as it stands, the worst first."""
        newest = {v.seed: v for v in self.verdicts if v.judges(claim)}
        return sorted(newest.values(), key=lambda v: (WORST_FIRST.index(v.status), v.seed))

    def verdict(self, claim: Claim) -> Verdict | None:
        """The verdict that counts: the worst over the seeds. A lucky seed hides nothing."""
        return next(iter(self.seeds(claim)), None)

    def counting(self) -> list[tuple[Claim, Verdict]]:
        """The claims that have a verdict that counts, in the order of the file."""
        found = (
            (claim, self.verdict(claim)) for claim in (self.paper.claims if self.paper else ())
        )
        return [(claim, verdict) for claim, verdict in found if verdict is not None]

    def deciding(self) -> list[tuple[Claim, Verdict]]:
        """The measured small claims, the one that comes out worst first."""
        found = [(claim, verdict) for claim, verdict in self.counting() if claim.tier == "small"]
        return sorted(found, key=lambda pair: WORST_FIRST.index(pair[1].status))

    def stale(self) -> dict[str, list[str]]:
        """Why verdicts that count are stale, in words, by the claim's name; claims that are not
        stale are left out."""
        if self.paper is None:
            return {}
        found = {
            claim.name: list(
                dict.fromkeys(
                    why for v in self.seeds(claim) for why in code.changed(v, self.paper.path)
                )
            )
            for claim in self.small
        }
        return {name: reasons for name, reasons in found.items() if reasons}

    def outdated(self) -> list[Verdict]:
        """Verdicts about words that have changed since, or about claims that are gone: they do not
        count."""
        claims = self.paper.claims if self.paper else ()
        return [
            verdict
            for verdict in self.verdicts
            if not any(verdict.judges(claim) for claim in claims)
        ]


@dataclass(frozen=True)
class Atlas:
    """Every row as an entry, by key; problems: what could not be read, in sentences."""

    entries: dict[str, Entry]
    problems: list[str] = field(default_factory=list)

    def find(self, key: str) -> Entry:
        """The entry of `key`. Raises ClaimError with the nearest keys when the ledger has none."""
        return self.entries[row(key).key]

    def counts(self) -> dict[tuple[str, str], int]:
        """How many papers by (level, status)."""
        return dict(Counter((entry.row.level, entry.status) for entry in self.entries.values()))


@cache
def rows(table: Path = TABLE) -> dict[str, Row]:
    """The ledger, by key, in its own order."""
    with open(table, encoding="utf-8", newline="") as file:
        lines = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        numbers = ("id", "year")
        read = (
            Row(**{k: int(v) if k in numbers else v for k, v in line.items()}) for line in lines
        )
        return {row.key: row for row in read}


def row(key: str) -> Row:
    """One row. Raises ClaimError with the nearest keys when the ledger has none of that key."""
    if key not in rows():
        raise ClaimError(f"There is no paper {key!r} among {len(rows())}. {_nearest(key)}")
    return rows()[key]


def levels() -> list[str]:
    """The levels, in the order in which they are told: from the token outwards, then what changes
    and builds."""
    first = [
        "token",
        "embedding",
        "neuron",
        "head-circuit",
        "layer",
        "model-editing",
        "retrieval",
        "architecture",
    ]
    return sorted(
        {row.level for row in rows().values()},
        key=lambda x: (first.index(x) if x in first else 99, x),
    )


def atlas(folder: Path | None = None, folders: Sequence[Path] | None = None) -> Atlas:
    """All rows with the paper files of `folder` and the verdicts of `folders` (default: this
    package's, and the user's)."""
    built, broken = papers.shelf(folder)
    kept, problems = verdicts.read(verdicts.places() if folders is None else folders)
    problems += [f"{reason}" for reason in broken.values()]
    problems += [
        f"{built[key].path.name} is no paper of the ledger. {_nearest(key)}"
        for key in built.keys() - rows().keys()
    ]
    of: dict[str, list[Verdict]] = {}
    for verdict in kept:
        of.setdefault(verdict.key, []).append(verdict)
    entries = {
        key: Entry(row, built.get(key), tuple(of.get(key, ()))) for key, row in rows().items()
    }
    return Atlas(entries, problems)


def _word(verdict: Verdict | None) -> str:
    return verdict.status if verdict else NOT_RUN


def _nearest(key: str) -> str:
    """A hint: keys that look alike, or whose title has the word."""
    near = get_close_matches(key, rows(), 3, 0.5)
    near += [
        row.key
        for row in rows().values()
        if key.casefold() in f"{row.key} {row.title}".casefold() and key
    ][:3]
    return (
        f"Nearest: {', '.join(dict.fromkeys(near))}."
        if near
        else "`stratoscope papers` lists them all."
    )
