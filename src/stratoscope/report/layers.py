"""Sections about layers: the prediction as it forms, what each part writes, what patching brings
back."""

from __future__ import annotations

import itertools

import numpy as np
import xarray as xr

from stratoscope.plots import bars, choose, heatmap, lines, theme
from stratoscope.plots.text import percent, plain, visible
from stratoscope.report import words
from stratoscope.report.explanation import Explanation
from stratoscope.report.section import Section, map_of
from stratoscope.report.sheet import panel

TOP_COMPONENTS = 20
NBSP = "\u00a0"  # figures collapse plain spaces


def prediction(e: Explanation) -> Section:
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
    section.panels["lens"] = map_of(
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


def direct(e: Explanation) -> Section:
    section = Section()
    if (result := e.one("layers.direct_logit_attribution")) is None:
        return section
    parts, kinds = result["contribution"], result["kind"].values
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
        section.panels["heads"] = map_of(
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
        name: float(result[name]) for name in ("logit_difference", "total", "residual_error")
    }
    section.finding = words.writers(result, e.answer, e.foil)
    return section


def patching(e: Explanation) -> Section:
    section = Section()
    sentences = []
    for key, x, what in (
        ("layers", "position", "residual stream"),
        ("heads", "head", "head outputs"),
    ):
        if (result := e.one(f"{key}.activation_patching")) is None:
            continue
        effect, null = result["effect"], result["null"]
        cell = max(6, min(14, 980 // result.sizes[x]))
        how = {
            "limit": heatmap.largest(effect, null),
            "column": cell,
            "width": cell * result.sizes[x] + 92,
        }
        how["quiet"] = chance = words.bound(result)
        section.panels[key] = [
            map_of(effect, x, "layer", f"Effect of the {what}", unit="effect", **how),
            map_of(null, x, "layer", "The null, on the same colour scale", unit="null", **how),
        ]
        section.more[key] = {
            "limit": how["limit"],
            "chance": chance,
            "draws": int(result.attrs["draws"]),
            "beyond": int((np.abs(effect.values) > chance).sum()),
            "cells": int(np.isfinite(effect.values).sum()),
            "site": result.attrs.get("site", ""),
            "null_kind": result.attrs.get("null_kind", ""),
            "clean": float(result["clean_difference"]),
            "corrupt": float(result["corrupt_difference"]),
        }
        if "corrupt_text" in result.coords:
            pair = (result[name].values.tolist() for name in ("text", "corrupt_text"))
            section.more["pairs"] = list(itertools.zip_longest(*pair, fillvalue=""))
        sentences.append((words.carried if x == "position" else words.strongest_heads)(result))
    section.finding = " ".join(text for text in sentences if text)
    return section
