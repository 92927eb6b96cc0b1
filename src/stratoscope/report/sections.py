"""The sections of the report: each function picks its results, draws them and says in a sentence
what they show.

Sentences and what may be called a cause are in `words`; what never changes stands in `page.html`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from stratoscope.plots import bars, choose, graph, heatmap, lines, theme, tokens
from stratoscope.plots.text import number, percent, plain, visible
from stratoscope.report import words
from stratoscope.report.explanation import RESULTS, Explanation
from stratoscope.report.sheet import Panel, panel

TOP_COMPONENTS, TOP_HEADS, TOP_WRITERS, TOP_NEURONS, TOP_WORDS, CIRCUIT_EDGES = 20, 6, 4, 10, 6, 40
WRITTEN = ("contribution", "raises_answer", "lowers_foil")
NBSP = "\u00a0"  # figures collapse plain spaces
_ATTRIBUTIONS = ("shapley", "occlusion")


@dataclass(slots=True)
class Section:
    """What one section shows: a finding in a sentence, panels by name, other values, what is
    missing."""

    finding: str = ""
    panels: dict[str, Panel | list[Panel]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def section_of(e: Explanation, name: str) -> Section:
    keys, build = SECTIONS[name]
    section = build(e)
    section.missing = [missing(e, key) for key in keys if key not in e.results]
    return section


def missing(e: Explanation, key: str) -> str:
    """What the reader misses, and why where that is known."""
    why = f": {e.missing[key]}" if e.missing.get(key) else "."
    return f"{RESULTS[key]} ({key}){why}"


# 1 prediction -------------------------------------------------------------------------------------


def _prediction(e: Explanation) -> Section:
    section = Section()
    names, chances = [t for t, _ in e.predictions[:10]], [p for _, p in e.predictions[:10]]
    if names:
        colour = {e.answer: theme.TOWARDS, e.foil: theme.AGAINST}
        colours = [colour.get(name, theme.NEUTRAL) for name in names]
        likely = xr.DataArray(
            chances, dims="rank", coords={"text_rank": ("rank", np.array(names, dtype=object))}
        )
        scale = ".0%" if max(chances) >= 0.05 else ".2~p" if max(chances) >= 0.001 else ".1~e"
        at_mask = "tokens at the mask"
        how = {"unit": "probability", "write": percent, "scale": scale, "colours": colours}
        drawn = bars.bars(likely, dim="rank", **how)
        section.panels["top"] = panel(
            drawn,
            f"The {len(names)} most probable {'next tokens' if e.masked is None else at_mask}",
            width=320,
        )
    if (lens := e.one("layers.logit_lens")) is None:
        return section
    best = lens.isel(rank=0)
    section.panels["lens"] = _map(
        best["probability"],
        "position",
        "depth",
        "Logit lens: the top token after each layer",
        width=38 * lens.sizes["position"] + 60,
        text=best["token"],
        hover=_candidates(lens),
        centre=False,
        limit=1.0,
        unit="probability",
        row=21,
        column=38,
    )
    at, place = e.masked, "the last token" if e.masked is None else f"the mask, token {e.masked}"
    last = lens.isel(position=-1 if at is None else at)
    rank = lines.line(
        last["answer_rank"], dim="depth", unit="rank of the answer", ranks=True, scale=",.0f"
    )
    scale = ".0%" if float(last["answer_probability"].max()) >= 0.05 else ".2~p"
    chance = lines.line(last["answer_probability"], dim="depth", unit="probability", scale=scale)
    section.panels["answer"] = [
        panel(rank, f"Rank of the answer at {place} (1 = top)", width=300),
        panel(chance, f"Probability of the answer at {place}", width=300),
    ]
    ranks = last["answer_rank"].values
    settled = len(ranks) - int(np.argmax(ranks[::-1] > 0)) if (ranks > 0).any() else 0
    if ranks[-1] > 0:
        section.finding = (
            f"{words.quoted(e.answer)} is not the model’s first choice: it ends at "
            f"rank {int(ranks[-1]) + 1}."
        )
    else:
        layers = len(ranks) - 1
        when = (
            f"{settled} of {layers} layers and stays there"
            if settled < layers
            else f"the last of {layers} layers"
        )
        section.finding = (
            f"Read through the output vocabulary, {words.quoted(e.answer)} becomes "
            f"the top token{'' if at is None else ' at the mask'} after {when}."
        )
    return section


def _candidates(lens: xr.Dataset) -> xr.DataArray:
    """The five best tokens of every cell with their probabilities, one per line, for the hover
    box."""
    five = lens.isel(rank=slice(0, 5)).transpose("depth", "position", "rank")
    lined = np.empty(five["token"].shape[:2], dtype=object)
    for i, j in np.ndindex(lined.shape):
        pairs = zip(five["token"].values[i, j].tolist(), five["probability"].values[i, j].tolist())
        lined[i, j] = "<br>".join(
            f"{plain(percent(p).rjust(6, NBSP))} {plain(visible(str(t)))}" for t, p in pairs if t
        )
    return xr.DataArray(lined, dims=("depth", "position"))


# 2 direct logit attribution -----------------------------------------------------------------------


def _direct(e: Explanation) -> Section:
    section = Section()
    if (found := e.one("layers.direct_logit_attribution")) is None:
        return section
    parts, kinds = found["contribution"], found["kind"].values
    order = {c["component"]: c["value"] for c in choose.strongest(parts, TOP_COMPONENTS)}
    names = sorted(order, key=lambda name: -order[name])
    top = xr.DataArray(
        [order[name] for name in names], dims="component", coords={"component": names}
    )
    unit = "logit difference"
    drawn = bars.bars(top, dim="component", unit=unit)
    section.panels["top"] = panel(drawn, f"The {top.size} strongest components", width=320)
    if (kinds == "head").any():
        heads = choose.spread(parts.isel(component=kinds == "head"), "layer", "head")
        limit = heatmap.largest(heads)
        title = "Attention heads, layer by head"
        section.panels["heads"] = _map(
            heads, "head", "layer", title, width=280, limit=limit, unit=unit
        )
        section.more["limit"] = limit
    if (kinds == "mlp").any():
        mlps = choose.spread(parts.isel(component=kinds == "mlp"), "layer")
        drawn = bars.bars(mlps, dim="layer", unit=unit, upward=True, row=18, written=False)
        section.panels["mlps"] = panel(drawn, "MLPs, layer by layer", width=240)
    section.more["sums"] = {
        kind: float(parts.values[kinds == kind].sum()) for kind in dict.fromkeys(kinds.tolist())
    }
    section.more |= {
        name: float(found[name]) for name in ("logit_difference", "total", "residual_error")
    }
    section.finding = words.writers(found, e.answer, e.foil)
    return section


# 3 activation patching ----------------------------------------------------------------------------


def _patching(e: Explanation) -> Section:
    section = Section()
    said = []
    for key, x, what in (
        ("layers", "position", "residual stream"),
        ("heads", "head", "head outputs"),
    ):
        if (found := e.one(f"{key}.activation_patching")) is None:
            continue
        effect, null = found["effect"], found["null"]
        cell = max(6, min(14, 980 // found.sizes[x]))
        how = {
            "limit": heatmap.largest(effect, null),
            "column": cell,
            "width": cell * found.sizes[x] + 92,
        }
        how["quiet"] = chance = words.bound(found)
        section.panels[key] = [
            _map(effect, x, "layer", f"Effect of the {what}", unit="effect", **how),
            _map(null, x, "layer", "The null, on the same colour scale", unit="null", **how),
        ]
        section.more[key] = {
            "limit": how["limit"],
            "chance": chance,
            "draws": int(found.attrs["draws"]),
            "beyond": int((np.abs(effect.values) > chance).sum()),
            "cells": int(np.isfinite(effect.values).sum()),
            "site": found.attrs.get("site", ""),
            "null_kind": found.attrs.get("null_kind", ""),
            "clean": float(found["clean_difference"]),
            "corrupt": float(found["corrupt_difference"]),
        }
        if "corrupt_text" in found.coords:
            pair = (found[name].values.tolist() for name in ("text", "corrupt_text"))
            section.more["pairs"] = list(itertools.zip_longest(*pair, fillvalue=""))
        said.append((words.carried if x == "position" else words.strongest_heads)(found))
    section.finding = " ".join(text for text in said if text)
    return section


# 4 heads ------------------------------------------------------------------------------------------


def _heads(e: Explanation) -> Section:
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
        both = {name: (*pair, reach[name]) for name, pair in scores.items()}
        row["role"] = words.role(both, row.get("contribution"))
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
    found = choose.strongest(effects["effect"], TOP_HEADS) if effects is not None else []
    found += (
        choose.strongest(written["contribution"], TOP_WRITERS if found else TOP_HEADS)
        if written
        else []
    )
    return list(
        {words.head_name(p): {"layer": p["layer"], "head": p["head"]} for p in found}.values()
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
    return _map(one, "key", "query", title, **how)


# 5 neurons ----------------------------------------------------------------------------------------


def _neurons(e: Explanation) -> Section:
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


def _units(found: xr.Dataset | None) -> list[tuple[int, int]]:
    return (
        list(zip(found["layer"].values.tolist(), found["neuron"].values.tolist()))
        if found is not None
        else []
    )


def _unit(found: xr.Dataset | None, part: str, unit: tuple[int, int], otherwise: Any) -> Any:
    """The entry of one neuron in a result over `unit`, or `otherwise` where it was not measured."""
    at = _units(found)
    return (
        found[part].isel(unit=at.index(unit)).values.tolist()
        if found is not None and unit in at
        else otherwise
    )


# 6 tokens -----------------------------------------------------------------------------------------


def _tokens(e: Explanation) -> Section:
    section = Section()
    found = {name: e.one(f"tokens.{name}") for name in _ATTRIBUTIONS}
    given = {
        spaced(name): result["attribution"] for name, result in found.items() if result is not None
    }
    section.more["strips"] = [
        {
            "name": name,
            "strip": tokens.strip(value),
            "largest": heatmap.largest(value),
            "sum": float(value.sum()),
        }
        for name, value in given.items()
    ]
    section.more["error"] = None
    if (sampled := found["shapley"]) is not None:
        names = {"passes": "passes", "whole": "logit_difference", "absent": "absent_difference"}
        sizes = {key: float(sampled[name]) for key, name in names.items()}
        sizes["error"] = float(sampled["standard_error"].max())
        if np.isfinite(list(sizes.values())).all():
            section.more |= sizes
    if not given:
        return section
    drawn = bars.grouped(given, dim="position", unit="attribution (logits)")
    size = next(iter(given.values())).sizes["position"]
    section.panels["bars"] = panel(
        drawn, "The same numbers as bars, on one axis", width=28 * size + 80
    )
    tops = {
        name: choose.strongest(value, 1)[0]
        for name, value in given.items()
        if np.isfinite(value.values).any()
    }
    where = {name: words.token(given[name], top["position"]) for name, top in tops.items()}
    if len(tops) > 1 and len(set(where.values())) == 1:
        said = ", ".join(f"{name} {number(top['value'])}" for name, top in tops.items())
        section.finding = f"Both methods single out {next(iter(where.values()))}: {said}."
    elif tops:
        said = ", ".join(
            f"{name} {where[name]} ({number(top['value'])})" for name, top in tops.items()
        )
        section.finding = f"The strongest token by each method: {said}."
    return section


# circuit ------------------------------------------------------------------------------------------


def _circuit(e: Explanation) -> Section:
    section, found = Section(), e.one("circuits.discover")
    if found is None or not np.isfinite(found["effect"].values).any():
        return section
    title = (
        f"The strongest {min(CIRCUIT_EDGES, found.sizes['edge'])} of its "
        f"{found.sizes['edge']:,} edges"
    )
    section.panels["graph"] = panel(graph.graph(found["effect"], limit=CIRCUIT_EDGES), title, 700)
    sizes = [f"{int(size):,}" for size in found["size"].values]
    for name in ("faithfulness", "completeness", "minimality"):
        curve = found[name].drop_vars("size").assign_coords(step=sizes)
        drawn = lines.line(curve, dim="step", unit=name)
        section.panels[name] = panel(drawn, f"{name.capitalize()} by number of edges", 330)
    faithful = found["faithfulness"].values
    at = next((i for i, value in enumerate(faithful) if abs(value - 1) <= 0.1), len(faithful) - 1)
    section.more["null"] = number(float(found["null_faithfulness"].isel(step=at).max()))
    section.finding = (
        f"{sizes[at]} of {int(found.attrs['of']):,} edges keep {number(float(faithful[at]))} of "
        "the logit difference; "
        f"random circuits of that size keep at most {section.more['null']}."
    )
    return section


SECTIONS: dict[str, tuple[tuple[str, ...], Callable[[Explanation], Section]]] = {
    "prediction": (("layers.logit_lens",), _prediction),
    "direct": (("layers.direct_logit_attribution",), _direct),
    "patching": (("layers.activation_patching", "heads.activation_patching"), _patching),
    "heads": (("heads.roles", "heads.attention_pattern"), _heads),
    "neurons": (("neurons.contribution", "neurons.vocabulary", "clamp"), _neurons),
    "tokens": (tuple(f"tokens.{name}" for name in _ATTRIBUTIONS), _tokens),
    "circuit": (("circuits.discover",), _circuit),
}


# shared -------------------------------------------------------------------------------------------


def _map(array: xr.DataArray, x: str, y: str, title: str, *, width: int, **how: Any) -> Panel:
    """A heatmap without its own colour bar: the page draws one legend for all that share a
    scale."""
    return panel(heatmap.heatmap(array, x=x, y=y, colourbar=False, **how), title, width)


def spaced(name: str) -> str:
    return name.replace("shapley", "Shapley values").replace("_", " ")
