"""What one section of the report holds, and what several sections draw alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import xarray as xr

from stratoscope.plots import heatmap
from stratoscope.report.explanation import RESULTS, Explanation
from stratoscope.report.sheet import Panel, panel


@dataclass(slots=True)
class Section:
    """What one section shows: a finding in a sentence, panels by name, other values, what is
    missing."""

    finding: str = ""
    panels: dict[str, Panel | list[Panel]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def missing(e: Explanation, key: str) -> str:
    """What the reader misses, and why where that is known."""
    why = f": {e.missing[key]}" if e.missing.get(key) else "."
    return f"{RESULTS[key]} ({key}){why}"


def map_of(array: xr.DataArray, x: str, y: str, title: str, *, width: int, **how: Any) -> Panel:
    """A heatmap without its own colour bar: the page draws one legend for all that share a
    scale."""
    return panel(heatmap.heatmap(array, x=x, y=y, colourbar=False, **how), title, width)


def spaced(name: str) -> str:
    return name.replace("shapley", "Shapley values").replace("_", " ")
