"""The whole atlas as one HTML page: every paper, a matrix of papers and models, effects beside the
papers' own. It is whole without JavaScript; the script only hides what a filter leaves out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from stratoscope.claims import atlas
from stratoscope.claims.draw import short
from stratoscope.claims.words import NOT_BUILT
from stratoscope.report import sheet

SIGNS = {
    "reproduced": "●", "direction only": "◐", "not reproduced": "○", "no test": "–",
    "mechanism only": "◇", "built, not run": "·", "not built": "",
}  # fmt: skip
LOW, HIGH = -0.5, 2.0  # of the paper's own effect: what lies beyond stands at the edge
HERE = Path(__file__).parent


def render(data: dict[str, Any]) -> str:
    """The page of what `claims.atlas.data` gives."""
    subjects = atlas.subjects(data)
    order = {level: number for number, level in enumerate(data["levels"])}
    papers = sorted(data["papers"], key=lambda p: (not p["built"], order[p["level"]], p["key"]))
    return sheet.render(
        "atlas.html",
        atlas=data,
        papers=papers,
        across=[p for p in papers if p.get("across")],
        subjects=subjects,
        matrix=[(p, atlas.matrix(p, subjects)) for p in papers if p["built"]],
        effects=[_drawn(effect) for effect in atlas.effects(data)],
        signs=SIGNS,
        short=short,
        nulls=sorted({_words(n) for p in papers for c in p["claims"] for n in c["null"]}),
        places=sorted({c["subject"] for p in papers for c in p["claims"]}),
        years=(min(p["year"] for p in papers), max(p["year"] for p in papers)),
        data=json.dumps([searched(paper) for paper in papers], ensure_ascii=False),
        own_css=(HERE / "atlas.css").read_text(encoding="utf-8"),
        own_js=(HERE / "atlas.js").read_text(encoding="utf-8"),
    )


def write(data: dict[str, Any], path: str | os.PathLike[str]) -> Path:
    """Render and write. Raises ResultError when the file cannot be written."""
    return sheet.write(render(data), path)


def searched(paper: dict[str, Any]) -> dict[str, Any]:
    """What the filters of the page ask of a paper; seconds: of the dearest seed, -1 if never."""
    claims = [
        {
            "subject": claim["subject"],
            "seconds": max((v["seconds"] for v in claim["verdicts"]), default=-1),
            "nulls": " ".join(_words(name) for name in claim["null"]),
        }
        for claim in paper["claims"]
    ]
    texts = [paper["key"], paper["title"], paper.get("source", ""), paper.get("says", "")]
    texts += paper.get("methods", []) + [claim["says"] for claim in paper["claims"]]
    marked = [paper["status"], paper.get("mechanism", "")]
    return {
        "key": paper["key"],
        "text": " ".join(dict.fromkeys(texts)).casefold(),
        "level": paper["level"],
        "year": paper["year"],
        "words": [word for word in marked if word] if paper["built"] else [NOT_BUILT],
        "claims": claims,
    }


def _drawn(effect: dict[str, Any]) -> dict[str, Any]:
    """Where the dots and intervals of its seeds stand, in hundredths of the axis."""
    at = lambda share: 100 * (min(max(share, LOW), HIGH) - LOW) / (HIGH - LOW)  # noqa: E731
    runs = [
        {
            "x": at(run["share"]),
            "line": [at(end) for end in run["ends"]],
            "beyond": not LOW <= run["share"] <= HIGH,
        }
        for run in effect["runs"]
    ]
    here = ", ".join(dict.fromkeys(short(run["value"]) for run in effect["runs"]))
    seeds = ", ".join(str(run["seed"]) for run in effect["runs"])
    return effect | {
        "runs": runs,
        "seeds": f"{'seeds' if len(runs) > 1 else 'seed'} {seeds}",
        "told": f"{here} here, {short(effect['there'])} in the paper",
        "shares": ", ".join(f"{run['share']:.2f}" for run in effect["runs"]),
    }


def _words(name: str) -> str:
    return name.replace("_", " ")
