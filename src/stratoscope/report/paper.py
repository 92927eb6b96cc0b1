"""One paper as one HTML page: what it says, what was expected, what was measured, its figures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from stratoscope import catalogue
from stratoscope.claims import draw, figure, words
from stratoscope.claims.claim import Claim
from stratoscope.claims.draw import short
from stratoscope.claims.ledger import Entry
from stratoscope.claims.verdict import Verdict
from stratoscope.errors import ClaimError, ResultError
from stratoscope.report import sheet
from stratoscope.report.sheet import Panel, panel


def render(entry: Entry) -> str:
    """The page of one entry of the ledger, built or not."""
    known = {method.address: method.summary for method in catalogue.methods()}
    claims = (
        sorted(entry.paper.claims, key=lambda claim: claim.tier == "identity")
        if entry.paper
        else []
    )
    others = [pair for pair in entry.superseded() if pair[0].tier != "identity"]
    return sheet.render(
        "paper.html",
        entry=entry,
        row=entry.row,
        paper=entry.paper,
        title=entry.paper.title if entry.paper else entry.row.title,
        methods=[(name, known.get(name, "")) for name in entry.paper.methods]
        if entry.paper
        else [],
        found=words.found(entry.words) if entry.paper else entry.status,
        rule=words.RULE,
        notes=[
            f"A verdict on {v.claim} ({v.status}, {v.date[:10]}, seed {v.seed}) does not count: "
            f"{why}."
            for v, why in others
        ],
        claims=[_claim(claim, entry.verdict(claim)) for claim in claims],
    )


def write(entry: Entry, path: str | os.PathLike[str]) -> Path:
    """Render and write. Raises ResultError when the file cannot be written."""
    return sheet.write(render(entry), path)


def decided(entry: Entry) -> dict[str, Any]:
    """The verdict that decides an entry's word, as a section of another page shows it."""
    claim, verdict = entry.deciding()[0]
    return {"paper": entry.paper, "claim": claim, "verdict": verdict, "panel": _panel(verdict)}


def _claim(claim: Claim, verdict: Verdict | None) -> dict[str, Any]:
    numbers = []
    for name, value in {**verdict.values, **verdict.null}.items() if verdict else ():
        around = (
            " to ".join(map(short, verdict.interval[name]))
            if verdict and name in verdict.interval
            else ""
        )
        numbers.append(
            (name.replace("_", " "), short(value), around, bool(verdict and name in verdict.null))
        )
    return {
        "claim": claim,
        "verdict": verdict,
        "numbers": numbers,
        "panel": _panel(verdict) if verdict else None,
    }


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
