"""Run a claim: import its paper file, measure, judge. What is kept of it, and where, is
`verdicts.append`'s."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from types import ModuleType
from typing import Any

from stratoscope import catalogue
from stratoscope.claims import code, figure
from stratoscope.claims.claim import Claim, Measured, Verdict, judge
from stratoscope.claims.paper import Paper
from stratoscope.errors import ClaimError

PACKAGES = ("stratoscope", "torch", "transformers")


def run(paper: Paper, claim: Claim, seed: int = 0) -> Verdict:
    """Measure one claim of `paper` and judge it; nothing is written. Whatever the measurement
    raises goes through.

    Raises ClaimError when the file runs differently than it reads, or gives something else than a
    Measured.
    """
    function = functions(paper).get(claim.name)
    if function is None or getattr(function, "claim", None) != claim:
        raise ClaimError(
            f"{paper.path.name} says one thing about {claim.name} and runs another: mark it once, "
            "plainly."
        )
    began = time.perf_counter()
    measured = function(seed)
    seconds = time.perf_counter() - began
    if not isinstance(measured, Measured):
        raise ClaimError(
            f"Claim {claim.name} of {paper.key} gave {type(measured).__name__}; it must give "
            "Measured(...)."
        )
    return Verdict(
        key=paper.key,
        claim=claim.name,
        tier=claim.tier,
        subject=claim.subject,
        status=judge(claim, measured),
        expect=claim.expect,
        direction=claim.direction,
        values=measured.values,
        null=measured.null,
        interval=measured.interval,
        n=int(measured.n),
        seed=seed,
        seconds=round(seconds, 3),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        versions={name: version(name) for name in PACKAGES},
        figure=None if measured.figure is None else figure.encode(measured.figure),
        note=measured.note,
        code={**code.loaded(), code.CLAIM: code.of_claim(paper.path, claim.name)},
        commit=code.commit(),
        machine=code.machine(),
    )


def functions(paper: Paper) -> dict[str, Callable[[int], Any]]:
    """The marked functions of a paper file, by name; the file is imported. Its own errors go
    through."""
    module = _module(paper)
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(getattr(value, "claim", None), Claim)
    }


def _module(paper: Paper) -> ModuleType:
    if paper.path.parent == catalogue.ROOT / "papers":
        return importlib.import_module(f"stratoscope.papers.{paper.path.stem}")
    name = f"papers_of_{paper.path.parent.name}.{paper.path.stem}"  # a folder of the user's own
    spec = importlib.util.spec_from_file_location(name, paper.path)
    if spec is None or spec.loader is None:
        raise ClaimError(f"{paper.path} cannot be imported: it is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
