"""One paper as one HTML page: what it says, what was expected, what was measured, its figures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stratoscope import catalogue
from stratoscope.claims import draw, figure, statement, words
from stratoscope.claims.claim import Claim
from stratoscope.claims.draw import short
from stratoscope.claims.ledger import Entry
from stratoscope.claims.paper import MIND, OBJECT, Paper
from stratoscope.claims.verdict import Verdict
from stratoscope.errors import ClaimError, ResultError
from stratoscope.report import sheet
from stratoscope.report.sheet import Panel, panel


def render(entry: Entry) -> str:
    """The page of one entry of the ledger, built or not."""
    known = {method.address: method.summary for method in catalogue.methods()}
    paper = entry.paper
    small = (
        [claims for claims in paper.statements() if claims[0].tier != "identity"] if paper else []
    )
    return sheet.render(
        "paper.html",
        entry=entry,
        row=entry.row,
        paper=paper,
        title=paper.title if paper else entry.row.title,
        methods=[(name, known.get(name, "")) for name in paper.methods] if paper else [],
        found=words.sentence(entry.words) if paper else entry.status,
        marks=words.marks(entry.small, [v for claim in entry.small for v in entry.seeds(claim)]),
        rule=words.RULE,
        stale=entry.stale(),
        notes=[
            f"{v.claim} on {v.subject}, seed {v.seed}, {v.date[:10]}: {v.status}; {why}."
            for v, why in entry.superseded()
            if v.tier != "identity"
        ],
        statements=_statements(entry, paper, small) if paper else [],
        known=[c for c in paper.claims if c.tier == "identity"] if paper else [],
        said={
            MIND: paper.would_change, OBJECT: paper.may_object,
            "On the paper's own models": paper.protocol,
        }
        if paper
        else {},
    )  # fmt: skip


def write(entry: Entry, path: str | os.PathLike[str]) -> Path:
    """Render and write. Raises ResultError when the file cannot be written."""
    return sheet.write(render(entry), path)


def decided(entry: Entry) -> dict[str, Any]:
    """The verdict that decides an entry's word, as a section of another page shows it."""
    claim, verdict = entry.deciding()[0]
    return {"paper": entry.paper, "claim": claim, "verdict": verdict, "panel": _panel(verdict)}


def _statements(
    entry: Entry, paper: Paper, small: Sequence[Sequence[Claim]]
) -> list[dict[str, Any]]:
    """Each statement with its picture and the verdicts that count; no picture twice."""
    pictures: dict[str, str] = {}
    shown_claims = []
    for claims in small:
        title, details = statement.title_of(paper, claims), []
        for verdict in filter(None, map(entry.verdict, claims)):
            drawn = statement.figure_of(verdict, title) if verdict.figure else ""
            details.append(
                {
                    "verdict": verdict,
                    "numbers": _numbers(verdict),
                    "image": sheet.image(drawn) if drawn and drawn not in pictures else "",
                    "under": pictures.get(drawn, ""),
                }
            )
            pictures.setdefault(drawn, title)
        forest = statement.forest_of(entry, claims)
        rows = [(one, sorted(entry.seeds(one), key=lambda v: v.seed)) for one in claims]
        shown = {"claim": claims[0], "title": title, "rows": rows, "details": details}
        shown_claims.append(shown | {"forest": sheet.image(forest) if forest else ""})
    return shown_claims


def _numbers(verdict: Verdict) -> list[tuple[str, str, str, bool]]:
    """Name, value, interval or draws, and whether it belongs to the null."""
    rows = []
    for name, value in {**verdict.values, **verdict.null}.items():
        around = " to ".join(map(short, verdict.interval[name])) if name in verdict.interval else ""
        around = f"{len(verdict.draws[name])} draws" if name in verdict.draws else around
        rows.append((name.replace("_", " "), short(value), around, name in verdict.null))
    return rows


def _panel(verdict: Verdict) -> Panel | None:
    """The verdict's figure; None where there is none, or none that can be read: a number is then
    still there."""
    if not verdict.figure:
        return None
    try:
        drawn = figure.drawing(figure.decode(verdict.figure))
        return panel(draw.plotly(drawn, verdict.null), drawn.title, width=320)
    except (ClaimError, ResultError):
        return None
