"""The 243 papers of the ledger, and what became of each: the atlas."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from stratoscope.claims import code, confirmed, verdicts
from stratoscope.claims import paper as papers
from stratoscope.claims.claim import Claim
from stratoscope.claims.paper import Paper
from stratoscope.claims.verdict import Verdict
from stratoscope.claims.words import NOT_BUILT, NOT_RUN, STATUSES, WORST_FIRST, Words, words
from stratoscope.errors import ClaimError

__all__ = ["NOT_RUN", "STATUSES", "Atlas", "Entry", "Row", "atlas", "levels", "row", "rows"]

ACROSS = "across papers"  # in place of a level
TABLE = Path(__file__).parent.parent / "papers" / "ledger.tsv"


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
    def words(self) -> Words:
        """Its word on real models and on miniatures, by the one rule of `words.py`."""
        return words((claim, _word(self.verdict(claim))) for claim in self.small)

    @property
    def status(self) -> str:
        """One word to count papers by."""
        return self.words.status if self.paper else NOT_BUILT

    @property
    def small(self) -> list[Claim]:
        return [claim for claim in self.paper.claims if claim.tier == "small"] if self.paper else []

    @property
    def date(self) -> str:
        """The day of the newest verdict that counts, or ""."""
        dates = [v.date for claim in self.small if (v := self.verdict(claim))]
        return max(dates, default="")[:10]

    def seeds(self, claim: Claim) -> list[Verdict]:
        """The verdict of each seed about the claim as it stands, the worst first.

        Of several on one seed the newest counts, or a worse one that the same code gave: a rerun
        hides no failure. The others are `superseded`.
        """
        of: dict[int, list[Verdict]] = {}
        for verdict in sorted(self.verdicts, key=lambda v: v.date):
            if verdict.judges(claim):
                of.setdefault(verdict.seed, []).append(verdict)
        counted = (
            min((v for v in run if v.code == run[-1].code), key=_rank) for run in of.values()
        )
        return sorted(counted, key=lambda v: (_rank(v), v.seed))

    def verdict(self, claim: Claim) -> Verdict | None:
        """The verdict that counts: the worst over the seeds. A lucky seed hides nothing."""
        return next(iter(self.seeds(claim)), None)

    def counting(self) -> list[tuple[Claim, Verdict]]:
        """The claims that have a verdict that counts, in the order of the file."""
        pairs = (
            (claim, self.verdict(claim)) for claim in (self.paper.claims if self.paper else ())
        )
        return [(claim, verdict) for claim, verdict in pairs if verdict is not None]

    def deciding(self) -> list[tuple[Claim, Verdict]]:
        """The measured small claims, the one that comes out worst first."""
        pairs = [(claim, verdict) for claim, verdict in self.counting() if claim.tier == "small"]
        return sorted(pairs, key=lambda pair: _rank(pair[1]))

    def stale(self) -> dict[str, list[str]]:
        """Why verdicts that count are stale, in words, by the claim's name; claims that are not
        stale are left out."""
        if self.paper is None:
            return {}
        reasons_of: dict[str, dict[str, None]] = {}
        for claim in self.small:
            for verdict in self.seeds(claim):
                reasons_of.setdefault(claim.name, {}).update(dict.fromkeys(self.why_stale(verdict)))
        return {name: list(reasons) for name, reasons in reasons_of.items() if reasons}

    def why_stale(self, verdict: Verdict) -> list[str]:
        """Why a verdict is stale, in words; empty where it is not, or where another seed that was
        measured again confirms it."""
        if self.paper is None or not (reasons := code.changed(verdict, self.paper.path)):
            return []
        return [] if confirmed.by(verdict, self.verdicts, self.paper.path) else reasons

    def confirmed(self) -> dict[str, list[int]]:
        """By the claim's name, the seeds whose code has changed and which another seed, measured
        again since, confirms."""
        seeds_of: dict[str, set[int]] = {}
        for claim in self.small if self.paper else ():
            for verdict in self.seeds(claim):
                if code.changed(verdict, self.paper.path) and not self.why_stale(verdict):
                    seeds_of.setdefault(claim.name, set()).add(verdict.seed)
        return {name: sorted(seeds) for name, seeds in seeds_of.items()}

    def superseded(self) -> list[tuple[Verdict, str]]:
        """Verdicts that do not count, oldest first, and why: they stay, the failed ones above
        all."""
        claims = self.paper.claims if self.paper else ()
        counted = [id(verdict) for claim in claims for verdict in self.seeds(claim)]
        others = [verdict for verdict in self.verdicts if id(verdict) not in counted]
        return [
            (verdict, self._why_not(verdict, claims))
            for verdict in sorted(others, key=lambda v: v.date)
        ]

    def _why_not(self, verdict: Verdict, claims: Sequence[Claim]) -> str:
        now = next((claim for claim in claims if verdict.judges(claim)), None)
        if now is None:
            return _words_changed(verdict, claims)
        counts = next(v for v in self.seeds(now) if v.seed == verdict.seed)
        if counts.code == verdict.code:
            return f"run twice on seed {verdict.seed} by the same code: the worse one counts"
        return f"measured again on seed {verdict.seed} on {counts.date[:10]}, by other code"


@dataclass(frozen=True)
class Atlas:
    """Every row as an entry, by key; problems: what could not be read, in sentences; across: files
    of ours that run several papers together, which are no rows."""

    entries: dict[str, Entry]
    problems: list[str] = field(default_factory=list)
    across: dict[str, Entry] = field(default_factory=dict)

    def find(self, key: str) -> Entry:
        """The entry of `key`. Raises ClaimError with the nearest keys when the ledger has none."""
        return self.across[key] if key in self.across else self.entries[row(key).key]

    def built(self) -> list[Entry]:
        """Whatever has a file, level by level; last what runs across papers."""
        order = [*levels(), ACROSS]
        entries = [
            entry for entry in (*self.entries.values(), *self.across.values()) if entry.paper
        ]
        return sorted(entries, key=lambda entry: (order.index(entry.row.level), entry.row.key))

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
    every, problems = verdicts.read(verdicts.places() if folders is None else folders)
    problems += [f"{reason}" for reason in broken.values()]
    problems += [
        f"{paper.path.name}{f' runs across {name}, which' if paper.across else ''} is no paper of "
        f"the ledger. {_nearest(name)}"
        for key, paper in built.items()
        for name in paper.across or (key,)
        if name not in rows()
    ]
    of: dict[str, list[Verdict]] = {}
    for verdict in every:
        of.setdefault(verdict.key, []).append(verdict)
    entries = {
        key: Entry(row, built.get(key), tuple(of.get(key, ()))) for key, row in rows().items()
    }
    across = {
        key: Entry(_row_of(paper), paper, tuple(of.get(key, ())))
        for key, paper in built.items()
        if paper.across
    }
    return Atlas(entries, problems, across)


def _row_of(paper: Paper) -> Row:
    """What stands for a row of the ledger for a file of ours that runs several papers together."""
    keys = ", ".join(paper.across)
    return Row(0, paper.key, paper.title, paper.year, ACROSS, ACROSS, keys, paper.claim, "", "", "")


def _word(verdict: Verdict | None) -> str:
    return verdict.status if verdict else NOT_RUN


def _rank(verdict: Verdict) -> int:
    return WORST_FIRST.index(verdict.status)


def _words_changed(verdict: Verdict, claims: Sequence[Claim]) -> str:
    named = [claim for claim in claims if claim.name == verdict.claim]
    if not named:
        return "the claim is no longer in the file"
    now = next((claim for claim in named if claim.subject == verdict.subject), named[0])
    if now.subject != verdict.subject or now.tier != verdict.tier:
        return f"the claim is about another subject now than {verdict.subject}"
    changed = [
        f"{word} was {f'`{was}`' if was else 'not asked'}"
        for word in ("expect", "direction", "valid", "we_expect")
        if (was := getattr(verdict, word)) != getattr(now, word)
    ]
    changed += [f"n was {verdict.wanted}"] if verdict.wanted and verdict.wanted != now.n else []
    return f"the words changed after the measurement: {', '.join(changed)}"


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
