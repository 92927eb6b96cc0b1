"""Sections about single heads and single neurons."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from stratoscope.plots import choose
from stratoscope.plots.text import number
from stratoscope.report import words
from stratoscope.report.explanation import Explanation
from stratoscope.report.section import Section, map_of
from stratoscope.report.sheet import Panel

TOP_HEADS, TOP_WRITERS, TOP_NEURONS, TOP_WORDS = 6, 4, 10, 6
WRITTEN = ("contribution", "raises_answer", "lowers_foil")


def heads(e: Explanation) -> Section:
    section = Section()
    effects, direct = e.one("heads.activation_patching"), e.one("layers.direct_logit_attribution")
    written = None
    if direct is not None and (isa := direct["kind"].values == "head").any():
        parts = direct.isel(component=isa)
        written = {name: choose.spread(parts[name], "layer", "head") for name in WRITTEN}
    if effects is None and written is None:
        return section
    roles, pattern = e.one("heads.roles"), e.one("heads.attention_pattern")
    reach = (
        {} if roles is None else {r: _peak(roles["null"], r) for r in roles["role"].values.tolist()}
    )
    rows = []
    for at in _places(effects, written):
        row: dict[str, Any] = {"name": words.head_name(at), "at": at}
        row["effect"] = float(choose.pick(effects["effect"], **at)) if effects is not None else None
        row["beyond"] = effects is None or abs(row["effect"]) > words.bound(effects)
        row |= {name: float(choose.pick(grid, **at)) for name, grid in (written or {}).items()}
        scores = _scores(roles, at) if roles is not None else {}
        row["roles"] = list(scores.values())
        all_roles = {name: (*pair, reach[name]) for name, pair in scores.items()}
        row["role"] = words.role(all_roles, row.get("contribution"))
        rows.append(row)
    notes = roles.attrs if roles is not None else {}
    section.more = {
        "rows": rows,
        "written": list(written or ()),
        "roles": list(reach),
        "definitions": {name: notes.get(f"definition_{name}", "") for name in reach},
        "greyed": not all(row["beyond"] for row in rows),
    }
    if pattern is not None:
        section.panels["patterns"] = [
            _pattern(choose.pick(pattern, **row["at"]), row) for row in rows
        ]
    if effects is not None:
        section.finding = words.strongest_heads(effects)
    if known := [(row["name"], row["role"]) for row in rows if row["role"] and row["beyond"]]:
        section.finding += f" By their role scores, {words.are(known[:4])}."
    return section


def _places(
    effects: xr.Dataset | None, written: dict[str, xr.DataArray] | None
) -> list[dict[str, int]]:
    """The heads of largest effect, then the strongest direct writers among the others."""
    places = choose.strongest(effects["effect"], TOP_HEADS) if effects is not None else []
    places += (
        choose.strongest(written["contribution"], TOP_WRITERS if places else TOP_HEADS)
        if written
        else []
    )
    return list(
        {words.head_name(p): {"layer": p["layer"], "head": p["head"]} for p in places}.values()
    )


def _peak(null: xr.DataArray, role: str) -> float:
    return choose.peak(null.sel(role=role))


def _scores(roles: xr.Dataset, at: dict[str, int]) -> dict[str, tuple[float, float]]:
    """Score and null of one head in every role."""
    score, null = (choose.pick(roles[part], **at).values.tolist() for part in ("score", "null"))
    return dict(zip(roles["role"].values.tolist(), zip(score, null)))


def _pattern(one: xr.DataArray, row: dict[str, Any]) -> Panel:
    strength = row["effect"] if row["effect"] is not None else row["contribution"]
    title = f"{row['name']}{' (' + row['role'] + ')' if row['role'] else ''} {number(strength)}"
    n = one.sizes["query"]
    cell = max(6, min(16, 480 // n))
    how = {"centre": False, "limit": 1.0, "unit": "attention", "upward": False}
    how |= {"row": cell, "column": min(cell, 11), "width": min(cell, 11) * n + 100}
    return map_of(one, "key", "query", title, **how)


def neurons(e: Explanation) -> Section:
    section = Section()
    measured, vocabulary, clamp = (
        e.one("neurons.contribution"),
        e.one("neurons.vocabulary"),
        e.one("clamp"),
    )
    units = _units(vocabulary) or _units(clamp)
    if not units and measured is not None:
        units = [
            (place["layer"], place["neuron"])
            for place in choose.strongest(measured["contribution"], TOP_NEURONS)
        ]
    null = clamp.get("null_change") if clamp is not None else None
    chance = choose.peak(null) if null is not None else float("nan")
    rows = []
    for layer, neuron in units[:TOP_NEURONS]:
        row: dict[str, Any] = {"layer": layer, "neuron": neuron, "promoted": [], "suppressed": []}
        for part in ("activation", "contribution"):
            row[part] = (
                float(choose.pick(measured[part], layer=layer, neuron=neuron))
                if measured is not None
                else None
            )
        for part in ("promoted", "suppressed"):
            row[part] = [t for t in _unit(vocabulary, part, (layer, neuron), []) if t][:TOP_WORDS]
        # the direction is written the other way round
        if row["activation"] is not None and row["activation"] < 0:
            row["promoted"], row["suppressed"] = row["suppressed"], row["promoted"]
        before, after = (
            _unit(clamp, f"difference_{when}", (layer, neuron), None)
            for when in ("before", "after")
        )
        row["clamp"] = (
            (float(before), float(after)) if before is not None and after is not None else None
        )
        row["beyond"] = row["clamp"] is not None and abs(row["clamp"][1] - row["clamp"][0]) > chance
        rows.append(row)
    written = [abs(row["contribution"]) for row in rows if row["contribution"] is not None]
    section.more = {
        "rows": rows,
        "limit": max((w for w in written if np.isfinite(w)), default=0.0) or 1.0,
        "off": clamp is not None,
    }
    if measured is not None and rows:
        best = max(
            rows,
            key=lambda row: abs(row["contribution"]) if np.isfinite(row["contribution"]) else 0.0,
        )
        total, n = float(measured["contribution"].sum()), measured["contribution"].size
        section.finding = (
            f"Neuron {best['neuron']} of layer {best['layer']} writes "
            f"{number(best['contribution'])} to the "
            f"logit difference, the most of {n:,} neurons; all of them together write "
            f"{number(total)}."
        )
    if rows and np.isfinite(chance):
        clear = sum(row["beyond"] for row in rows)
        section.more |= {"chance": chance, "draws": null.size}
        section.finding += (
            f" Switched off one by one, {clear or 'none'} of these {len(rows)} "
            f"change{'s' if clear == 1 else ''} the "
            f"difference by more than any of {null.size} random neurons of the same layers "
            f"({number(chance, sign=False)})."
        )
    return section


def _units(units: xr.Dataset | None) -> list[tuple[int, int]]:
    return (
        list(zip(units["layer"].values.tolist(), units["neuron"].values.tolist()))
        if units is not None
        else []
    )


def _unit(units: xr.Dataset | None, part: str, unit: tuple[int, int], otherwise: Any) -> Any:
    """The entry of one neuron in a result over `unit`, or `otherwise` where it was not measured."""
    at = _units(units)
    return (
        units[part].isel(unit=at.index(unit)).values.tolist()
        if units is not None and unit in at
        else otherwise
    )
