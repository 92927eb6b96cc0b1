"""Any result as one picture: in a notebook, in a terminal, or as a file.

    st.show(result)                  the result's main number, of its first example
    st.show(result, "null")          another number of it
    st.show(result.sel(layer=23))    what xarray can cut out, can be shown

| axes that are left               | drawn as                                               |
|----------------------------------|--------------------------------------------------------|
| one, of names (components, ...)  | bars: the 20 of largest magnitude, if there are more   |
| one, of numbers (layers, depths) | a line                                                 |
| two                              | cells, or a line for each row where there are up to six |
| more                             | the two longest, where the value is largest            |

The picture is SVG, which a notebook keeps when it is converted and which needs no script. What was
left out to draw it (other examples, other entries) is said under it.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stratoscope.claims import draw, figure, svg
from stratoscope.errors import ResultError
from stratoscope.plots import choose, theme
from stratoscope.plots.text import number
from stratoscope.report import sheet

BARS = 20
_FONT = theme.SANS.replace('"', "'")
# counts and ids that go with a result, and are not what it measured
_BESIDE = ("_id", "_low", "_high", "_n", "length")


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture of a result: `print` it, let a notebook show it, or `save` it as .svg or .html.

    drawing: what is drawn. said: sentences on what was left out, and what chance reaches.
    """

    drawing: figure.Drawing
    said: tuple[str, ...]

    @property
    def svg(self) -> str:
        """The picture, the same text each time; of signed bars orange is up and blue is down."""
        drawing, colours = self.drawing, draw.colours(self.drawing)
        if drawing.kind == "bars" and len(drawing.series) == 1 and drawing.range[0] < 0:
            [values] = drawing.series.values()
            colours = [theme.AGAINST if value < 0 else theme.TOWARDS for value in values]
        return svg.svg(drawing, colours, draw.short)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the picture; .html has the sentences too. Raises ResultError for another ending, or
        where it cannot be written."""
        ending = Path(path).suffix
        if ending not in (".svg", ".html"):
            raise ResultError(f"{path}: a picture is saved as .svg or .html.")
        return sheet.write(self.svg if ending == ".svg" else self._page(), path)

    def _page(self) -> str:
        title = escape(self.drawing.title)
        head = (
            f'<meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>{title}'
        )
        return f"<!doctype html>\n<html lang=en><head>{head}</title></head>\n{self._repr_html_()}\n"

    def _repr_html_(self) -> str:
        words, title = " ".join(map(escape, self.said)), escape(self.drawing.title)
        # as an image: inside it its style touches nothing of the notebook
        picture = f'<img alt="{title}" src="{sheet.image(self.svg)}" style="max-width:100%">'
        caption = f'<figcaption style="font:13px {_FONT};color:#767c87">{words}</figcaption>'
        return f'<figure style="margin:0">{picture}{caption if words else ""}</figure>'

    def __repr__(self) -> str:
        from rich.console import Console

        console = Console(width=80, color_system=None)
        with console.capture() as seen:
            console.print(draw.terminal(self.drawing, 80), soft_wrap=True)
            for sentence in self.said:
                console.print(f"  {sentence}", markup=False, highlight=False)
        return seen.get()


def show(result: xr.Dataset | xr.DataArray, name: str | None = None, *, example: int = 0) -> Shown:
    """A picture of one number of a result.

    name: which, of a data set; default the first that was measured. example: of several prompts,
    which one. Raises ResultError for a result without numbers, a name it does not have, and an
    example it does not have.
    """
    data = named(result)
    key = main(data, name)
    array, said = data[key], []
    if "example" in array.dims:
        count = array.sizes["example"]
        if not -count <= example < count:
            raise ResultError(f"example={example}: the result has {count}.")
        array = array.isel(example=example)
        if count > 1:
            said.append(f"Example {example % count} of {count}.")
    if "rank" in array.dims and array.ndim > 1:
        said.append(f"The first of {array.sizes['rank']} ranks.")
        array = array.isel(rank=0)
    elif array.dims == ("rank",) and "token" in data:
        words = (
            data["token"].isel(example=example)
            if "example" in data["token"].dims
            else data["token"]
        )
        array = array.assign_coords(rank=words.values) if words.dims == ("rank",) else array
    array, more = _flat(array)
    said += more
    if key == "effect" and "bound" in data:
        bound = (
            data["bound"].isel(example=example)
            if "example" in data["bound"].dims
            else data["bound"]
        )
        if not bound.ndim and math.isfinite(bound.item()):
            said.append(f"The largest by chance: {number(bound.item(), sign=False)}.")
    method = str(result.attrs.get("method", ""))
    plain = key.replace("_", " ")
    about = {"title": f"{method}: {plain}" if method else plain, "unit": plain}
    array = array.rename(key).assign_attrs(about | array.attrs)
    return Shown(figure.drawing(array), tuple(said))


def named(result: xr.Dataset | xr.DataArray) -> xr.Dataset:
    """A result as a data set: an array under its own name."""
    if not isinstance(result, xr.DataArray):
        return result
    return result.to_dataset(name=result.name or "value").assign_attrs(result.attrs)


def numbers(data: xr.Dataset) -> list[str]:
    """The names of what can be drawn."""
    return [str(key) for key, value in data.data_vars.items() if value.dtype.kind in "biuf"]


def main(data: xr.Dataset, name: str | None = None) -> str:
    """The name of the number that a result is about, or `name` itself. Raises ResultError where it
    has no number, or none of that name."""
    known = numbers(data)
    if name is not None:
        if name not in known:
            raise ResultError(f"{name!r}: the result has the numbers {', '.join(known) or 'none'}.")
        return name
    measured = [key for key in known if data[key].dtype.kind == "f"]
    spread = [key for key in measured if set(data[key].dims) - {"example"}]
    main = [key for key in spread or measured or known if not key.endswith(_BESIDE)]
    if not (main or known):
        raise ResultError(f"the result has no number to draw, only {sorted(map(str, data))}.")
    return (main or known)[0]


def _flat(array: xr.DataArray) -> tuple[xr.DataArray, list[str]]:
    """At most two axes, and one of names at most BARS long; what was chosen, in sentences."""
    said = []
    if array.ndim > 2:
        wide = sorted(array.dims, key=lambda dim: array.sizes[dim])[-2:]
        if {"query", "key"} <= set(array.dims):
            wide = ["query", "key"]
        peak = choose.strongest(array, 1)
        at: dict[str, Any] = {
            d: v for d, v in (peak or [{}])[0].items() if d not in (*wide, "value")
        }
        array = choose.pick(array, **at) if at else array.isel(dict.fromkeys(array.dims[:-2], 0))
        where = ", ".join(f"{dim.replace('_', ' ')} {value}" for dim, value in at.items())
        said.append(f"At {where}, where it is largest." if where else "The first of each.")
    if {"query", "key"} == set(array.dims):
        array = array.transpose("key", "query")  # a row for each token that looks
    if array.ndim == 1 and array.sizes[array.dims[0]] > BARS and figure.named(array):
        order = np.argsort(-np.abs(np.nan_to_num(array.values)), kind="stable")[:BARS]
        said.append(f"The {BARS} largest of {array.size:,}.")
        array = array.isel({array.dims[0]: order})
    return array, said
