"""One unit looked at: its pictures on this prompt, and what the model says once it is changed.

All changes of a unit are made in one pass: the prompt stands in it once as it is and once for each
change, which is made to that row alone. Beside them stand other heads (or neurons) of the same
layer, switched off: what chance reaches.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr

from stratoscope import catalogue
from stratoscope.engine.intervene import ablate, intervene, replaced, scaled
from stratoscope.engine.intervention import Intervention
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, StratoscopeError
from stratoscope.plots import tokens as strips
from stratoscope.plots.heatmap import largest
from stratoscope.report.section import map_of
from stratoscope.report.sheet import Panel
from stratoscope.workbench.state import State
from stratoscope.workbench.unit import Unit

if TYPE_CHECKING:
    from stratoscope.models.batch import Batch
    from stratoscope.models.lm import LM
    from stratoscope.report.explanation import Explanation

OTHERS, TOP, TEXTS = 8, 5, 8
LEAST, MOST = -4.0, 8.0  # of the strength that a unit is given


def changed(
    lm: LM, state: State, unit: Unit, factor: float | None, made: Explanation | None
) -> dict[str, Any]:
    """Rows of next tokens: as the model is, and with the unit changed in each way.

    factor: also with what it writes (or holds) times this. made: the explanation, which knows the
    corrupt prompt. Raises InputError for a factor that is no number between LEAST and MOST.
    """
    if factor is not None and not LEAST <= factor <= MOST:
        raise InputError(f"strength {factor}: give a number from {LEAST:g} to {MOST:g}.")
    began = time.perf_counter()
    batch = lm.batch(state.prompt)
    unit.refuse(lm, batch)
    ways = _ways(lm, batch, unit, state.corrupt or (made and made.corrupt_prompt) or "", factor)
    others = unit.others(lm, OTHERS)
    changes = [*ways.values(), *(ablate(other.site, **other.where) for other in others)]
    each = [replace(change, examples=[at]) for at, change in enumerate(changes, 1)]
    method = catalogue.module("tokens.next_token")
    words = _words(state, made)
    with torch.no_grad():
        if not words:
            first = method.measure(lm, batch)
            words = {name: int(first[f"{name}_id"][0]) for name in ("answer", "foil")}
        with intervene(lm, *each):
            after = method.measure(lm, [state.prompt] * (1 + len(each)), **words, top=TOP)
    difference = after["logit_difference"].values
    rows = [
        {
            "way": way,
            "tokens": list(zip(*(after[x].values[at].tolist() for x in ("token", "probability")))),
            "difference": float(difference[at]),
            "change": float(difference[at] - difference[0]) if at else None,
        }
        for at, way in enumerate(["as it is", *ways])
    ]
    chance = [float(d - difference[0]) for d in difference[1 + len(ways) :]]
    return {
        "rows": rows,
        "chance": (min(chance), max(chance), len(chance)) if chance else None,
        "answer": str(after["answer"].values[0]),
        "foil": str(after["foil"].values[0]),
        "seconds": time.perf_counter() - began,
    }


def _ways(
    lm: LM, batch: Batch, unit: Unit, corrupt: str, factor: float | None
) -> dict[str, Intervention]:
    """The changes by what they are called."""
    site, where = unit.site, unit.where
    value = capture(lm, batch, site)[site]
    mean = value.mean(dim=1, keepdim=True)
    if unit.kind in ("head", "neuron"):
        value, mean = (x[:, :, [unit.number]] for x in (value, mean))
    ways: dict[str, Intervention] = {}
    if not where.get("positions"):
        ways["switched off"] = ablate(site, **where)
    ways["at its mean over the prompt"] = replaced(site, mean, **where)
    if corrupt:
        other = lm.batch(corrupt)
        if len(other.tokens[0]) == len(batch.tokens[0]):
            there = capture(lm, other, site)[site]
            if unit.kind in ("head", "neuron"):
                there = there[:, :, [unit.number]]
            elif "positions" in where:
                there = there[:, where["positions"]]
            ways["as in the corrupt prompt"] = replaced(site, there, **where)
    if factor is not None:
        ways[f"{factor:g} times as strong"] = scaled(site, factor, **where)
    return ways


def _words(state: State, made: Explanation | None) -> dict[str, Any]:
    """Answer and foil as the explanation has them, or as they were given; nothing where neither
    is known."""
    if made is not None:
        return dict(made.words)
    given = {"answer": state.answer or None, "foil": state.foil or None}
    return given if all(given.values()) else {}


def pictures(lm: LM, state: State, unit: Unit) -> dict[str, Any]:
    """What `unit.html` shows beside the changes: panels, strips of tokens, and words.

    A head: where it looks. A neuron: its activation at every token, and the words it speaks for and
    against. An MLP, a token's stream: what the output vocabulary reads there.
    """
    batch = lm.batch(state.prompt)
    unit.refuse(lm, batch)
    shown: dict[str, Any] = {"panels": [], "strips": [], "words": {}}
    if unit.kind == "head":
        measured = catalogue.module("heads.attention_pattern").measure(
            lm, batch, layers=[unit.layer]
        )
        pattern = measured.isel(example=0, layer=0, head=unit.number)
        shown["panels"].append(_pattern(pattern))
    elif unit.kind == "neuron":
        activation = capture(lm, batch, unit.site)[unit.site][0, :, unit.number].float().cpu()
        line = _along(batch, activation)
        shown["strips"].append(("activation", strips.strip(line), largest(line)))
        try:
            told = catalogue.module("neurons.vocabulary").measure(lm, [(unit.layer, unit.number)])
            shown["words"] = {
                "speaks for": told["promoted"].values[0].tolist(),
                "speaks against": told["suppressed"].values[0].tolist(),
            }
        except StratoscopeError:  # where logits are not linear in what neurons write
            pass
    elif unit.kind in ("stream", "token"):
        lens = catalogue.module("layers.logit_lens").measure(lm, batch)
        depth = unit.layer + 1 if unit.kind == "stream" else 0
        here = lens.isel(example=0, position=unit.number, depth=depth, rank=slice(0, 8))
        shown["words"] = {"read by the output vocabulary as": here["token"].values.tolist()}
    else:
        size = capture(lm, batch, unit.site)[unit.site][0].float().norm(dim=-1).cpu()
        line = _along(batch, size)
        shown["strips"].append(("length of what it writes", strips.strip(line), largest(line)))
    return shown


def _pattern(pattern: xr.DataArray) -> Panel:
    size = pattern.sizes["query"]
    cell = max(7, min(20, 560 // size))
    how = {"centre": False, "limit": 1.0, "unit": "attention", "upward": False}
    title = "Where it looks: a row for each token that looks"
    wide = cell * size + 120
    return map_of(pattern, "key", "query", title, width=wide, row=cell, column=cell, **how)


def _along(batch: Batch, values: torch.Tensor) -> xr.DataArray:
    tokens = list(batch.tokens[0])
    coords = {"position": range(len(tokens)), "text": ("position", tokens)}
    return xr.DataArray(values.numpy(), dims="position", coords=coords)


def top_texts(lm: LM, unit: Unit, texts: Sequence[str]) -> list[tuple[float, str, str, str]]:
    """Where in the corpus a neuron is largest: its activation, what stands before the token, the
    token, what stands after. Raises InputError for another kind of unit and where there is no
    corpus."""
    if not texts:
        raise InputError("there are no texts: start the workbench with --texts FILE.")
    if unit.kind != "neuron":
        raise InputError(f"{unit.name}: top texts are found for a neuron, such as L5N12.")
    found = catalogue.module("features.examples").measure(
        lm, list(texts), site=unit.site, units=[unit.number], top=TEXTS
    )
    rows = zip(*(found[part].values[0].tolist() for part in ("activation", "token", "context")))
    parts = ((value, token, context.partition(f"<<{token}>>")) for value, token, context in rows)
    return [(value, before, token, after) for value, token, (before, _, after) in parts if token]
