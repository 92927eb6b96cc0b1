"""Colours and type of every picture, light and dark, chosen to stay apart for colour-blind eyes.

Orange is *towards the answer*, blue is *towards the foil*; both keep their contrast on a light and
on a dark page, so bars carry them directly. Heatmaps leave their scale to the template
(`autocolorscale`): plotly picks `diverging` when the range crosses zero and `sequential` when it
starts at zero. Changing the theme is therefore one template, no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TOWARDS = "#d9771f"
AGAINST = "#3d7fc1"
NEUTRAL = "#8b919b"
SERIES = (
    "#009e73",
    "#b565a7",
    "#8b919b",
)  # methods side by side: neither orange nor blue, which have a meaning

SANS = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, 'SF Mono', 'Cascadia Mono', 'Noto Sans Mono', 'DejaVu Sans Mono', monospace"

TOP = 30  # pixels above every plot, where plotly's own buttons stand without covering data

Scale = tuple[tuple[float, str], ...]


@dataclass(frozen=True, slots=True)
class Palette:
    """What differs between the light and the dark page."""

    ink: str
    muted: str
    rule: str
    paper: str
    diverging: Scale
    sequential: Scale


LIGHT = Palette(
    ink="#1d2025",
    muted="#626873",
    rule="#e2e2dc",
    paper="#fdfdfb",
    diverging=(
        (0.0, "#17457f"),
        (0.25, "#74a9d8"),
        (0.5, "#f5f4f0"),
        (0.75, "#f0a860"),
        (1.0, "#a84300"),
    ),
    sequential=(
        (0.0, "#f5f4ee"),
        (0.15, "#dcedc0"),
        (0.35, "#8fd19f"),
        (0.55, "#3ba59a"),
        (0.78, "#2c6c92"),
        (1.0, "#30225c"),
    ),
)
DARK = Palette(
    ink="#e6e8ec",
    muted="#9aa1ad",
    rule="#2c3038",
    paper="#14161a",
    diverging=(
        (0.0, "#9ccbff"),
        (0.25, "#3b76b5"),
        (0.5, "#1f2229"),
        (0.75, "#b5641d"),
        (1.0, "#ffc68a"),
    ),
    sequential=(
        (0.0, "#1f2229"),
        (0.15, "#332d63"),
        (0.35, "#2f5d8c"),
        (0.6, "#24918d"),
        (0.8, "#6cc76a"),
        (1.0, "#f5e94f"),
    ),
)


def template(palette: Palette) -> dict[str, Any]:
    """The plotly template of a palette: type, grid, hover box and the two colour scales."""
    axis = {
        "gridcolor": palette.rule,
        "zerolinecolor": palette.muted,
        "linecolor": palette.rule,
        "tickcolor": palette.rule,
        "tickfont": {"color": palette.muted, "size": 11},
        "title": {"font": {"color": palette.muted, "size": 12}, "standoff": 8},
    }
    return {
        "layout": {
            "font": {"family": SANS, "size": 12, "color": palette.ink},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": [TOWARDS, AGAINST, *SERIES],
            "colorscale": {"diverging": palette.diverging, "sequential": palette.sequential},
            "hoverlabel": {
                "bgcolor": palette.paper,
                "bordercolor": palette.muted,
                "font": {"family": MONO, "size": 12, "color": palette.ink},
                "align": "left",
            },
            "modebar": {
                "bgcolor": "rgba(0,0,0,0)",
                "color": palette.muted,
                "activecolor": palette.ink,
            },
            "xaxis": axis,
            "yaxis": axis,
        }
    }


def gradient(scale: Scale) -> str:
    """A colour scale as a CSS gradient, for a legend that is drawn once for several pictures."""
    return (
        "linear-gradient(90deg, "
        + ", ".join(f"{colour} {100 * at:g}%" for at, colour in scale)
        + ")"
    )
