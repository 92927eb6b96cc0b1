"""A verdict whose code has changed is confirmed where another seed, measured again since, gave the
very numbers that it gave before.

Every change of the engine makes every verdict stale, whether or not any number moves. Three seeds
of a claim were measured by one code; if one of them is measured by today's and each of its numbers
is the same to a thousandth, the change did not touch what the claim measures, and the other two
stand. Nothing is recorded for it: it is read off the verdicts, the superseded ones among them. A
claim whose own body changed is never confirmed, nor one that measures time, whose numbers differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from stratoscope.claims import code
from stratoscope.claims.verdict import Verdict

SAME = 1e-3  # of a number, between two runs of one seed
ZERO = 1e-6  # below this a number is rounding


def by(verdict: Verdict, others: Iterable[Verdict], path: Path) -> Verdict | None:
    """The newer run of another seed that confirms a stale verdict, or None. others: all verdicts
    about the same claim. path: the paper's file."""
    here = [v for v in others if (v.claim, v.subject) == (verdict.claim, verdict.subject)]
    again = (
        now
        for before in here
        if (before.code, before.versions) == (verdict.code, verdict.versions)
        and before.seed != verdict.seed
        for now in here
        if now.seed == before.seed and now.code != before.code and same(before, now)
    )
    return next((now for now in again if _stands(verdict, now, path)), None)


def _stands(verdict: Verdict, now: Verdict, path: Path) -> bool:
    """Whether the claim itself is as it was, and the newer run is of today's code."""
    own = verdict.code.get(code.CLAIM)
    return own == code.of_claim(path, verdict.claim) and not code.changed(now, path)


def same(before: Verdict, now: Verdict) -> bool:
    """Whether two runs gave the same numbers: values, nulls, intervals, draws and units."""
    if (before.n, before.status) != (now.n, now.status):
        return False
    one, two = dict(_numbers(before)), dict(_numbers(now))
    return one.keys() == two.keys() and all(_close(one[name], two[name]) for name in one)


def _close(a: float, b: float) -> bool:
    return (a != a and b != b) or math.isclose(a, b, rel_tol=SAME, abs_tol=ZERO)


def _numbers(verdict: Verdict) -> Iterator[tuple[str, float]]:
    tables: tuple[Mapping, ...] = (
        verdict.values,
        verdict.null,
        verdict.interval,
        verdict.draws,
        verdict.units,
    )
    for number, table in enumerate(tables):
        for name, value in table.items():
            for place, one in enumerate(value if isinstance(value, (tuple, list)) else [value]):
                yield f"{number} {name} {place}", float(one)
