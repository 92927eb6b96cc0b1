"""A circuit as a layered graph: components in rows from embedding up to logits, edges as wide as
their effect."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from stratoscope.errors import ResultError
from stratoscope.plots import theme
from stratoscope.plots.choose import peak, strongest
from stratoscope.plots.text import number, plain

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import xarray as xr

Places = dict[str, tuple[float, float]]  # component -> (column, row)
_INPUTS = {"q": -0.2, "k": 0.0, "v": 0.2}  # where below a head an edge arrives, in columns
_WIDEST, _THINNEST = 9.0, 0.8  # pixels
_HALF = 0.3  # half the height of a component, in rows
_POINTS = 18  # of a curve


class Drawn(NamedTuple):
    """One edge as it is drawn: from a component to an input ("q", "k", "v" or "") of another."""

    sender: str
    receiver: str
    side: str
    effect: float


def graph(
    array: xr.DataArray, *, unit: str = "effect", limit: int = 60, column: int = 78, row: int = 66
) -> go.Figure:
    """The strongest `limit` edges of an array with the one axis `edge` and its coordinates sender
    and receiver.

    Width is the size of the effect, orange is towards the answer and blue against it; q, k, v say
    by which input a head is fed. MLPs stand right of their layer's heads. Hovering an edge or a
    component tells its numbers. column, row: pixels for each place. Raises ResultError when the
    array has other axes, or holds no number.
    """
    import plotly.graph_objects as go

    edges = _edges(array, limit)
    place, labels = _places(edges)
    most = max(abs(edge.effect) for edge in edges) or 1.0
    traces = [
        _curve(go, edge, place, most, unit) for edge in sorted(edges, key=lambda e: abs(e.effect))
    ]
    traces += [_letters(go, edges, place), _components(go, edges, place)]
    low, high = min(x for x, _ in place.values()) - 1.3, max(x for x, _ in place.values()) + 1.3
    left_out = int(array.notnull().sum()) - len(edges)
    layout = {
        "template": theme.template(theme.LIGHT),
        "height": row * len(labels) + theme.TOP + 60,
        "width": max(420, int(column * (high - low)) + 90),
        "margin": {"l": 8, "r": 8, "t": theme.TOP, "b": 30 if left_out else 8},
        "hovermode": "closest",
        "showlegend": False,
        "xaxis": {"visible": False, "range": [low, high]},
        "yaxis": {
            "tickvals": list(range(len(labels))),
            "ticktext": labels,
            "range": [-0.6, len(labels) - 0.3],
            "showgrid": False,
            "zeroline": False,
            "automargin": True,
        },
    }
    if left_out:
        note = f"the {len(edges)} strongest of {len(edges) + left_out} edges"
        below = {
            "xref": "paper",
            "yref": "paper",
            "x": 0,
            "y": 0,
            "xanchor": "left",
            "yanchor": "top",
        }
        layout["annotations"] = [{"text": note, "showarrow": False, "font": {"size": 11}, **below}]
    return go.Figure(traces, layout)


def _edges(array: xr.DataArray, limit: int) -> list[Drawn]:
    if array.dims != ("edge",) or not {"sender", "receiver"} <= set(array.coords):
        raise ResultError(
            "a graph is drawn from one axis `edge` with coordinates sender and receiver; got "
            f"{array.dims}. Choose one "
            f"example first, e.g. result.effect[0]."
        )
    if not math.isfinite(peak(array)):
        raise ResultError("this circuit holds no edge with a number: there is nothing to draw.")
    senders, receivers = array["sender"].values, array["receiver"].values
    rows = []
    for one in strongest(array.drop_vars("edge", errors="ignore"), limit):
        target, _, side = str(receivers[one["edge"]]).partition(".")
        rows.append(
            Drawn(str(senders[one["edge"]]), target, side if side in _INPUTS else "", one["value"])
        )
    return rows


def _where(name: str) -> tuple[float, int]:
    """(layer, head): the embedding below all layers, other ends above; an MLP, as head -1, half a
    layer up."""
    match = re.fullmatch(r"L(\d+)(?:H(\d+)| mlp)", name)
    if not match:
        return (-1.0 if name == "embed" else math.inf, 0)
    layer, head = match.groups()
    return (float(layer), int(head)) if head else (int(layer) + 0.5, -1)


def _places(edges: Sequence[Drawn]) -> tuple[Places, list[str]]:
    """Where each component stands, near those it exchanges most with, and the labels of the rows
    (no empty ones)."""
    names = sorted(
        {name for edge in edges for name in edge[:2]}, key=lambda name: (*_where(name), name)
    )
    layers = list(dict.fromkeys(_floor(_where(name)[0]) for name in names))
    rows = [
        [n for n in names if _floor(_where(n)[0]) == layer and _where(n)[1] >= 0]
        for layer in layers
    ]
    right = max(map(len, rows)) / 2 + 0.6
    place: Places = {
        n: (right, layers.index(_floor(_where(n)[0])) + 0.42) for n in names if _where(n)[1] < 0
    }
    for height, row in enumerate(rows):
        place |= {name: (i - (len(row) - 1) / 2, float(height)) for i, name in enumerate(row)}

    def pull(name: str) -> float:
        near = [
            (place[e.receiver if e.sender == name else e.sender][0], abs(e.effect))
            for e in edges
            if name in e[:2]
        ]
        total = sum(weight for _, weight in near)
        return sum(x * weight for x, weight in near) / total if total else place[name][0]

    for _ in range(6):
        for height, row in enumerate(rows):
            for i, name in enumerate(sorted(row, key=lambda n: (pull(n), _where(n)))):
                place[name] = (i - (len(row) - 1) / 2, float(height))
    named = {-1.0: "embedding", math.inf: "read-out"}
    return place, [named.get(layer) or f"layer {layer:.0f}" for layer in layers]


def _floor(layer: float) -> float:
    return float(math.floor(layer)) if math.isfinite(layer) else layer


def _curve(go, edge: Drawn, place: Places, most: float, unit: str) -> go.Scatter:
    """An edge as an S-shaped line from the top of one to the bottom of the other, bent aside past
    what lies between."""
    (x0, y0), (x1, y1) = place[edge.sender], place[edge.receiver]
    x1, y0, y1 = x1 + _INPUTS.get(edge.side, 0.0), y0 + _HALF, y1 - _HALF
    past = y1 - y0 > 1 and abs(x1 - x0) < 1
    bend = min(0.35 + 0.08 * (y1 - y0), 1.1) * (1 if x0 + x1 > 0 else -1) if past else 0.0
    at = [i / _POINTS for i in range(_POINTS + 1)]
    to = f"{edge.receiver}.{edge.side}" if edge.side else edge.receiver
    return go.Scatter(
        x=[x0 + (x1 - x0) * (3 * t**2 - 2 * t**3) + bend * 4 * t * (1 - t) for t in at],
        y=[y0 + (y1 - y0) * t for t in at],
        mode="lines",
        line={
            "width": max(_THINNEST, _WIDEST * abs(edge.effect) / most),
            "color": theme.AGAINST if edge.effect < 0 else theme.TOWARDS,
        },
        opacity=0.75,
        hovertext=plain(f"{edge.sender} → {to}") + f"<br>{plain(unit)} {number(edge.effect, 3)}",
        hoverinfo="text",
    )


def _letters(go, edges: Sequence[Drawn], place: Places) -> go.Scatter:
    """q, k, v below each head, where an edge arrives."""
    arrivals = sorted({(edge.receiver, edge.side) for edge in edges if edge.side})
    return go.Scatter(
        x=[
            place[name][0] + _INPUTS[side] + (-0.12 if side == "q" else 0.12)
            for name, side in arrivals
        ],
        y=[place[name][1] - _HALF - 0.09 for name, _ in arrivals],
        mode="text",
        text=[side for _, side in arrivals],
        textfont={"size": 10},
        hoverinfo="skip",
    )


def _components(go, edges: Sequence[Drawn], place: Places) -> go.Scatter:
    texts = []
    for name in place:
        ways = sorted((e for e in edges if name in e[:2]), key=lambda e: -abs(e.effect))
        got = [
            f"from {plain(e.sender)} {e.side} {number(e.effect, 3)}"
            for e in ways
            if e.receiver == name
        ]
        sent = [
            f"to {plain(e.receiver)} {e.side} {number(e.effect, 3)}"
            for e in ways
            if e.sender == name
        ]
        texts.append("<br>".join([f"{plain(name)}", *got[:6], *sent[:6]]))
    return go.Scatter(
        x=[x for x, _ in place.values()],
        y=[y for _, y in place.values()],
        mode="markers+text",
        marker={
            "symbol": "square",
            "size": 38,
            "color": "#e9e7e0",
            "line": {"width": 1, "color": theme.NEUTRAL},
        },
        text=[plain(name).replace(" mlp", "<br>mlp") for name in place],
        textfont={"size": 10, "color": theme.LIGHT.ink},  # the box is light on either page
        hovertext=texts,
        hoverinfo="text",
    )
