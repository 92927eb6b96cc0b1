"""Run a claim: import its paper file, measure, judge. What is kept of it, and where, is
`verdicts.append`'s."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from stratoscope import catalogue
from stratoscope.claims import code, figure, register
from stratoscope.claims.claim import Claim
from stratoscope.claims.measured import Measured
from stratoscope.claims.paper import Paper
from stratoscope.claims.verdict import Judgement, Verdict, judge, refused
from stratoscope.errors import ClaimError, InputError

if TYPE_CHECKING:
    from stratoscope.models import LM

PACKAGES = ("stratoscope", "torch", "transformers")


def run(paper: Paper, claim: Claim, seed: int = 0, lm: LM | None = None) -> Verdict:
    """Measure one claim of `paper` and judge it; nothing is written.

    A small claim whose measure refuses this model or its material (InputError: too few heads are
    left to draw a null from, a probe reads below chance) is `no test`, for the reason it gives.
    Whatever else the measurement raises goes through.

    lm: the model of a claim on any model; loaded by the claim's subject if it is not given. Raises
    ClaimError when the file runs differently than it reads, or gives something else than a
    Measured.
    """
    function = functions(paper).get(claim.name)
    stated = [replace(one, subject=claim.subject) for one in getattr(function, "claims", ())]
    if function is None or claim not in (stated if claim.any_model else function.claims):
        raise ClaimError(
            f"{paper.path.name} says one thing about {claim.name} and runs another: mark it once, "
            "plainly."
        )
    given = ((lm or _loaded(claim.subject)), seed) if claim.any_model else (seed,)
    began = time.perf_counter()
    try:
        measured = function(*given)
    except InputError as refusal:
        if claim.tier == "identity":
            raise
        return _verdict(paper, claim, seed, began, refused(str(refusal)))
    if not isinstance(measured, Measured):
        raise ClaimError(
            f"Claim {claim.name} of {paper.key} gave {type(measured).__name__}; it must give "
            "Measured(...)."
        )
    if stray := sorted(measured.null.keys() ^ claim.null.keys()):
        raise ClaimError(
            f"Claim {claim.name} tells of the nulls {sorted(claim.null)} and measured "
            f"{sorted(measured.null)}: {stray} is only in one of them."
        )
    judged = judge(claim, measured.numbers, int(measured.n), claim.least)
    return _verdict(paper, claim, seed, began, judged, measured)


def _verdict(
    paper: Paper,
    claim: Claim,
    seed: int,
    began: float,
    judged: Judgement,
    measured: Measured | None = None,
) -> Verdict:
    """What was found, with all that it was measured with; without numbers where the measure was
    refused. began: by `time.perf_counter`."""
    numbers: dict[str, Any] = {"values": {}, "null": {}, "interval": {}, "n": 0}
    if measured is not None:
        numbers = {name: getattr(measured, name) for name in (*numbers, "draws", "units", "note")}
        drawn = measured.figure
        numbers["figure"] = None if drawn is None else figure.encode(drawn)
    return Verdict(
        key=paper.key,
        claim=claim.name,
        tier=claim.tier,
        subject=claim.subject,
        status=judged.status,
        why=judged.why,
        added=judged.added,
        form=2,
        expect=claim.expect,
        direction=claim.direction,
        valid=claim.valid,
        we_expect=claim.we_expect,
        wanted=claim.n,
        seed=seed,
        seconds=round(time.perf_counter() - began, 3),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        versions={name: version(name) for name in PACKAGES},
        code={**code.loaded(), code.CLAIM: code.of_claim(paper.path, claim.name)},
        commit=code.commit(),
        machine=code.machine(),
        registered=register.beforehand(paper, claim, seed),
        **numbers,
    )


@cache
def _loaded(name: str) -> LM:
    """The model of that name: once in a process, as a paper's claims share it and leave it as it
    was."""
    import stratoscope.models as models

    return models.load(name)


def functions(paper: Paper) -> dict[str, Callable[..., Any]]:
    """The marked functions of a paper file, by name; the file is imported. Its own errors go
    through."""
    module = _module(paper)
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(getattr(value, "claims", None), tuple)
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
