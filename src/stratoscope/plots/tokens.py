"""One number per token as the text itself, each token on a tint of its value (HTML)."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from stratoscope.plots.heatmap import largest
from stratoscope.plots.text import JOINED, SPECIAL, number
from stratoscope.plots.ticks import Ticks, only

if TYPE_CHECKING:
    import xarray as xr

# theme.TOWARDS and theme.AGAINST as red, green, blue
_TINT = {True: "217,119,31", False: "61,127,193"}
_STRONGEST = (
    0.78  # opacity of the largest value: the page's ink stays legible on it, light and dark
)
_SHAPE = "border-radius:3px;padding:.25em .1em;white-space:pre-wrap"


def strip(array: xr.DataArray, *, dim: str = "position", limit: float | None = None) -> str:
    """The tokens of a one-dimensional array, left to right by position, orange where positive, blue
    where negative.

    limit: the value of the strongest tint; by default the largest magnitude. NaN stays without
    tint. The HTML needs no style sheet, carries the value in `title`, and escapes every token.

    Raises ResultError when the array has another axis than `dim`.
    """
    line = only(array, dim)
    top = largest(line) if limit is None else limit
    # left to right by position, whichever way the script is written
    spans = [
        _span(token, float(value), top)
        for token, value in zip(Ticks.of(line, dim).labels, line.values)
    ]
    return f'<div class="strip" dir="ltr" style="line-height:2.1">{"".join(spans)}</div>'


def _span(token: str, value: float, top: float) -> str:
    opacity = _STRONGEST * min(abs(value) / top, 1) if math.isfinite(value) else 0
    style = f"background:rgba({_TINT[value > 0]},{opacity:.3f});{_SHAPE}"
    # In a text a space reads as a space (the tint shows where a token begins), unless there is
    # nothing else.
    shown = escape(token.replace("␣", " ") if token.strip("␣") else token).replace("↵", "↵<br>")
    end = "<br>" if shown.endswith("<br>") else ""  # outside: its tint ends with the token
    shown = shown.removesuffix("<br>")
    if token == JOINED or SPECIAL.fullmatch(token) or not token.strip("␣↵⇥"):
        shown = f'<span style="opacity:.55">{shown}</span>'
    # isolated: else tokens of a right-to-left script would be put in order as one text
    return (
        f'<bdi style="{style}" title="{escape(token)}  {number(value, 3)}">{shown}</bdi>{end}<wbr>'
    )
