"""One picture of one statement: a row for each subject and seed, with what was measured and its
interval, the null in grey, the bar it had to pass and the paper's own number.

The number is the first that the expectation names and that is no null. A null that lies far away is
drawn at the edge, with its number, so that it does not press everything else together.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from stratoscope.claims import expression
from stratoscope.claims.claim import Claim
from stratoscope.claims.draw import COLOURS, GREYS, short
from stratoscope.claims.svg import (
    HEAD,
    LETTER,
    MARGIN,
    ROW,
    WIDTH,
    Pixels,
    path,
    rect,
    sheet,
    text,
    ticks,
)  # fmt: skip
from stratoscope.claims.verdict import Verdict
from stratoscope.plots.text import shorten

WORD = 112  # pixels for the word at the right
TITLE = 86  # letters
FAR = 1.0  # spans of what was measured beyond which a null is drawn at the edge


@dataclass(frozen=True)
class Row:
    """One subject and seed; low, high and null: NaN where there is none."""

    name: str
    value: float
    low: float
    high: float
    null: tuple[float, float]
    word: str


def shown(claim: Claim) -> str:
    """The number that is drawn: the first of the expectation that is no null."""
    tree = ast.walk(expression.parsed(claim.expect))
    places = sorted((n.lineno, n.col_offset, n.id) for n in tree if isinstance(n, ast.Name))
    own = (expression.base(name) for _, _, name in places if name in expression.names(claim.expect))
    return next((name for name in own if name not in claim.null), "")


def svg(claim: Claim, counted: Sequence[Verdict]) -> str:
    """The picture, the same bytes each time; "" where the number was not measured.

    counted: the verdicts that count, of all subjects of the claim's function.
    """
    name = shown(claim)
    rows = [row for verdict in counted if (row := _row(verdict, claim, name))]
    if not rows:
        return ""
    bars, there = _bars(claim, name), claim.found_there.get(name, math.nan)
    low, high = _range(rows, bars, there)
    marks = ticks(low, high)
    left = MARGIN + LETTER * max(len(row.name) for row in rows) + 10
    right, top = WIDTH - MARGIN - WORD, HEAD + 22
    bottom = top + ROW * len(rows)
    x = lambda v: left + (right - left) * (v - marks[0]) / (marks[-1] - marks[0])  # noqa: E731
    parts = [text(MARGIN, 22, shorten(claim.says, TITLE), "b")]
    parts += [text(MARGIN, HEAD + 8, name.replace("_", " "), "m")]
    for mark in marks:
        parts += [path(f"M{x(mark):.1f} {top - 4}V{bottom}", "g")]
        parts += [text(x(mark), bottom + 14, short(mark), "c m")]
    for number, row in enumerate(rows):
        parts += _drawn(row, top + ROW * number, x, (marks[0], marks[-1]))
        parts += [text(left - 10, top + ROW * number + 15, row.name, "e")]
        parts += [text(right + 12, top + ROW * number + 15, row.word, "")]
    parts += [_dashed(x(bar), top - 4, bottom) for bar in bars]
    if math.isfinite(there):
        parts += [_diamond(x(there), top - 6)]
    parts += [text(MARGIN, bottom + 36, _caption(rows, bars, there), "m")]
    return sheet(bottom + 48, parts)


def _row(verdict: Verdict, claim: Claim, name: str) -> Row | None:
    numbers = verdict.numbers
    if name not in numbers or not math.isfinite(numbers[name]):
        return None
    interval = verdict.interval.get(name, (math.nan, math.nan))
    nulls = [value for null in _against(claim, name) for value in _spread(verdict, null)]
    null = (min(nulls), max(nulls)) if nulls else (math.nan, math.nan)
    return Row(
        f"{shorten(verdict.subject, 26)}, seed {verdict.seed}",
        numbers[name],
        *interval,
        null,
        verdict.status,
    )


def _against(claim: Claim, name: str) -> list[str]:
    """The nulls that the expectation compares this number with, in one comparison."""
    named = [expression.names(ast.unparse(part)) for part in expression.parts(claim.expect)]
    beside = [{*map(expression.base, with_null)} for with_null in named]
    return [null for null in claim.null if any({null, name} <= with_null for with_null in beside)]


def _spread(verdict: Verdict, null: str) -> list[float]:
    """The null's draws, or its interval, or the number alone."""
    if null in verdict.draws:
        return list(verdict.draws[null])
    if null in verdict.interval:
        return list(verdict.interval[null])
    return [verdict.null[null]] if math.isfinite(verdict.null.get(null, math.nan)) else []


def _bars(claim: Claim, name: str) -> list[float]:
    """The numbers that the expectation compares this one with."""
    bars = []
    for part in expression.parts(claim.expect):
        sides = [part.left, *part.comparators] if isinstance(part, ast.Compare) else []
        named = [s for s in sides if isinstance(s, ast.Name) and expression.base(s.id) == name]
        if named and len(sides) == 2:
            bars += [float(s.value) for s in sides if isinstance(s, ast.Constant)]
    return bars


def _range(rows: Sequence[Row], bars: Sequence[float], there: float) -> tuple[float, float]:
    own = [v for row in rows for v in (row.value, row.low, row.high)]
    inside = [v for v in (*own, *bars, there) if math.isfinite(v)]
    low, high = min(inside), max(inside)
    span = (high - low) or abs(high) or 1.0
    near = [v for row in rows for v in row.null if math.isfinite(v)]
    near = [min(max(v, low - FAR * span), high + FAR * span) for v in near]
    return min(low, *near, low), max(high, *near, high)


def _drawn(
    row: Row, y: Pixels, x: Callable[[float], float], ends: tuple[float, float]
) -> Iterator[str]:
    """Null, interval and value of one row."""
    low, high = (min(max(v, ends[0]), ends[1]) for v in row.null)
    if math.isfinite(low):
        yield rect(x(low) - 1.5, y + 3, x(high) - x(low) + 3, 16, GREYS[1])
        far = [v for v in row.null if v != min(max(v, ends[0]), ends[1])]
        if far:
            side = "e" if far[-1] > ends[1] else ""
            at = x(ends[1]) - 6 if side else x(ends[0]) + 6
            yield text(at, y + 15, f"null {short(far[-1])}", f"{side} m".strip(), 10)
    if math.isfinite(row.low) and math.isfinite(row.high):
        yield rect(x(row.low), y + 10, x(row.high) - x(row.low), 2, COLOURS[0])
    dot = f"M{x(row.value) - 4:.1f} {y + 11}a4 4 0 1 0 8 0a4 4 0 1 0-8 0"
    yield f'<path fill="{COLOURS[0]}" d="{dot}"/>'


def _dashed(x: Pixels, top: Pixels, bottom: Pixels) -> str:
    return f'<path class="a" stroke-dasharray="4 3" d="M{x:.1f} {top}V{bottom}"/>'


def _diamond(x: Pixels, y: Pixels) -> str:
    return f'<path fill="{COLOURS[1]}" d="M{x:.1f} {y - 5}l5 5l-5 5l-5-5z"/>'


def _caption(rows: Sequence[Row], bars: Sequence[float], there: float) -> str:
    parts = ["dot: measured"]
    parts += ["line: 95 % interval"] if any(math.isfinite(row.low) for row in rows) else []
    parts += ["grey: the null"] if any(math.isfinite(row.null[0]) for row in rows) else []
    parts += [f"dashed: the bar, {', '.join(map(short, bars))}"] if bars else []
    parts += [f"diamond: the paper, {short(there)}"] if math.isfinite(there) else []
    return "; ".join(parts)
