"""A claim's figure as a small SVG: text as text, a few kilobytes, the same bytes each time.

Written by hand rather than by a plotting library, whose files are ten times as large and whose
every change of style rewrites all of them. Light and dark follow the page. What a page must show is
the number: bars carry theirs, lines and cells have their scale; the whole data stand in the
verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

from stratoscope.claims.figure import Drawing
from stratoscope.plots import theme
from stratoscope.plots.text import shorten

# pixels; HEAD: the title's; ROW: one bar's or legend row's
WIDTH, MARGIN, HEAD, ROW = 720, 14, 34, 22
LETTER = 6.6  # what a letter of 12 pixels takes on average, generously
SHADES = 12  # of a grid of cells: more are not told apart
_COLUMN = 168  # pixels that a legend's entry takes

Pixels = float | int
Write = Callable[[float], str]
Drawn = tuple[Pixels, list[str]]  # the height that is used up, and the elements


def svg(drawing: Drawing, colours: Sequence[str], write: Write) -> str:
    """The figure; colours: as `draw.colours` gives them; write: how a number is written."""
    draw = {"bars": _bars, "lines": _lines, "cells": _cells}[drawing.kind]
    top = HEAD + _legend_height(drawing)
    height, body = draw(drawing, colours, write, top)
    legend = _legend(drawing, colours) if _legend_height(drawing) else ()
    return sheet(height, [text(MARGIN, 22, drawing.title, "b"), *legend, *body], drawing)


def sheet(height: Pixels, parts: Sequence[str], drawing: Drawing | None = None) -> str:
    """A whole picture of its parts, light or dark as the reader's system is."""
    rows = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" role="img">\n<style>{_style(drawing)}</style>\n'
        f'<rect class="p" width="100%" height="100%"/>\n{rows}\n</svg>\n'
    )


# --- the three kinds ------------------------------------------------------------------------------


def _bars(drawing: Drawing, colours: Sequence[str], write: Write, top: Pixels) -> Drawn:
    several = len(drawing.series) > 1
    left = MARGIN + LETTER * min(max(map(len, drawing.places)), 34) + 8
    low, high = drawing.range
    thick = ROW - 4 if not several else max(11, ROW - 4 - 2 * len(drawing.series))
    numbers = LETTER * max(len(write(v)) for values in drawing.series.values() for v in values) + 8
    before = numbers if low < 0 else 0  # room for a number at the left of a bar
    scale = (WIDTH - MARGIN - left - numbers - before) / ((high - low) or 1.0)
    zero = left + before - low * scale
    parts, y = [], top
    for i, place in enumerate(drawing.places):
        begin = y
        for j, values in enumerate(drawing.series.values()):
            value, colour = values[i], colours[j if several else i]
            if math.isfinite(value):
                size, start = abs(value) * scale, zero + min(value, 0.0) * scale
                parts.append(rect(start, y, max(size, 0.5), thick, colour))
            tip = zero + (value if math.isfinite(value) else 0.0) * scale
            side = "e" if value < 0 else ""
            parts.append(text(tip + (-5 if side else 5), y + thick / 2 + 4, write(value), side))
            y += thick + 2
        parts.append(text(left - 8, (begin + y - 2) / 2 + 4, shorten(place, 34), "e"))
        y += 6 if several else 2
    parts.append(path(f"M{zero:.1f} {top - 3:.1f}V{y:.1f}", "a"))
    parts.append(text(WIDTH - MARGIN, y + 16, drawing.unit, "e m"))
    return y + 26, parts


def _lines(drawing: Drawing, colours: Sequence[str], write: Write, top: Pixels) -> Drawn:
    marks = ticks(*drawing.range)
    low, high = marks[0], marks[-1]
    left = MARGIN + LETTER * max(len(write(mark)) for mark in marks) + 8
    top, bottom, right = top + 20, top + 210, WIDTH - MARGIN - 8
    n = len(drawing.places)
    x = [left + 8 + (right - left - 8) * i / max(n - 1, 1) for i in range(n)]
    y = lambda value: bottom - (bottom - top) * (value - low) / ((high - low) or 1.0)  # noqa: E731
    parts = [text(MARGIN, top - 10, drawing.unit, "m")]
    for mark in marks:
        parts.append(path(f"M{left:.1f} {y(mark):.1f}H{right:.1f}", "g"))
        parts.append(text(left - 6, y(mark) + 4, write(mark), "e m"))
    for values, colour in zip(drawing.series.values(), colours):
        at = [(x[i], y(value)) if math.isfinite(value) else None for i, value in enumerate(values)]
        parts.append(f'<path fill="none" stroke="{colour}" stroke-width="2" d="{_track(at)}"/>')
        dots = "".join(
            f"M{p[0] - 2.5:.1f} {p[1]:.1f}a2.5 2.5 0 1 0 5 0a2.5 2.5 0 1 0-5 0" for p in at if p
        )
        parts.append(f'<path fill="{colour}" d="{dots}"/>')
    parts += _below(drawing, x, bottom + 18)
    return bottom + 46, parts


def _cells(drawing: Drawing, colours: Sequence[str], write: Write, top: Pixels) -> Drawn:
    low, high = drawing.range
    low, high = (-max(-low, high), max(-low, high)) if _signed(drawing) else (low, high)
    left = MARGIN + LETTER * min(max(map(len, drawing.series)), 34) + 8
    n, tall = len(drawing.places), min(ROW - 4, 480 // len(drawing.series))
    wide = (WIDTH - MARGIN - left) / n
    paths: list[list[str]] = [[] for _ in range(SHADES)]
    parts, size = [], 12 if tall >= 12 else max(tall, 7)
    for row, (name, values) in enumerate(drawing.series.items()):
        y = top + row * tall
        parts.append(text(left - 8, y + tall / 2 + size / 3, shorten(name, 34), "e", size))
        for i, value in enumerate(values):
            if math.isfinite(value):
                shade = min(int((value - low) / ((high - low) or 1.0) * SHADES), SHADES - 1)
                paths[shade].append(
                    f"M{left + i * wide:.1f} {y}h{wide - 1:.1f}v{tall - 1}h-{wide - 1:.1f}z"
                )
    names = [f"s{shade}" for shade in range(SHADES)]
    parts += [path("".join(track), name) for track, name in zip(paths, names) if track]
    y = top + tall * len(drawing.series)
    parts += _below(drawing, [left + (i + 0.5) * wide for i in range(n)], y + 16)
    bar = [rect(left + 14 * i, y + 38, 14, 10, name=name) for i, name in enumerate(names)]
    scale = f"{write(low)} to {write(high)}"
    scale = text(left + 14 * SHADES + 8, y + 47, scale, "m")
    return y + 60, [*parts, *bar, scale, text(WIDTH - MARGIN, y + 47, drawing.unit, "e m")]


# --- parts ----------------------------------------------------------------------------------------


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that span low to high, at most `most` of them, 0 included where it is near."""
    low = 0.0 if 0 < low < high / 2 else low
    high = high if high > low else low + (abs(low) or 1.0)
    rough = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10, 20) if _count(low, high, s * power) <= most)
    begin = math.floor(low / step + 1e-9)
    return [round((begin + i) * step, 12) for i in range(_count(low, high, step))]


def _count(low: float, high: float, step: float) -> int:
    return math.ceil(high / step - 1e-9) - math.floor(low / step + 1e-9) + 1


def _below(drawing: Drawing, x: Sequence[float], y: Pixels) -> list[str]:
    """The places under a picture, as many as there is room for, and what they count."""
    room = LETTER * max(map(len, drawing.places)) + 10
    every = max(1, math.ceil(room * len(x) / (x[-1] - x[0] + room)))
    marks = [text(x[i], y, drawing.places[i], "c m") for i in range(0, len(x), every)]
    return [*marks, text((x[0] + x[-1]) / 2, y + 16, drawing.axis, "c m")]


def _track(points: Iterable[tuple[float, float] | None]) -> str:
    """A line through the points, broken where there is none."""
    out, pen = [], "M"
    for point in points:
        if point is not None:
            out.append(f"{pen}{point[0]:.1f} {point[1]:.1f}")
        pen = "M" if point is None else "L"
    return "".join(out)


def _legend_height(drawing: Drawing) -> int:
    several = len(drawing.series) > 1 and drawing.kind != "cells"
    return ROW * math.ceil(len(drawing.series) / (WIDTH // _COLUMN)) if several else 0


def _legend(drawing: Drawing, colours: Sequence[str]) -> Iterable[str]:
    per_row = WIDTH // _COLUMN
    for i, (name, colour) in enumerate(zip(drawing.series, colours)):
        x, y = MARGIN + _COLUMN * (i % per_row), HEAD + ROW * (i // per_row)
        yield rect(x, y, 12, 12, colour)
        yield text(x + 18, y + 10, shorten(name, 24), "")


def text(x: Pixels, y: Pixels, words: str, style: str, size: Pixels = 12) -> str:
    """Words at a place; style: b bold, e ends there, c centred, m muted."""
    if not words:
        return ""
    kind = f' class="{style}"' if style else ""
    own = f' style="font-size:{size:g}px"' if size != 12 else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{kind}{own}>{escape(words, quote=False)}</text>'


def rect(x: Pixels, y: Pixels, w: Pixels, h: Pixels, colour: str = "", name: str = "") -> str:
    look = f'fill="{colour}"' if colour else f'class="{name}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" {look}/>'


def path(track: str, name: str) -> str:
    return f'<path class="{name}" d="{track}"/>'


def _mixed(scale: theme.Scale, share: float) -> str:
    """The colour at a share of a scale."""
    right = next(i for i, (at, _) in enumerate(scale) if at >= share)
    (a, one), (b, two) = scale[right - 1], scale[right]
    part = (share - a) / (b - a)
    sides = zip(bytes.fromhex(one[1:]), bytes.fromhex(two[1:]))
    return "#" + "".join(f"{round(x + (y - x) * part):02x}" for x, y in sides)


def _style(drawing: Drawing | None) -> str:
    """The colours of a light page, and of a dark one where the reader's system is dark."""
    light, dark = (_look(look, drawing) for look in (theme.LIGHT, theme.DARK))
    font = f"text{{font:12px {theme.SANS}}}.b{{font-weight:600;font-size:14px}}"
    ends = ".e{text-anchor:end}.c{text-anchor:middle}"
    return f"{font}{ends}{light}@media(prefers-color-scheme:dark){{{dark}}}"


def _look(look: theme.Palette, drawing: Drawing | None) -> str:
    ink = (
        f"text{{fill:{look.ink}}}text.m{{fill:{look.muted}}}.p{{fill:{look.paper}}}"
        f".a{{stroke:{look.muted}}}.g{{stroke:{look.rule}}}"
    )
    if drawing is None or drawing.kind != "cells":
        return ink
    scale = look.diverging if _signed(drawing) else look.sequential
    shades = (_mixed(scale, (shade + 0.5) / SHADES) for shade in range(SHADES))
    return ink + "".join(f".s{shade}{{fill:{colour}}}" for shade, colour in enumerate(shades))


def _signed(drawing: Drawing) -> bool:
    return drawing.range[0] < 0 < drawing.range[1]
