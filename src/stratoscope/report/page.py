"""The one-file HTML report of one explained prediction: every picture, its null, its reading and its limits.

`Explanation` holds what was computed; each section function below picks its results, draws them with `plots`
and says in one sentence what they show; `page.html` holds the words that never change (how to read, what it
does not show). A result that is missing is said to be missing. The page needs no network: plotly.js is in it
once, and its content security policy forbids every request. All text of the model or the user is escaped:
HTML by jinja's autoescape, figure labels by `plots.text.plain`, and figure data by writing `<` as `\\u003c`.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stratoscope import catalogue
from stratoscope.claims import ledger
from stratoscope.errors import ResultError
from stratoscope.plots import bars, choose, graph, heatmap, lines, theme, tokens
from stratoscope.plots.text import number, percent, plain, shorten, visible
from stratoscope.plots.ticks import Ticks
from stratoscope.report import paper, sheet
from stratoscope.report.sheet import Panel, panel

# Every result the page can show, and what the reader misses without it.
RESULTS = {
    "layers.logit_lens": "what each layer would predict",
    "layers.direct_logit_attribution": "which components write the answer directly",
    "layers.activation_patching": "which layers and tokens carry the answer causally",
    "heads.activation_patching": "which heads carry the answer causally",
    "heads.attention_pattern": "where the top heads look",
    "heads.roles": "what the top heads do in general",
    "neurons.contribution": "which neurons write the answer directly",
    "neurons.vocabulary": "which tokens the top neurons promote",
    "clamp": "what happens when a top neuron is switched off",
    "tokens.integrated_gradients": "input tokens by integrated gradients",
    "tokens.gradient_times_input": "input tokens by gradient × input",
    "tokens.occlusion": "input tokens by occlusion",
    "tokens.verbalize": "the summary in words",
    "circuits.discover": "a circuit of edges between components, which --circuit adds",
}
TOP_COMPONENTS, TOP_HEADS, TOP_NEURONS, TOP_WORDS, CIRCUIT_EDGES = 20, 6, 10, 6, 40
NBSP = "\u00a0"  # figures collapse plain spaces
_ATTRIBUTIONS = ("integrated_gradients", "gradient_times_input", "occlusion")


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything one report shows; every entry of `results` (its keys are those of `RESULTS`) is optional.

    prompt: the text given; tokens: the model's tokens of it, in order. answer, foil: the two next tokens
    compared. corrupt_how: one sentence on how the corrupt prompt was made. notes: warnings for the reader.
    predictions: the most probable next tokens with their probabilities, best first. results: one example each
    (`example` of size 1 or absent). answer_probability, foil_probability: given when the token is not among
    `predictions`. provenance: model, weights, dtype, kernel, device, versions (dict), seed, seconds,
    peak_memory_mb, seconds_by_step (dict), command; others too.

    Raises ResultError for a key of `results` that the page does not know.
    """

    prompt: str
    tokens: Sequence[str]
    answer: str
    foil: str
    predictions: Sequence[tuple[str, float]]
    results: Mapping[str, xr.Dataset | xr.DataArray]
    provenance: Mapping[str, Any]
    corrupt_prompt: str | None = None
    corrupt_how: str = ""
    notes: Sequence[str] = ()
    answer_probability: float | None = None
    foil_probability: float | None = None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.results) - set(RESULTS)):
            raise ResultError(f"The report was given {unknown}; it can show {sorted(RESULTS)}.")

    def one(self, key: str) -> Any:
        """The result named `key` without its example axis, or None when it was not measured."""
        found = self.results.get(key)
        return found.isel(example=0) if found is not None and "example" in found.dims else found


@dataclass(slots=True)
class Section:
    """What one section shows: a finding in a sentence, panels by name, other values, what is missing."""

    finding: str = ""
    panels: dict[str, Panel | list[Panel]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def render(explanation: Explanation) -> str:
    """The whole report as one HTML text that makes no request when it is opened."""
    return sheet.render(
        "page.html",
        e=explanation,
        chances={"answer": _chance(explanation, "answer"), "foil": _chance(explanation, "foil")},
        summary=_summary(explanation),
        sections={name: _section(explanation, name) for name in SECTIONS},
        papers=_papers(explanation),
        facts=_facts(explanation.provenance),
    )


def write(explanation: Explanation, path: str | os.PathLike[str]) -> Path:
    """Render and write; the file is complete or not there at all, whatever interrupts the writing.

    Raises ResultError when the file cannot be written.
    """
    return sheet.write(render(explanation), path)


def _papers(e: Explanation) -> dict[str, list[dict[str, Any]]]:
    """For each section the papers of its methods that have a verdict: the one that decides, with its figure."""
    atlas, methods = ledger.atlas(), {entry.address: entry for entry in catalogue.methods()}
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (keys, _) in SECTIONS.items():
        shown = (*keys, "tokens.verbalize") if name == "tokens" else keys  # the words stand there once more
        names = (methods[key].paper for key in shown if key in e.results and key in methods)
        entries = [atlas.entries[key] for key in dict.fromkeys(names) if key in atlas.entries]
        found[name] = [paper.decided(entry) for entry in entries if entry.deciding()]
    return found


def _section(e: Explanation, name: str) -> Section:
    keys, build = SECTIONS[name]
    section = build(e)
    section.missing = [f"{RESULTS[key]} ({key})" for key in keys if key not in e.results]
    return section


# 1 prediction -------------------------------------------------------------------------------------


def _prediction(e: Explanation) -> Section:
    section = Section()
    names, chances = [t for t, _ in e.predictions[:10]], [p for _, p in e.predictions[:10]]
    if names:
        colour = {e.answer: theme.TOWARDS, e.foil: theme.AGAINST}
        colours = [colour.get(name, theme.NEUTRAL) for name in names]
        likely = xr.DataArray(chances, dims="rank", coords={"text_rank": ("rank", np.array(names, dtype=object))})
        how = {"unit": "probability", "write": percent, "scale": ".0%", "colours": colours}
        drawn = bars.bars(likely, dim="rank", **how)
        section.panels["top"] = panel(drawn, f"The {len(names)} most probable next tokens", width=320)
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
    last = lens.isel(position=-1)
    rank = lines.line(last["answer_rank"], dim="depth", unit="rank of the answer", ranks=True, scale=",.0f")
    chance = lines.line(last["answer_probability"], dim="depth", unit="probability", scale=".1%")
    section.panels["answer"] = [
        panel(rank, "Rank of the answer at the last token (1 = top)", width=300),
        panel(chance, "Probability of the answer at the last token", width=300),
    ]
    ranks = last["answer_rank"].values
    settled = len(ranks) - int(np.argmax(ranks[::-1] > 0)) if (ranks > 0).any() else 0
    if ranks[-1] > 0:
        section.finding = f"{_q(e.answer)} is not the model’s first choice: it ends at rank {int(ranks[-1]) + 1}."
    else:
        section.finding = (
            f"Read through the output vocabulary, {_q(e.answer)} becomes the top token after "
            f"{settled} of {len(ranks) - 1} layers and stays there."
        )
    return section


def _candidates(lens: xr.Dataset) -> xr.DataArray:
    """The five best tokens of every cell with their probabilities, one per line, for the hover box."""
    five = lens.isel(rank=slice(0, 5)).transpose("depth", "position", "rank")
    lined = np.empty(five["token"].shape[:2], dtype=object)
    for i, j in np.ndindex(lined.shape):
        pairs = zip(five["token"].values[i, j].tolist(), five["probability"].values[i, j].tolist())
        lined[i, j] = "<br>".join(f"{plain(percent(p).rjust(6, NBSP))} {plain(visible(str(t)))}" for t, p in pairs if t)
    return xr.DataArray(lined, dims=("depth", "position"))


# 2 direct logit attribution -----------------------------------------------------------------------


def _direct(e: Explanation) -> Section:
    section = Section()
    if (found := e.one("layers.direct_logit_attribution")) is None:
        return section
    parts, kinds = found["contribution"], found["kind"].values
    order = {c["component"]: c["value"] for c in choose.strongest(parts, TOP_COMPONENTS)}
    names = sorted(order, key=lambda name: -order[name])
    top = xr.DataArray([order[name] for name in names], dims="component", coords={"component": names})
    unit = "logit difference"
    drawn = bars.bars(top, dim="component", unit=unit)
    section.panels["top"] = panel(drawn, f"The {top.size} strongest components", width=320)
    if (kinds == "head").any():
        heads = choose.spread(parts.isel(component=kinds == "head"), "layer", "head")
        limit = heatmap.largest(heads)
        title = "Attention heads, layer by head"
        section.panels["heads"] = _map(heads, "head", "layer", title, width=280, limit=limit, unit=unit)
        section.more["limit"] = limit
    if (kinds == "mlp").any():
        mlps = choose.spread(parts.isel(component=kinds == "mlp"), "layer")
        drawn = bars.bars(mlps, dim="layer", unit=unit, upward=True, row=18, written=False)
        section.panels["mlps"] = panel(drawn, "MLPs, layer by layer", width=240)
    section.more["sums"] = {kind: float(parts.values[kinds == kind].sum()) for kind in dict.fromkeys(kinds.tolist())}
    section.more |= {name: float(found[name]) for name in ("logit_difference", "total", "residual_error")}
    said = []
    for name, way, sign in ((names[:1], "towards", 1), (names[-1:], "against", -1)):
        if name and sign * order[name[0]] > 0:
            said.append(f"{name[0]} writes most {way} {_q(e.answer)} ({number(order[name[0]])} logits)")
    if said:
        whole = number(section.more["logit_difference"])
        section.finding = f"{' and '.join(said)}, out of a difference of {whole}."
    return section


# 3 activation patching ----------------------------------------------------------------------------


def _patching(e: Explanation) -> Section:
    section = Section()
    said = []
    for key, x, what in (("layers", "position", "residual stream"), ("heads", "head", "head outputs")):
        if (found := e.one(f"{key}.activation_patching")) is None:
            continue
        effect, null = found["effect"], found["null"]
        cell = max(6, min(14, 980 // found.sizes[x]))
        how = {"limit": heatmap.largest(effect, null), "column": cell, "width": cell * found.sizes[x] + 92}
        section.panels[key] = [
            _map(effect, x, "layer", f"Effect of the {what}", unit="effect", **how),
            _map(null, x, "layer", "The null, on the same colour scale", unit="null", **how),
        ]
        chance = choose.peak(null)
        section.more[key] = {
            "limit": how["limit"],
            "chance": chance,
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
        said.append(_carried(effect, chance) if x == "position" else _largest_head(effect, chance))
    section.finding = " ".join(text for text in said if text)
    return section


def _carried(effect: xr.DataArray, chance: float) -> str:
    """Which token has the largest effect in which run of layers, where that exceeds the null; "" for none."""
    grid = effect.transpose("layer", "position")
    layers, best = grid["layer"].values.tolist(), np.nan_to_num(grid.values, nan=-np.inf).argmax(axis=1)
    clear = grid.values[np.arange(len(layers)), best] > chance
    runs = []
    stations = zip(best.tolist(), clear.tolist(), layers)
    for (token, exceeds), run in itertools.groupby(stations, key=lambda station: station[:2]):
        ends = [layer for *_, layer in run]
        if exceeds and len(ends) > 1:  # a single layer is not a station on the way
            where = _token(grid, grid["position"].values[token].item())
            runs.append(f"{where} in layers {ends[0]} to {ends[-1]}")
    if len(runs) > 4:
        return f"The token whose residual stream restores most changes {len(runs) - 1} times over the layers."
    return f"The residual stream restores most at {', then at '.join(runs)}." if runs else ""


def _largest_head(effect: xr.DataArray, chance: float) -> str:
    for best in choose.strongest(effect, 1):
        null = f", where the null reaches {number(chance, sign=False)}" if np.isfinite(chance) else ""
        return f"The head with the largest effect is {_head_name(best)} ({number(best['value'])}{null})."
    return ""


# 4 heads ------------------------------------------------------------------------------------------


def _heads(e: Explanation) -> Section:
    section = Section()
    effects, direct = e.one("heads.activation_patching"), e.one("layers.direct_logit_attribution")
    written = None
    if direct is not None and (isa := direct["kind"].values == "head").any():
        written = choose.spread(direct["contribution"].isel(component=isa), "layer", "head")
    ranking = effects["effect"] if effects is not None else written
    if ranking is None:
        return section
    roles, pattern = e.one("heads.roles"), e.one("heads.attention_pattern")
    names = roles["role"].values.tolist() if roles is not None else []
    notes = roles.attrs if roles is not None else {}
    rows, panels = [], []
    for place in choose.strongest(ranking, TOP_HEADS):
        at = {"layer": place["layer"], "head": place["head"]}
        row: dict[str, Any] = {
            "name": _head_name(place),
            "effect": place["value"] if effects is not None else None,
            "written": float(choose.pick(written, **at)) if written is not None else None,
            "roles": _scores(roles, at) if roles is not None else [],
        }
        rows.append(row)
        if pattern is not None:
            n = pattern.sizes["query"]
            how = {"centre": False, "limit": 1.0, "unit": "attention", "upward": False}
            cell = max(6, min(16, 480 // n))
            how |= {"row": cell, "column": min(cell, 11), "width": min(cell, 11) * n + 100}
            panels.append(_map(choose.pick(pattern, **at), "key", "query", _head_title(row, names), **how))
    section.more = {
        "rows": rows,
        "roles": names,
        "definitions": {name: notes.get(f"definition_{name}", "") for name in names},
        "by": "causal effect" if effects is not None else "direct contribution",
    }
    if panels:
        section.panels["patterns"] = panels
    shown = [f"{row['name']}{_role_of(row, names)}" for row in rows[:3]]
    if shown:
        section.finding = f"By {section.more['by']}, the strongest heads are {', '.join(shown)}."
    return section


def _scores(roles: xr.Dataset, at: dict[str, int]) -> list[tuple[float, float]]:
    """Score and null of one head in every role."""
    score, null = (choose.pick(roles[part], **at).values.tolist() for part in ("score", "null"))
    return list(zip(score, null))


def _role_of(row: dict[str, Any], names: list[str]) -> str:
    """The role a head scores highest in, in brackets, if clear of its null (twice it, and 0.2 more)."""
    clear = [(s, name) for (s, null), name in zip(row["roles"], names) if s > max(2 * null, null + 0.2)]
    return f" ({max(clear)[1].replace('_', ' ')})" if clear else ""


def _head_title(row: dict[str, Any], names: list[str]) -> str:
    strength = row["effect"] if row["effect"] is not None else row["written"]
    return f"{row['name']}{_role_of(row, names)} {number(strength)}"


# 5 neurons ----------------------------------------------------------------------------------------


def _neurons(e: Explanation) -> Section:
    section = Section()
    measured, vocabulary, clamp = e.one("neurons.contribution"), e.one("neurons.vocabulary"), e.one("clamp")
    units = _units(vocabulary) or _units(clamp)
    if not units and measured is not None:
        units = [(place["layer"], place["neuron"]) for place in choose.strongest(measured["contribution"], TOP_NEURONS)]
    rows = []
    for layer, neuron in units[:TOP_NEURONS]:
        row: dict[str, Any] = {"layer": layer, "neuron": neuron, "promoted": [], "suppressed": []}
        for part in ("activation", "contribution"):
            row[part] = float(choose.pick(measured[part], layer=layer, neuron=neuron)) if measured is not None else None
        for part in ("promoted", "suppressed"):
            row[part] = [t for t in _unit(vocabulary, part, (layer, neuron), []) if t][:TOP_WORDS]
        if row["activation"] is not None and row["activation"] < 0:  # the direction is written the other way round
            row["promoted"], row["suppressed"] = row["suppressed"], row["promoted"]
        before, after = (_unit(clamp, f"difference_{when}", (layer, neuron), None) for when in ("before", "after"))
        row["clamp"] = (float(before), float(after)) if before is not None and after is not None else None
        rows.append(row)
    written = [abs(row["contribution"]) for row in rows if row["contribution"] is not None]
    section.more = {"rows": rows, "limit": max((w for w in written if np.isfinite(w)), default=0.0) or 1.0}
    if measured is not None and rows:
        best = max(rows, key=lambda row: abs(row["contribution"]) if np.isfinite(row["contribution"]) else 0.0)
        total, n = float(measured["contribution"].sum()), measured["contribution"].size
        section.finding = (
            f"Neuron {best['neuron']} of layer {best['layer']} writes {number(best['contribution'])} to the "
            f"logit difference, the most of {n:,} neurons; all of them together write {number(total)}."
        )
    return section


def _units(found: xr.Dataset | None) -> list[tuple[int, int]]:
    return list(zip(found["layer"].values.tolist(), found["neuron"].values.tolist())) if found is not None else []


def _unit(found: xr.Dataset | None, part: str, unit: tuple[int, int], otherwise: Any) -> Any:
    """The entry of one neuron in a result over `unit`, or `otherwise` where it was not measured."""
    at = _units(found)
    return found[part].isel(unit=at.index(unit)).values.tolist() if found is not None and unit in at else otherwise


# 6 tokens -----------------------------------------------------------------------------------------


def _tokens(e: Explanation) -> Section:
    section = Section()
    found = {name: e.one(f"tokens.{name}") for name in _ATTRIBUTIONS}
    given = {_words(name): result["attribution"] for name, result in found.items() if result is not None}
    section.more["strips"] = [
        {
            "name": name,
            "strip": tokens.strip(value),
            "largest": heatmap.largest(value),
            "sum": float(value.sum()),
        }
        for name, value in given.items()
    ]
    integrated = found["integrated_gradients"]
    section.more["completeness"] = (
        float(integrated["completeness_error"])
        if integrated is not None and "completeness_error" in integrated
        else None
    )
    if not given:
        return section
    drawn = bars.grouped(given, dim="position", unit="attribution (logits)")
    size = next(iter(given.values())).sizes["position"]
    section.panels["bars"] = panel(drawn, "The same numbers as bars, on one axis", width=28 * size + 80)
    tops = {name: choose.strongest(value, 1)[0] for name, value in given.items() if np.isfinite(value.values).any()}
    where = {name: _token(given[name], top["position"]) for name, top in tops.items()}
    if len(tops) > 1 and len(set(where.values())) == 1:
        said = ", ".join(f"{name} {number(top['value'])}" for name, top in tops.items())
        section.finding = f"All {len(tops)} methods single out {next(iter(where.values()))}: {said}."
    elif tops:
        said = ", ".join(f"{name} {where[name]} ({number(top['value'])})" for name, top in tops.items())
        section.finding = f"The strongest token by each method: {said}."
    return section


# circuit ------------------------------------------------------------------------------------------


def _circuit(e: Explanation) -> Section:
    section, found = Section(), e.one("circuits.discover")
    if found is None or not np.isfinite(found["effect"].values).any():
        return section
    title = f"The strongest {min(CIRCUIT_EDGES, found.sizes['edge'])} of its {found.sizes['edge']:,} edges"
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
        f"{sizes[at]} of {int(found.attrs['of']):,} edges keep {number(float(faithful[at]))} of the logit difference; "
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
    """A heatmap without its own colour bar: the page draws one legend for all that share a scale."""
    return panel(heatmap.heatmap(array, x=x, y=y, colourbar=False, **how), title, width)


def _chance(e: Explanation, which: str) -> float | None:
    given = getattr(e, f"{which}_probability")
    return given if given is not None else dict(e.predictions).get(getattr(e, which))


def _summary(e: Explanation) -> str:
    found = e.one("tokens.verbalize")
    return str(found["text"].item()) if found is not None else ""


def _facts(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The provenance as rows; what the page shows elsewhere (command, seconds by step) is left out."""
    rows = []
    for name, value in provenance.items():
        if name in ("command", "seconds_by_step"):
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif name == "seconds":
            value = f"{value:,.1f}"
        elif name == "peak_memory_mb":
            name, value = "peak memory", f"{value:,.0f} MB"
        rows.append((_words(name), str(value)))
    return rows


def _words(name: str) -> str:
    return name.replace("gradient_times_input", "gradient × input").replace("_", " ")


def _q(token: str) -> str:
    return f"“{shorten(visible(token), 40)}”"


def _token(array: xr.DataArray, position: int) -> str:
    place = array["position"].values.tolist().index(position)
    return f"token {position} “{shorten(Ticks.of(array, 'position').labels[place], 40)}”"


def _head_name(place: Mapping[str, Any]) -> str:
    return f"L{place['layer']}H{place['head']}"
