"""The one-file HTML report of one explained prediction: every picture, its null, its reading and
its limits.

`Explanation` holds what was computed; `sections` picks the results, draws them with `plots` and
says in a sentence what they show (`words`); `page.html` holds the words that never change (how to
read, what it does not show). A result that is missing is said to be missing. The page needs no
network: plotly.js is in it once, and its content security policy forbids every request. All text of
the model or the user is escaped: HTML by jinja's autoescape, figure labels by `plots.text.plain`,
and figure data by writing `<` as `\\u003c`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from stratoscope import catalogue
from stratoscope.claims import ledger
from stratoscope.report import paper, sheet, words
from stratoscope.report.explanation import LEFT_OUT, RESULTS, Explanation
from stratoscope.report.section import missing, spaced
from stratoscope.report.sections import SECTIONS, TITLES, section_of

__all__ = ["RESULTS", "Explanation", "render", "write"]


def render(explanation: Explanation) -> str:
    """The whole report as one HTML text that makes no request when it is opened."""
    return sheet.render(
        "page.html",
        e=explanation,
        **headline(explanation),
        titles=[*TITLES.items()],
        sections={
            name: section_of(explanation, name) for name in SECTIONS if shown(explanation, name)
        },
        left_out=[
            missing(explanation, key)
            for name, (keys, _) in SECTIONS.items()
            if not shown(explanation, name)
            for key in keys
        ],
        papers=papers(explanation),
        facts=_facts(explanation.provenance),
        ran_on=words.ran_on(explanation.provenance),
    )


def write(explanation: Explanation, path: str | os.PathLike[str]) -> Path:
    """Render and write; the file is complete or not there at all, whatever interrupts the writing.

    Raises ResultError when the file cannot be written.
    """
    return sheet.write(render(explanation), path)


def shown(e: Explanation, section: str) -> bool:
    """Nothing stands where nothing was asked for: a circuit, which is found on demand, and what
    was left out."""
    keys = SECTIONS[section][0]
    if section in ("prediction", "circuit"):
        return section == "prediction" or "circuits.discover" in {*e.results, *e.missing}
    return not all(e.missing.get(key) == LEFT_OUT for key in keys)


@cache
def _atlas() -> ledger.Atlas:
    """Read once: an unfinished report is drawn again and again."""
    return ledger.atlas()


def papers(e: Explanation) -> dict[str, list[dict[str, Any]]]:
    """For each section the papers of its methods that have a verdict: the one that decides, with
    its figure."""
    atlas, methods = _atlas(), {entry.address: entry for entry in catalogue.methods()}
    by_name: dict[str, list[dict[str, Any]]] = {}
    for name, (keys, _) in SECTIONS.items():
        # the words are of that map
        shown = (*keys, "tokens.verbalize") if name == "tokens" else keys
        names = (methods[key].paper for key in shown if key in e.results and key in methods)
        entries = [atlas.entries[key] for key in dict.fromkeys(names) if key in atlas.entries]
        by_name[name] = [paper.decided(entry) for entry in entries if entry.deciding()]
    return by_name


def headline(e: Explanation) -> dict[str, Any]:
    """What `head.html` takes beside the explanation."""
    chances = {which: _chance(e, which) for which in ("answer", "foil")}
    return {"chances": chances, "summary": _summary(e), "pending": False}


def _chance(e: Explanation, which: str) -> float | None:
    given = getattr(e, f"{which}_probability")
    return given if given is not None else dict(e.predictions).get(getattr(e, which))


def _summary(e: Explanation) -> str:
    verbal = e.one("tokens.verbalize")
    return str(verbal["text"].item()) if verbal is not None else ""


def _facts(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The provenance as rows; what the page shows elsewhere (command, seconds by step) is left
    out."""
    rows = []
    for name, value in provenance.items():
        if name in ("command", "seconds_by_step"):
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif name == "seconds":
            value = f"{value:,.1f}"
        elif name == "peak_memory_mb":
            name, value = "peak memory", f"{value:,.0f} MB"
        rows.append((spaced(name), str(value)))
    return rows
