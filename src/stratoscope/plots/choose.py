"""What of a large result is worth drawing: the strongest entries, one entry, components as a
grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr


def peak(array: xr.DataArray) -> float:
    """The largest finite magnitude; NaN when there is none."""
    finite = array.values[np.isfinite(array.values)]
    return float(np.abs(finite).max()) if finite.size else float("nan")


def strongest(array: xr.DataArray, n: int) -> list[dict[str, Any]]:
    """The n entries of largest magnitude, NaN left out, ties in order.

    Each is a dict: the label on every axis (its number where the axis has no coordinate) and
    `value`.
    """
    flat = array.values.ravel()
    order = np.argsort(-np.abs(np.where(np.isfinite(flat), flat, 0)), kind="stable")
    places = []
    for place in order[np.isfinite(flat[order])][:n]:
        at = np.unravel_index(place, array.shape)
        labels = {str(d): array[d].values.tolist()[i] for d, i in zip(array.dims, at)}
        places.append({**labels, "value": float(flat[place])})
    return places


def pick(array: xr.DataArray, **at: int) -> xr.DataArray:
    """One entry by label where the axis has labels, else by number."""
    labelled = {d: v for d, v in at.items() if d in array.indexes}
    return array.sel(labelled).isel({d: v for d, v in at.items() if d not in labelled})


def spread(parts: xr.DataArray, *axes: str) -> xr.DataArray:
    """A list of components as a grid over the axes that their coordinates name; NaN where there is
    none."""
    places = [np.unique(parts[axis].values, return_inverse=True) for axis in axes]
    grid = np.full([len(labels) for labels, _ in places], np.nan)
    grid[tuple(index for _, index in places)] = parts.values
    return xr.DataArray(
        grid, dims=axes, coords={axis: labels for axis, (labels, _) in zip(axes, places)}
    )
