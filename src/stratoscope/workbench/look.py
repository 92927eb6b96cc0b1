"""One unit looked at: its pictures on this prompt, and what the model says once it is changed.

All changes of a unit are made in one pass: the prompt stands in it once for each change, which is
made to that row alone. Beside them stand other heads (or neurons) of the same layer, switched off:
what chance reaches.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
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

Once = Callable[[tuple[str, ...], Callable[[], Any]], Any]  # by its name, or made
OTHERS, TOP, TEXTS = 8, 5, 8
LONG = 128  # tokens: of a longer prompt not the patterns of all layers are kept
LEAST, MOST = -4.0, 8.0  # of the strength that a unit is given


def anew(name: tuple[str, ...], make: Callable[[], Any]) -> Any:
    """Keeps nothing."""
    return make()


@torch.no_grad()
def changed(
    lm: LM,
    state: State,
    unit: Unit,
    factor: float | None,
    made: Explanation | None,
    once: Once = anew,
) -> dict[str, Any]:
    """Rows of next tokens: as the model is, and with the unit changed in each way.

    factor: also with what it writes (or holds) times this. made: the explanation, which knows the
    corrupt prompt. once: keeps what the next click will ask again. Raises InputError for a factor
    that is no number between LEAST and MOST.
    """
    if factor is not None and not LEAST <= factor <= MOST:
        raise InputError(f"strength {factor}: give a number from {LEAST:g} to {MOST:g}.")
    began = time.perf_counter()
    batch = lm.batch(state.prompt)
    unit.refuse(lm, batch)
    words, plain = _plain(lm, state, made, once)
    corrupt = state.corrupt or (made and made.corrupt_prompt) or ""
    ways = _ways(lm, batch, unit, corrupt, factor, once)
    after = _after(lm, state.prompt, list(ways.values()), words)
    whole = [plain, *(after.isel(example=[at]) for at in range(len(ways)))]
    before = float(plain["logit_difference"][0])
    rows = [
        {
            "way": way,
            "tokens": list(zip(*(x[part].values[0].tolist() for part in ("token", "probability")))),
            "difference": (now := float(x["logit_difference"][0])),
            "change": now - before if at else None,
        }
        for at, (way, x) in enumerate(zip(["as it is", *ways], whole))
    ]
    answer, foil = (str(plain[word].values[0]) for word in ("answer", "foil"))
    seconds = time.perf_counter() - began
    return {"rows": rows, "answer": answer, "foil": foil, "seconds": seconds}


@torch.no_grad()
def chance(
    lm: LM, state: State, unit: Unit, made: Explanation | None, once: Once = anew
) -> tuple[float, float, int] | None:
    """The least and the greatest change of the logit difference by others of the unit's layer, each
    switched off, and how many they are; None for a unit that has no others."""
    unit.refuse(lm, lm.batch(state.prompt))
    others = unit.others(lm, OTHERS)
    if not others:
        return None
    words, plain = _plain(lm, state, made, once)
    off = [ablate(other.site, **other.where) for other in others]
    after = _after(lm, state.prompt, off, words)["logit_difference"].values
    changes = (after - plain["logit_difference"].values[0]).tolist()
    return min(changes), max(changes), len(changes)


def _plain(
    lm: LM, state: State, made: Explanation | None, once: Once
) -> tuple[dict[str, Any], xr.Dataset]:
    """Answer and foil as they are asked, and the next token as the model is."""
    method, words = catalogue.module("tokens.next_token"), _words(state, made)

    def measured() -> tuple[dict[str, Any], xr.Dataset]:
        first = method.measure(lm, state.prompt, **words, top=TOP)
        ids = {name: int(first[f"{name}_id"][0]) for name in ("answer", "foil")}
        return words or ids, first

    return once(("next", state.prompt, str(words)), measured)


def _after(
    lm: LM, prompt: str, changes: Sequence[Intervention], words: dict[str, Any]
) -> xr.Dataset:
    """The next token after each change, all in one pass: a row of the batch for each."""
    each = [replace(change, examples=[at]) for at, change in enumerate(changes)]
    method = catalogue.module("tokens.next_token")
    with intervene(lm, *each):
        return method.measure(lm, [prompt] * len(each), **words, top=TOP)


def _ways(
    lm: LM, batch: Batch, unit: Unit, corrupt: str, factor: float | None, once: Once
) -> dict[str, Intervention]:
    """The changes by what they are called."""
    site, where = unit.site, unit.where
    value = _all_layers(lm, batch.texts[0], site, once)
    if unit.kind in ("head", "neuron"):
        value = value[:, :, [unit.number]]
    ways: dict[str, Intervention] = {}
    if "positions" not in where:
        ways["switched off"] = ablate(site, **where)
    ways["at its mean over the prompt"] = replaced(site, value.mean(1, keepdim=True), **where)
    # of another length nothing stands at the same place
    if corrupt and len(lm.batch(corrupt).tokens[0]) == len(batch.tokens[0]):
        there = _all_layers(lm, corrupt, site, once)
        if unit.kind in ("head", "neuron"):
            there = there[:, :, [unit.number]]
        elif "positions" in where:
            there = there[:, where["positions"]]
        ways["as in the corrupt prompt"] = replaced(site, there, **where)
    if factor is not None:
        ways[f"{factor:g} times as strong"] = scaled(site, factor, **where)
    return ways


def _all_layers(lm: LM, prompt: str, site: str, once: Once) -> torch.Tensor:
    """What stands at a site; at those like it in all layers too, for the next click."""
    pattern = re.sub(r"^layers\.\d+", "layers.*", site)
    return once((pattern, prompt), lambda: capture(lm, prompt, pattern))[site]


def _patterns(lm: LM, prompt: str, layers: list[int], once: Once) -> xr.DataArray:
    method = catalogue.module("heads.attention_pattern")
    name = ("patterns", prompt, str(layers))
    return once(name, lambda: method.measure(lm, prompt, layers=layers))


@torch.no_grad()
def warm(lm: LM, state: State, once: Once) -> None:
    """Make what the first click at a head would wait for."""
    tokens = len(lm.batch(state.prompt).tokens[0])
    _plain(lm, state, None, once)
    if lm.dims.heads and tokens <= LONG:
        _all_layers(lm, state.prompt, "layers.0.attn.z", once)
        _patterns(lm, state.prompt, [*range(lm.dims.layers)], once)


def _words(state: State, made: Explanation | None) -> dict[str, Any]:
    """Answer and foil as the explanation has them, or as they were given; nothing where neither
    is known."""
    if made is not None:
        return dict(made.words)
    given = {"answer": state.answer or None, "foil": state.foil or None}
    return given if all(given.values()) else {}


@torch.no_grad()
def pictures(lm: LM, state: State, unit: Unit, once: Once = anew) -> dict[str, Any]:
    """What `unit.html` shows beside the changes: panels, strips of tokens, and words.

    A head: where it looks. A neuron: its activation at every token, and the words it speaks for and
    against. An MLP, a token's stream: what the output vocabulary reads there.
    """
    batch = lm.batch(state.prompt)
    unit.refuse(lm, batch)
    shown: dict[str, Any] = {"panels": [], "strips": [], "words": {}}
    if unit.kind == "head":
        asked = [*range(lm.dims.layers)] if len(batch.tokens[0]) <= LONG else [unit.layer]
        measured = _patterns(lm, state.prompt, asked, once)
        pattern = measured.isel(example=0, head=unit.number).sel(layer=unit.layer)
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
