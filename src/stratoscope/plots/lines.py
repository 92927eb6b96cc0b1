"""One axis that is a progress as a line: a rank or a probability over depth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stratoscope.plots import theme
from stratoscope.plots.text import plain
from stratoscope.plots.ticks import Ticks, only

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr


def line(
    array: xr.DataArray,
    *,
    dim: str,
    unit: str = "",
    ranks: bool = False,
    scale: str = ".3~f",
    height: int = 220,
) -> go.Figure:
    """A one-dimensional array as a line with points; a NaN interrupts it.

    scale: the d3 format of the values. ranks: the values are ranks counted from 0; they are drawn
    from 1 on a logarithmic axis with the best at the top.

    Raises ResultError when the array has another axis than `dim`.
    """
    import plotly.graph_objects as go

    progress = only(array, dim)
    ticks = Ticks.of(progress, dim)
    values = np.asarray(progress.values, dtype=float) + (1 if ranks else 0)
    trace = go.Scatter(
        x=ticks.places,
        y=values,
        mode="lines+markers",
        line={"color": theme.TOWARDS, "width": 2},
        marker={"size": 5},
        hovertext=[ticks.entry(i) for i in ticks.places],
        hovertemplate=f"%{{hovertext}}<br>{plain(unit)} %{{y:{scale}}}<extra></extra>",
    )
    yaxis = {
        "title": {"text": plain(unit)},
        "rangemode": "tozero",
        "zeroline": False,
        "tickformat": scale,
    }
    if ranks:
        worst = float(np.nanmax(values)) if np.isfinite(values).any() else 1.0
        yaxis |= {"type": "log", "range": [np.log10(worst * 1.6), -0.15], "dtick": 1}
    layout = {
        "template": theme.template(theme.LIGHT),
        "height": height,
        "margin": {"l": 64, "r": 12, "t": theme.TOP, "b": 44},
        "xaxis": ticks.axis(),
        "yaxis": yaxis,
    }
    return go.Figure(trace, layout)
