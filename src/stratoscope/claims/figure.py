"""A claim's small figure: a labelled array, as JSON in the verdict, and what kind of picture its
shape asks for.

| axes of the array                         | drawn as                            |
|-------------------------------------------|-------------------------------------|
| one, words                                | bars                                |
| one, numbers                              | a line                              |
| two, of which one is short (up to six)    | lines or bars, one colour a series  |
| two, both long; three or more             | shaded cells, a row a series        |
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr

from stratoscope.errors import ClaimError
from stratoscope.plots.text import shorten, visible

SERIES = 6  # as many colours as stay apart


@dataclass(frozen=True)
class Drawing:
    """What to draw: one value for each series and place; NaN is a gap. axis: what the places are
    called together."""

    kind: Literal["bars", "lines", "cells"]
    title: str
    unit: str
    axis: str
    places: tuple[str, ...]
    series: dict[str, tuple[float, ...]]  # one series without a name has the key ""

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest finite number, with 0 for bars; (0, 1) where there is
        none."""
        finite = [
            value for values in self.series.values() for value in values if np.isfinite(value)
        ]
        finite += [0.0] if self.kind == "bars" else []
        return (min(finite), max(finite)) if finite else (0.0, 1.0)


def encode(array: xr.DataArray) -> dict[str, Any]:
    """The array as JSON keeps it: six digits, None for what is no number. Raises ClaimError when it
    is not numeric."""
    if array.dtype.kind not in "biuf":
        raise ClaimError(f"The figure {array.name!r} holds {array.dtype}; a figure holds numbers.")
    words = {name: str(array.attrs[name]) for name in ("title", "unit") if array.attrs.get(name)}
    return {
        "name": str(array.name or "value"),
        **words,
        "dims": list(array.dims),
        "values": _numbers(array.values),
        "coords": {
            str(name): {"dims": list(coord.dims), "values": _numbers(coord.values)}
            for name, coord in array.coords.items()
        },
    }


def decode(data: Mapping[str, Any]) -> xr.DataArray:
    """The array that `encode` was given, but for its precision. Raises ClaimError when `data` is no
    figure."""
    try:
        coords = {
            name: (coord["dims"], _array(coord["values"])) for name, coord in data["coords"].items()
        }
        words = {name: data[name] for name in ("title", "unit") if name in data}
        values = np.asarray(data["values"], dtype=float)
        return xr.DataArray(values, coords, data["dims"], name=data["name"], attrs=words)
    except (KeyError, TypeError, ValueError) as error:
        raise ClaimError(
            f"A stored figure cannot be read ({error}). Run its claim again."
        ) from error


def drawing(array: xr.DataArray) -> Drawing:
    """What to draw of the array."""
    names = {dim: _labels(array, str(dim)) for dim in array.dims}
    along = _along(array)
    rows = [dim for dim in array.dims if dim != along]
    series = {}
    for place in itertools.product(*(range(array.sizes[dim]) for dim in rows)):
        at = dict(zip(rows, place))
        labels = [
            names[d][i] if _words(array, str(d)) else f"{_plain(d)} {names[d][i]}"
            for d, i in at.items()
        ]
        values = np.atleast_1d(array.isel(at).values.astype(float))
        label = " · ".join(labels)
        series[label + "′" * sum(key.rstrip("′") == label for key in series)] = tuple(
            values.tolist()
        )
    words = along is None or _words(array, str(along))
    counted = [f"{_plain(along)} {name}" for name in names.get(along, ())]
    kind = (
        "cells" if len(series) > SERIES else "bars" if words or array.sizes[along] < 3 else "lines"
    )
    return Drawing(
        kind,
        title=array.attrs.get("title") or _plain(array.name or "value"),
        unit=array.attrs.get("unit", "") or _plain(array.name or "value"),
        axis="" if along is None else _plain(along),
        places=("",)
        if along is None
        else tuple(names[along] if words or kind != "bars" else counted),
        series=series,
    )


def named(array: xr.DataArray) -> bool:
    """Whether the places of an array's only axis have names, and no order of their own."""
    return _words(array, str(array.dims[0]))


def _along(array: xr.DataArray) -> Any:
    """The axis the places lie on: the longest of those that count something, else the longest."""
    counts = [dim for dim in array.dims if not _words(array, str(dim))] or list(array.dims)
    return max(counts, key=lambda dim: array.sizes[dim], default=None)


def _coordinate(array: xr.DataArray, dim: str) -> xr.DataArray | None:
    """The coordinate that names the places of an axis: words where there are any."""
    own = [coord for coord in array.coords.values() if coord.dims == (dim,)]
    return next(
        (c for c in own if c.dtype.kind in "OU"), next((c for c in own if c.name == dim), None)
    )


def _words(array: xr.DataArray, dim: str) -> bool:
    coord = _coordinate(array, dim)
    return coord is not None and coord.dtype.kind in "OU"


def _labels(array: xr.DataArray, dim: str) -> list[str]:
    coord = _coordinate(array, dim)
    if coord is None:
        return [str(i) for i in range(array.sizes[dim])]
    values = [_spaced(v) if isinstance(v, str) else f"{v:g}" for v in coord.values.tolist()]
    return [shorten(visible(text).replace("␣", " "), 28).strip() or "␣" for text in values]


def _spaced(name: str) -> str:
    """A name from code as words: short_list reads short list. A token of that shape cannot be told
    from one."""
    return name.replace("_", " ") if re.fullmatch("[a-z0-9]+(_[a-z0-9]+)+", name) else name


def _plain(name: Any) -> str:
    return str(name).replace("_", " ")


def _numbers(values: Any) -> Any:
    if values.dtype.kind in "OU":
        return np.vectorize(str, otypes=[object])(values).tolist()
    if values.ndim:
        return [_numbers(part) for part in values]
    if values.dtype.kind in "biu":
        return int(values)
    return float(f"{float(values):.6g}") if np.isfinite(values) else None


def _array(values: Any) -> np.ndarray:
    words = np.array(values, dtype=object)  # a number that is None comes back as NaN
    return (
        words
        if any(isinstance(value, str) for value in words.flat)
        else np.array(values, dtype=float)
    )
