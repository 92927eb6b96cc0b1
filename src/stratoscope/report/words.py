"""What the report and the terminal say of numbers: the verb that fits, and what may be called a
cause.

An effect is called a cause only when it is beyond the bound of its sweep: what the largest of all
heads (or layers and tokens) reaches in 24 random draws (`engine.chance`). Were all of them chance,
any at all would be named in 5 % of reports. Anything smaller is shown in grey and named in no
sentence. A role is given to a head only when its score is clear of the score's own null and what
the head writes goes the role's way.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from stratoscope.plots import choose
from stratoscope.plots.text import JOINED, number, shorten, visible
from stratoscope.plots.ticks import Ticks

HARDLY = 0.1  # of the larger half of a write: a smaller half is not worth a verb
ROLES = {
    "previous_token": "previous-token head",
    "duplicate_token": "duplicate-token head",
    "induction": "induction head",
    "copying": "copying head",
    "name_mover": "name mover",
}
NEGATIVE = "negative name mover"


def quoted(token: str) -> str:
    return f"“{shorten(visible(token), 40)}”"


def ran_on(provenance: Mapping[str, Any]) -> str:
    """In which precision, where and by which attention kernel it was computed; "" where nobody
    wrote that down."""
    if not provenance.get("device"):
        return ""
    kernel = f", attention kernel {provenance['kernel']}" if provenance.get("kernel") else ""
    return f"{provenance.get('dtype', 'numbers')} on {provenance['device']}{kernel}"


def head_name(place: Mapping[str, Any]) -> str:
    return f"L{place['layer']}H{place['head']}"


def bound(patched: xr.Dataset) -> float:
    """What an effect of a patching sweep (of one example) must exceed to be called a cause; NaN
    without a null."""
    return float(patched["bound"])


def causes(patched: xr.Dataset, n: int | None = None) -> list[dict[str, Any]]:
    """The effects beyond the bound, strongest first (at most n)."""
    effect = patched["effect"]
    return [
        place
        for place in choose.strongest(effect, n or effect.size)
        if abs(place["value"]) > bound(patched)
    ]


def drawn(patched: xr.Dataset, what: str = "heads") -> str:
    """How high chance reaches, and in how many draws."""
    if not np.isfinite(bound(patched)):
        return "no null was drawn"
    height, draws = number(bound(patched), sign=False), int(patched.attrs["draws"])
    return f"the largest of all {what} reaches {height} in {draws} random draws"


def strongest_heads(patched: xr.Dataset) -> str:
    """Which heads are causes, up to three; that none is, where none is."""
    heads = causes(patched)
    for best in choose.strongest(patched["effect"], 1):
        if not heads:
            largest = f"the largest effect is {number(best['value'])} at {head_name(best)}"
            return f"No head exceeds chance: {largest}, and {drawn(patched)}."
        named = listed([f"{head_name(place)} ({number(place['value'])})" for place in heads[:3]])
        if len(heads) == 1:
            return f"One head exceeds chance: {named}, where {drawn(patched)}."
        which = ":" if len(heads) <= 3 else ", the strongest"
        return f"{len(heads)} heads exceed chance{which} {named}, where {drawn(patched)}."
    return ""


def carried(patched: xr.Dataset) -> str:
    """Which token has the largest effect in which run of layers, where that is beyond chance."""
    grid, chance = patched["effect"].transpose("layer", "position"), bound(patched)
    if not np.isfinite(grid.values).any():
        return ""
    layers, best = (
        grid["layer"].values.tolist(),
        np.nan_to_num(grid.values, nan=-np.inf).argmax(axis=1),
    )
    clear = grid.values[np.arange(len(layers)), best] > chance
    if not clear.any():
        return (
            "No token’s residual stream restores more than chance in any layer: "
            f"{drawn(patched, 'places')}."
        )
    runs = []
    stations = zip(best.tolist(), clear.tolist(), layers)
    for (at, exceeds), run in itertools.groupby(stations, key=lambda station: station[:2]):
        ends = [layer for *_, layer in run]
        if exceeds and len(ends) > 1:  # a single layer is not a station on the way
            where = token(grid, grid["position"].values[at].item())
            runs.append(f"{where} in layers {ends[0]} to {ends[-1]}")
    if len(runs) > 4:
        return (
            f"The token whose residual stream restores most changes {len(runs) - 1} times over "
            "the layers."
        )
    return f"The residual stream restores most at {', then at '.join(runs)}." if runs else ""


def writes(raises_answer: float, lowers_foil: float, answer: str, foil: str) -> str:
    """What a component does to either token, the larger half first: "suppresses John (−2.94)"."""
    halves = [(raises_answer, raises_answer, answer), (lowers_foil, -lowers_foil, foil)]
    (_, most, first), (_, least, second) = sorted(halves, key=lambda half: -abs(half[0]))
    verb = lambda value: "raises" if value > 0 else "suppresses"  # noqa: E731
    text = f"{verb(most)} {quoted(first)} ({number(most)})"
    if abs(least) < HARDLY * abs(most):
        return f"{text} and hardly touches {quoted(second)} ({number(least)})"
    return f"{text} and {verb(least)} {quoted(second)} ({number(least)})"


def writers(direct: xr.Dataset, answer: str, foil: str) -> str:
    """The component that adds most to the difference and the one that takes most from it, each with
    its verb."""
    whole, sentences = float(direct["logit_difference"]), []
    parts = direct["contribution"]
    order = parts.argsort().values
    ends = (
        (order[-1], 1, f"adds most to the difference of {number(whole)}"),
        (order[0], -1, "takes most from it"),
    )
    for at, sign, what in ends:
        value = float(parts[at])
        if not np.isfinite(value) or sign * value <= 0:
            continue
        name = str(parts["component"].values[at])
        how = writes(
            float(direct["raises_answer"][at]), float(direct["lowers_foil"][at]), answer, foil
        )
        sentences.append(f"{name} {what} ({number(value)} logits): it {how}.")
    return " ".join(sentences)


def role(scores: Mapping[str, tuple[float, float, float]], written: float | None) -> str:
    """The role that a head has clear of its null, or "".

    scores: by role (score, null, the largest null of all heads). written: what the head adds to the
    difference directly. A name mover must add to it and a negative one take from it; the other
    roles must be twice their null and 0.2 above it.
    """
    score, null, reach = scores.get("name_mover", (np.nan, np.nan, np.nan))
    if written is not None and abs(score) > max(abs(null), reach) and score * written > 0:
        return ROLES["name_mover"] if score > 0 else NEGATIVE
    others = {name: s for name, s in scores.items() if name != "name_mover"}
    clear = [
        (s, name) for name, (s, chance, _) in others.items() if s > max(2 * chance, chance + 0.2)
    ]
    return ROLES.get(max(clear)[1], max(clear)[1]) if clear else ""


def are(named: Sequence[tuple[str, str]]) -> str:
    """Which heads have which role: "L5H1 is an induction head"."""
    return listed(
        [f"{name} is a{'n' if role[0] in 'aeiou' else ''} {role}" for name, role in named]
    )


def token(array: xr.DataArray, position: int) -> str:
    place = array["position"].values.tolist().index(position)
    labels = Ticks.of(array, "position").labels
    if labels[place] != JOINED:
        return f"token {position} “{shorten(labels[place], 40)}”"
    whole = next((label for label in reversed(labels[:place]) if label != JOINED), JOINED)
    return f"token {position} (a part of “{shorten(whole, 40)}”)"


def listed(items: Sequence[str]) -> str:
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else "".join(items)
