"""Two axes as a heatmap: layer by token, layer by head, query by key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stratoscope.plots import theme
from stratoscope.plots.text import plain, shorten, visible
from stratoscope.plots.ticks import Ticks, only

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

_CELL = 7  # characters of a token written inside a cell


def largest(*arrays: xr.DataArray) -> float:
    """The largest finite magnitude in all arrays (1.0 if there is none but zero): one colour scale
    for several pictures.
    """
    finite = [np.abs(a.values[np.isfinite(a.values)]) for a in arrays]
    return max((float(f.max()) for f in finite if f.size), default=0.0) or 1.0


def heatmap(
    array: xr.DataArray,
    *,
    x: str,
    y: str,
    text: xr.DataArray | None = None,
    hover: xr.DataArray | None = None,
    centre: bool = True,
    limit: float | None = None,
    quiet: float | None = None,
    unit: str = "",
    upward: bool = True,
    row: int = 18,
    column: int = 14,
    colourbar: bool = True,
) -> go.Figure:
    """A heatmap of a two-dimensional array; NaN cells stay empty.

    text: strings (y, x) written into the cells. hover: strings (y, x) that the hover box gives in
    place of the value, made safe with `text.plain`, lines separated by `<br>`. centre: a diverging
    scale from -limit to limit, else a sequential one from 0 to limit; `limit` defaults to the
    largest magnitude in the array. quiet: magnitudes up to this are grey on a page that knows how
    (`page.js`): the bound of a null. unit: what the number is. upward: the first row lies at the
    bottom, as layers are drawn. row: pixels per row; column: the least pixels per column, where
    fewer than 11 leave some tokens without a label. Equal tokens remain separate columns.

    Raises ResultError when the array does not have exactly the axes x and y.
    """
    import plotly.graph_objects as go

    grid = only(array, y, x)
    across, along = Ticks.of(grid, x), Ticks.of(grid, y)
    top = largest(grid) if limit is None else limit
    rows, columns = ([ticks.entry(i) for i in ticks.places] for ticks in (along, across))
    trace = go.Heatmap(
        z=np.asarray(grid.values, dtype=float),
        x=across.places,
        y=along.places,
        zmin=-top if centre else 0.0,
        zmax=top,
        autocolorscale=True,
        xgap=1,
        ygap=1,
        hoverongaps=False,
        hovertext=[[f"{r} · {c}" for c in columns] for r in rows],
        # a page that repeats many figures can build hovertext from this
        meta={"rows": rows, "columns": columns, "quiet": quiet / top if quiet else None},
        hovertemplate=f"%{{hovertext}}<br>{plain(unit)} %{{z:.3f}}<extra></extra>",
        showscale=colourbar,
        colorbar={
            "thickness": 10,
            "outlinewidth": 0,
            "title": {"text": plain(unit), "side": "right"},
        },
    )
    if hover is not None:
        trace.update(
            customdata=only(hover, y, x).values,
            hovertemplate="%{hovertext}<br>%{customdata}<extra></extra>",
        )
    if text is not None:
        cells = _cells(only(text, y, x).values)
        trace.update(text=cells, texttemplate="%{text}", textfont={"family": theme.MONO, "size": 9})
    return go.Figure(trace, _layout(across, along, row=row, column=column, upward=upward))


def _layout(across: Ticks, along: Ticks, *, row: int, column: int, upward: bool) -> dict[str, Any]:
    bottom = across.room(slanted=True)
    return {
        "template": theme.template(theme.LIGHT),
        "height": row * len(along.labels) + bottom + theme.TOP,
        "margin": {"l": along.room(), "r": 8, "t": theme.TOP, "b": bottom},
        "xaxis": across.axis(slanted=True, pixels=column),
        "yaxis": along.axis(reverse=not upward, pixels=row),
    }


def _cells(tokens: np.ndarray) -> list[list[str]]:
    return [
        [plain(shorten(visible(str(t)), _CELL)) if str(t) else "" for t in line] for line in tokens
    ]
