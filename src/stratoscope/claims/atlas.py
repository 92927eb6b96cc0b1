"""The whole atlas as data: every paper, claim and verdict, as `atlas.json` keeps it.

    {"schema": 1, "commit", "rule", "statuses", "levels", "counts": {status: n}, "papers": [...]}
    paper    key title year level source arxiv says across methods built status real mechanism held
             tested date unsaid marks {mark: {good, why}} stale {claim: [reasons]} claims superseded
    claim    name, the words of `Claim`, shown (the number that is drawn), word, verdicts
    verdict  the fields of `Verdict` but key and figure; `registered` is "" where it was exploratory

Numbers that JSON has no sign for (NaN, infinities) are text, as in the verdict files. The schema's
number grows when a name here changes its meaning or goes; names may be added.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stratoscope.claims import code, forest, ledger, verdicts, words
from stratoscope.claims.claim import MINIATURE, Claim
from stratoscope.claims.ledger import Atlas, Entry
from stratoscope.claims.verdict import Verdict
from stratoscope.claims.words import NOT_RUN
from stratoscope.errors import ClaimError

SCHEMA = 1
MINIATURES = "miniatures"  # the column of all of them in the matrix
TOGETHER = "several together"  # and of claims about what lies between models


def data(atlas: Atlas) -> dict[str, Any]:
    """All of it, in plain JSON; papers in the order of the ledger, and last what runs across."""
    entries = [*atlas.entries.values(), *atlas.across.values()]
    counted = Counter(entry.status for entry in atlas.entries.values())
    return {
        "schema": SCHEMA,
        "commit": code.commit(),
        "rule": words.RULE,
        "statuses": list(words.STATUSES),
        "levels": [*ledger.levels(), ledger.ACROSS],
        "counts": {status: counted[status] for status in words.STATUSES if counted[status]},
        "papers": [_paper(entry) for entry in entries],
    }


def write(data: dict[str, Any], path: Path) -> Path:
    """Write `data`'s as a JSON file. Raises ClaimError when it cannot be written."""
    try:
        path.write_text(json.dumps(data, ensure_ascii=False, indent=1), encoding="utf-8")
    except OSError as error:
        raise ClaimError(f"{path} cannot be written: {error.strerror or error}.") from error
    return path


def matrix(paper: dict[str, Any], subjects: Sequence[str]) -> list[str]:
    """The word of a paper on each subject, the worst of its statements; "" where none is about it.

    The column `MINIATURES` holds all that are no real models, `TOGETHER` what is measured between
    several models.
    """
    by_column: dict[str, list[str]] = {}
    for claim in paper["claims"]:
        if claim["tier"] == "small":
            by_column.setdefault(_column(claim), []).append(claim["word"])
    return [words.worst(by_column.get(subject, ())) for subject in subjects]


def subjects(data: dict[str, Any]) -> list[str]:
    """The columns of the matrix: real models, those of most papers first, then those measured
    together, then miniatures."""
    claims = [c for p in data["papers"] for c in p["claims"] if c["tier"] == "small"]
    columns = Counter(_column(claim) for claim in claims)
    last = [name for name in (TOGETHER, MINIATURES) if columns.pop(name, 0)]
    return [name for name, _ in columns.most_common()] + last


def _column(claim: dict[str, Any]) -> str:
    if claim["kind"] == MINIATURE:
        return MINIATURES
    return TOGETHER if " " in claim["subject"] else claim["subject"]


def effects(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What was measured beside the paper's own number, wherever there are both: one a number of a
    claim, with a run for each seed.

    share: measured / the paper's, with the ends of its interval; numbers whose own value is 0 have
    no share and are left out.
    """
    for paper in data["papers"]:
        for claim in paper["claims"]:
            for name, there in claim["found_there"].items():
                runs = [_run(verdict, name, there) for verdict in claim["verdicts"] if there]
                runs = [run for run in runs if run is not None]
                if runs:
                    yield {
                        "key": paper["key"],
                        "title": paper["title"],
                        "says": claim["says"],
                        "subject": claim["subject"],
                        "name": name.replace("_", " "),
                        "word": claim["word"],
                        "there": there,
                        "runs": runs,
                    }


def _run(verdict: dict[str, Any], name: str, there: float) -> dict[str, Any] | None:
    value = verdict["values"].get(name, "")
    if isinstance(value, str):
        return None
    low, high = verdict["interval"].get(name, ("", ""))
    ends = [] if isinstance(low, str) or isinstance(high, str) else [low, high]
    shares = sorted(end / there for end in ends)
    return {"seed": verdict["seed"], "value": value, "share": value / there, "ends": shares}


def _paper(entry: Entry) -> dict[str, Any]:
    row, paper, paper_words = entry.row, entry.paper, entry.words
    data: dict[str, Any] = {
        "key": row.key,
        "title": paper.title if paper else row.title,
        "year": row.year,
        "level": row.level,
        "to_check": row.claim_check,
        "built": paper is not None,
        "status": entry.status,
        "claims": [],
        "superseded": [],
    }
    if paper is None:
        return data
    marks = words.marks(entry.small, [v for claim in entry.small for v in entry.seeds(claim)])
    return data | {
        "source": paper.source,
        "arxiv": paper.arxiv,
        "says": paper.claim,
        "across": list(paper.across),
        "methods": list(paper.methods),
        "real": paper_words.real,
        "mechanism": paper_words.mechanism,
        "held": paper_words.held,
        "tested": paper_words.tested,
        "date": entry.date,
        "unsaid": paper.unsaid,
        "would_change": paper.would_change,
        "may_object": paper.may_object,
        "protocol": paper.protocol,
        "marks": {name: {"good": good, "why": why} for name, (good, why) in marks.items()},
        "stale": entry.stale(),
        "claims": [_claim(entry, claim) for claim in paper.claims],
        "superseded": [_verdict(v) | {"why_not": why} for v, why in entry.superseded()],
    }


def _claim(entry: Entry, claim: Claim) -> dict[str, Any]:
    seeds = sorted(entry.seeds(claim), key=lambda verdict: verdict.seed)
    counts = entry.verdict(claim)
    return _plain(dataclasses.asdict(claim)) | {
        "shown": forest.shown(claim),
        "word": counts.status if counts else NOT_RUN,
        "verdicts": [_verdict(verdict) for verdict in seeds],
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    record = json.loads(verdicts.to_line(verdict))
    return {name: value for name, value in record.items() if name not in ("key", "figure")}


def _plain(words_of: dict[str, Any]) -> dict[str, Any]:
    there = {k: v for k, v in words_of["found_there"].items() if math.isfinite(v)}
    return words_of | {"null": dict(words_of["null"]), "found_there": there}
