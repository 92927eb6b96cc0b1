"""A claim's figure three times: as text for a terminal, as SVG for the pages, as plotly for a
report.

`null` names the series or places that belong to the null: they are grey wherever there are colours,
and so is what says of itself that it is shuffled, untrained, chance or a null.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from stratoscope.claims import svg as written
from stratoscope.claims.figure import Drawing
from stratoscope.plots import bars, heatmap, lines, theme
from stratoscope.plots.text import plain, scientific

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from rich.text import Text

COLOURS = (theme.AGAINST, theme.TOWARDS, *theme.SERIES[:2], "#5b3f1a", "#55bfd0")
GREYS = (theme.NEUTRAL, "#bfc4cc")
_EIGHTHS, _SHADES, _BELOW = " ▁▂▃▄▅▆▇█", " ░▒▓█", " -=≡#"  # _BELOW: as _SHADES, below zero
_LEFT = " ▏▎▍▌▋▊▉█"


def short(value: float) -> str:
    """A measured number with the digits that matter: 0.0213, 4.57, 1,234, 2.1 × 10⁻⁶, and a dash
    for NaN."""
    if 1e-3 <= abs(value) < 0.1 or 1000 <= abs(value) < 1e6:
        return f"{value:{'.3g' if abs(value) < 1 else ',.0f'}}".replace("-", "−")
    return scientific(value)


def colours(drawing: Drawing, null: Collection[str] = ()) -> list[str]:
    """One colour for each series, or for each place where there is only one series of bars."""
    names = (
        drawing.places
        if drawing.kind == "bars" and len(drawing.series) == 1
        else list(drawing.series)
    )
    spread = drawing.kind == "lines" or len(drawing.series) > 1
    if not spread:
        return [GREYS[0] if _is_null(name, null) else COLOURS[0] for name in names]
    free, greys = iter(COLOURS * len(names)), iter(GREYS * len(names))
    return [next(greys) if _is_null(name, null) else next(free) for name in names]


def _is_null(name: str, null: Collection[str]) -> bool:
    words = [word.replace("_", " ") for word in (*null, "null", "shuffled", "untrained", "chance")]
    alone = name.casefold() == "random"  # but "random labels" may be what was studied
    return alone or any(re.search(rf"\b{re.escape(word)}\b", name, re.IGNORECASE) for word in words)


# in a terminal ------------------------------------------------------------------------------------


def terminal(drawing: Drawing, width: int = 80, null: Collection[str] = ()) -> Text:
    """The figure in at most `width` columns."""
    from rich.text import Text

    text = Text(drawing.title, style="bold", no_wrap=True)
    if drawing.unit != drawing.title:
        text.append(f"  ({drawing.unit})", style="dim not bold")
    kind = {"bars": _text_bars, "lines": _text_columns, "cells": _text_cells}[drawing.kind]
    for line, colour in kind(drawing, width, colours(drawing, null)):
        text.append("\n" + line.rstrip(), style=f"not bold {colour}" if colour else "not bold")
    text.truncate(max(width, 1) * 10**6)
    return text


def _text_bars(drawing: Drawing, width: int, colour: Sequence[str]) -> list[tuple[str, str]]:
    low, high = drawing.range
    span, several = (high - low) or 1.0, len(drawing.series) > 1
    label = max(map(len, drawing.places))
    name = max(map(len, drawing.series)) + 2 if several else 0
    room = max(width - label - name - 16, 10)
    zero, out = round(room * -min(low, 0.0) / span), []
    for i, place in enumerate(drawing.places):
        for j, (series, values) in enumerate(drawing.series.items()):
            value, size = values[i], 0.0
            if math.isfinite(value):
                size = abs(value) / span * room
            if value < 0:
                bar = " " * (zero - round(size)) + "█" * round(size) + "│"
            else:
                whole = int(size)
                bar = (
                    " " * zero
                    + ("│" if low < 0 else "")
                    + "█" * whole
                    + _LEFT[int((size - whole) * 8)].strip()
                )
            head = f"  {place if j == 0 else '':<{label}}  " + (
                f"{series:<{name}}" if several else ""
            )
            out.append((f"{head}{bar} {short(value)}", colour[j if several else i]))
    return out


def _text_columns(drawing: Drawing, width: int, colour: Sequence[str]) -> list[tuple[str, str]]:
    low, high = drawing.range
    base = 0.0 if 0 <= low < high / 2 else low
    height = 5 if len(drawing.series) < 3 else 3
    ends = [short(high), short(base)]
    margin = max(map(len, ends))
    shown, wide = _fit(len(drawing.places), width - margin - 6 - len(drawing.axis))
    out = []
    for (series, values), shade in zip(drawing.series.items(), colour):
        if series:
            out.append((f"  {'':<{margin}}  {series}", shade))
        levels = [(values[i] - base) / ((high - base) or 1.0) * height * 8 for i in shown]
        for row in reversed(range(height)):
            mark = ends[0] if row == height - 1 else ends[1] if row == 0 else ""
            cells = "".join(_block(level - 8 * row, row == 0) * wide for level in levels)
            out.append((f"  {mark:>{margin}} ┤{cells}", shade))
    out.append(
        (f"  {'':<{margin}}  {_ruler([drawing.places[i] for i in shown], wide, drawing.axis)}", "")
    )
    return out


def _text_cells(drawing: Drawing, width: int, _: Sequence[str]) -> list[tuple[str, str]]:
    low, high = drawing.range
    signed = low < 0 < high
    foot, span = (0.0, max(-low, high)) if signed else (low, (high - low) or 1.0)
    label = max(map(len, drawing.series))
    shown, wide = _fit(len(drawing.places), width - label - 6 - len(drawing.axis))
    out = []
    for series, values in drawing.series.items():
        cells = "".join(_cell((values[i] - foot) / span) * wide for i in shown)
        out.append((f"  {series:<{label}}  {cells}", ""))
    out.append(
        (f"  {'':<{label}}  {_ruler([drawing.places[i] for i in shown], wide, drawing.axis)}", "")
    )
    ends = (
        f"0 is blank, {short(-span)} is #, {short(span)} is █"
        if signed
        else f"from {short(low)} (blank) to {short(high)} (█)"
    )
    out.append((f"  {'':<{label}}  {ends}", "dim"))
    return out


def _cell(share: float) -> str:
    """The shade of a share, from -1 to 1."""
    if not math.isfinite(share):
        return "·"
    return (_BELOW if share < 0 else _SHADES)[min(int(abs(share) * 5), 4)]


def _fit(n: int, room: int) -> tuple[list[int], int]:
    """Which places there is room for, evenly spread, and how many columns each gets."""
    room = max(room, 8)
    shown = sorted({round(i) for i in np.linspace(0, n - 1, min(n, room))})
    return shown, max(1, min(4, room // len(shown)))


def _block(level: float, lowest: bool) -> str:
    if not math.isfinite(level):
        return " "
    # a value at the foot still leaves a mark
    return _EIGHTHS[max(int(lowest), min(8, round(level)))]


def _ruler(labels: list[str], wide: int, axis: str) -> str:
    """First, middle and last label under the columns, and what they count."""
    line = [" "] * max(len(labels) * wide, 1)
    for i in dict.fromkeys((0, len(labels) - 1, len(labels) // 2)):
        start = min(i * wide, max(len(line) - len(labels[i]), 0))
        around = line[max(start - 1, 0) : start + len(labels[i]) + 1]
        if all(character == " " for character in around):
            line[start : start + len(labels[i])] = labels[i]
    return f"{''.join(line)}  {axis}"


# on a page of the documentation -------------------------------------------------------------------


def svg(drawing: Drawing, null: Collection[str] = ()) -> str:
    """The figure as SVG with text as text, the same bytes each time."""
    return written.svg(drawing, colours(drawing, null), short)


# in a report --------------------------------------------------------------------------------------


def plotly(drawing: Drawing, null: Collection[str] = ()) -> go.Figure:
    """The figure as plotly, by the functions of `plots`."""
    shades, dim = colours(drawing, null), drawing.axis or "value"
    # numbers are thinned out, words are not
    counted = all(place.lstrip("-").isdigit() for place in drawing.places)
    places = [int(place) if counted else place for place in drawing.places]
    arrays = {
        name: xr.DataArray(np.array(values), {dim: places}, (dim,))
        for name, values in drawing.series.items()
    }
    first = next(iter(arrays.values()))
    if drawing.kind == "cells":
        names = np.array(list(arrays), dtype=object)
        grid = xr.DataArray(np.stack([a.values for a in arrays.values()]), dims=("series", dim))
        grid = grid.assign_coords({dim: places, "series": names})
        low, _ = drawing.range
        return heatmap.heatmap(
            grid, x=dim, y="series", centre=low < 0, unit=drawing.unit, upward=False, column=18
        )
    if drawing.kind == "bars" and len(arrays) == 1:
        return bars.bars(first, dim=dim, unit=drawing.unit, colours=shades, write=short, row=28)
    if drawing.kind == "bars":
        drawn = bars.grouped(arrays, dim=dim, unit=drawing.unit)
    else:
        every = [
            lines.line(array, dim=dim, unit=drawing.unit, height=300) for array in arrays.values()
        ]
        drawn = every[0]
        drawn.add_traces([trace for other in every[1:] for trace in other.data])
        above = {"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"}
        drawn.update_layout(
            legend=above,
            showlegend=len(arrays) > 1,
            margin_t=theme.TOP + 26,
            xaxis_title=plain(dim),
        )
    for trace, name, shade in zip(drawn.data, arrays, shades):
        trace.update(
            name=plain(name),
            marker_color=shade,
            **({} if drawing.kind == "bars" else {"line_color": shade}),
        )
    return drawn
