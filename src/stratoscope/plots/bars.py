"""One axis as bars: shares of a whole, or signed contributions towards the answer and towards the
foil."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from stratoscope.plots import theme
from stratoscope.plots.text import number, plain
from stratoscope.plots.ticks import Ticks, only

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr


def bars(
    array: xr.DataArray,
    *,
    dim: str,
    unit: str = "",
    colours: Sequence[str] | None = None,
    write: Callable[[float], str] = number,
    scale: str = "",
    upward: bool = False,
    row: int = 22,
    written: bool = True,
) -> go.Figure:
    """Horizontal bars of a one-dimensional array, the first at the top (at the bottom if `upward`,
    as layers are drawn).

    colours: one per bar; by default positive bars are orange (towards the answer) and negative ones
    blue. write: how a value is put into words. scale: the d3 format of the numbers on the axis.
    row: pixels per bar. written: the value at the end of each bar. NaN gives no bar.

    Raises ResultError when the array has another axis than `dim`.
    """
    import plotly.graph_objects as go

    line = only(array, dim)
    ticks, values = Ticks.of(line, dim), np.asarray(line.values, dtype=float)
    labels = [plain(write(value)) for value in values.tolist()]
    trace = go.Bar(
        x=values,
        y=ticks.places,
        orientation="h",
        marker={
            "color": list(colours)
            if colours
            else np.where(values < 0, theme.AGAINST, theme.TOWARDS).tolist()
        },
        text=labels if written else None,
        textposition="outside" if written else None,
        cliponaxis=False,
        hovertext=[
            f"{ticks.entry(i)}<br>{plain(unit)} {value}" for i, value in zip(ticks.places, labels)
        ],
        hovertemplate="%{hovertext}<extra></extra>",
    )
    layout = {
        "template": theme.template(theme.LIGHT),
        "height": row * len(ticks.labels) + 44 + theme.TOP,
        "margin": {"l": ticks.room(), "r": 8, "t": theme.TOP, "b": 44},
        "bargap": 0.25,
        "xaxis": {"title": {"text": plain(unit)}, "zeroline": True, "tickformat": scale},
        "yaxis": ticks.axis(reverse=not upward),
    }
    if written:
        layout["xaxis"]["range"] = _with_room(values)
    return go.Figure(trace, layout)


def grouped(
    arrays: Mapping[str, xr.DataArray], *, dim: str, unit: str = "", height: int = 280
) -> go.Figure:
    """Vertical bars of several arrays over the same axis, side by side; each array becomes one
    named series.

    Raises ResultError when an array has another axis than `dim`.
    """
    import plotly.graph_objects as go

    lines = {name: only(array, dim) for name, array in arrays.items()}
    ticks = Ticks.of(next(iter(lines.values())), dim)
    bottom = ticks.room(slanted=True)
    series = [
        go.Bar(
            x=ticks.places,
            y=np.asarray(line.values, dtype=float),
            name=plain(name),
            marker={"color": colour},
            hovertext=[ticks.entry(i) for i in ticks.places],
            hovertemplate=f"%{{hovertext}}<br>{plain(name)} %{{y:.3f}}<extra></extra>",
        )
        for (name, line), colour in zip(lines.items(), theme.SERIES * len(lines))
    ]
    layout = {
        "template": theme.template(theme.LIGHT),
        "barmode": "group",
        "bargap": 0.3,
        "bargroupgap": 0.05,
        "height": height + bottom,
        "margin": {"l": 56, "r": 8, "t": theme.TOP + 26, "b": bottom},
        "xaxis": ticks.axis(slanted=True),
        "yaxis": {"title": {"text": plain(unit)}, "zeroline": True},
        "legend": {"orientation": "h", "x": 0, "y": 1, "xanchor": "left", "yanchor": "bottom"},
    }
    return go.Figure(series, layout)


def _with_room(values: np.ndarray) -> list[float]:
    """The range of the bars and a fifth more at the ends that carry a number."""
    finite = values[np.isfinite(values)]
    low, high = min(0.0, *finite, 0.0), max(0.0, *finite, 0.0)
    spare = 0.18 * ((high - low) or 1.0)
    return [low - spare if low < 0 else 0.0, high + spare if high > 0 else 0.0]
