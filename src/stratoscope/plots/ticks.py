"""The words along one axis of an array, and the room they take in a picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stratoscope.errors import ResultError
from stratoscope.plots import text, theme

if TYPE_CHECKING:
    import xarray as xr

LONGEST = 14  # characters of a token shown on an axis; the hover box has it whole
_CHARACTER = 6.8  # pixels of one monospaced character at size 11
_LINE = 11  # pixels from one label to the next
_SLANT = 50  # degrees; sin of it is how much of a label's length becomes height


@dataclass(frozen=True, slots=True)
class Ticks:
    """The labels of an axis. `words`: they are tokens or names, not a count."""

    name: str
    labels: list[str]
    words: bool

    @classmethod
    def of(cls, array: xr.DataArray, dim: str) -> Ticks:
        """Token text along `dim` where the array carries it (`text_<dim>`, `text`), else its
        coordinate, else 0, 1, ...
        """
        for name in (f"text_{dim}", "text", dim):
            if name in array.coords and array.coords[name].dims == (dim,):
                values = array.coords[name].values.tolist()
                words = any(isinstance(v, str) for v in values)
                return cls(
                    dim, [text.visible(str(v)) if name != dim else str(v) for v in values], words
                )
        return cls(dim, [str(i) for i in range(array.sizes[dim])], words=False)

    @property
    def places(self) -> list[int]:
        """Where they stand. Plotly merges equal categories, so a label is placed by number and only
        written as text.
        """
        return list(range(len(self.labels)))

    def entry(self, i: int) -> str:
        """One entry in full, safe for a figure: the axis and its number, and the token where there
        is one."""
        return (
            f"{self.name} {i} {text.plain(self.labels[i])}"
            if self.words
            else f"{self.name} {self.labels[i]}"
        )

    def axis(
        self, *, slanted: bool = False, reverse: bool = False, pixels: int = 11
    ) -> dict[str, Any]:
        """The plotly axis: as many labels as can be read, the axis named when they are only
        numbers.

        pixels: the least that an entry will take; words then stand on every second, third, ...
        entry.
        """
        n = len(self.labels)
        if self.words:  # counted from the end: the last token is the one that predicts
            every = math.ceil(_LINE / pixels)
            shown = self.places[(n - 1) % every :: every]
        else:
            shown = self.places[:: 1 if n <= 16 else 5 if n <= 60 else 10 * math.ceil(n / 120)]
        return {
            "tickmode": "array",
            "tickvals": shown,
            "ticktext": [text.plain(text.shorten(self.labels[i], LONGEST)) for i in shown],
            "tickfont": {"family": theme.MONO} if self.words else {},
            "tickangle": -_SLANT if slanted and self.words else 0,
            "title": {} if self.words else {"text": self.name.replace("_", " ")},
            "range": [n - 0.5, -0.5] if reverse else [-0.5, n - 0.5],
            "showgrid": False,
            "zeroline": False,
            "ticks": "",
            "ticklabelstandoff": 3,
        }

    def room(self, *, slanted: bool = False) -> int:
        """Pixels of margin that the labels need."""
        if not self.words:
            return 44
        length = (
            _CHARACTER * max(min(len(label), LONGEST) for label in self.labels)
            if self.labels
            else 0
        )
        return round(length * (math.sin(math.radians(_SLANT)) if slanted else 1)) + 16


def only(array: xr.DataArray, *dims: str) -> xr.DataArray:
    """The array with exactly these axes, in this order; ResultError says which others to select
    first."""
    if set(array.dims) != set(dims) or len(dims) != len(array.dims):
        raise ResultError(
            f"A picture over {dims} was asked for, the array {array.name or ''} has the axes "
            f"{array.dims}; "
            "select one entry of the others first, as in array.isel(example=0)."
        )
    return array.transpose(*dims)
