"""A result in a few lines of text: the effect, its null and interval, and what it does not show.

For those who see no picture: a terminal, a note, a program that answers questions. Each entry
stands beside what chance reaches, so that nobody can quote a cause that does not beat its null:

    heads.activation_patching: effect by layer, head; 1 example.
    Chance: the largest of all reaches 0.12 (24 draws; a random direction, ...).
    Beyond chance, 7 of 270: layer 29 head 1 +0.27; layer 24 head 4 −0.27; ...
    Does not show: ...

What chance reaches is `bound` where the method has one, else the largest magnitude of its `null`
over every axis along which the strongest is looked for (`SEARCHED`): of many entries some are large
by chance. Other axes (roles, statements) keep a bound each. Without a null no cause is claimed.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import xarray as xr

from stratoscope import catalogue
from stratoscope.errors import MethodError
from stratoscope.plots import choose
from stratoscope.plots.text import scientific
from stratoscope.report import show

EXAMPLES, TOP = 3, 8
SEARCHED = frozenset(
    "layer head position depth edge neuron unit feature rank draw query key component place "
    "concept token".split()
)


def brief(result: xr.Dataset | xr.DataArray, name: str | None = None, *, top: int = TOP) -> str:
    """The lines. name: which number of a data set, default the first that was measured. top: how
    many entries of each example are named. Raises ResultError as `show` does."""
    data = show.named(result)
    key = show.main(data, name)
    whole, reach = data[key], chance(data, key)
    method = str(data.attrs.get("method", ""))
    axes = ", ".join(str(d).replace("_", " ") for d in whole.dims if d != "example")
    count = whole.sizes.get("example", 1)
    about = f"{method or 'result'}: {key.replace('_', ' ')}{' by ' + axes if axes else ''}"
    lines = [f"{about}; {count} example{'s' if count > 1 else ''}."]
    if reach is None:
        lines.append("Chance: this method has no null. It shows what is there, and no cause.")
    for example in range(min(count, EXAMPLES)):
        one, limit = (_of(x, example) for x in (whole, reach))
        place = f"Example {example}" if count > 1 else ""
        lines += [": ".join(filter(None, (place, s))) for s in _said(data, one, limit, key, top)]
    if count > EXAMPLES:
        lines.append(f"{count - EXAMPLES} more examples are not listed; `results.summary` has all.")
    lines += [f"Note: {note}" for note in _notes(data)]
    if limits := does_not_show(method):
        lines.append(f"Does not show: {limits}")
    return "\n".join(lines)


def chance(data: xr.Dataset, key: str) -> xr.DataArray | None:
    """What magnitude of `key` chance reaches, on a part of its axes; None without a null."""
    dims = set(data[key].dims)
    if key == "effect" and "bound" in data and set(data["bound"].dims) <= dims:
        return data["bound"]
    if "null" not in data or key in ("null", "bound"):
        return None
    over = [d for d in data["null"].dims if d in SEARCHED or d not in dims]
    return np.abs(data["null"]).max([d for d in over if d != "example"])


def does_not_show(method: str) -> str:
    """The limits that a method's own docstring states; "" where it is no method of the house."""
    try:
        text = catalogue.docstring(catalogue.find(method).path.read_text("utf-8"))
    except MethodError:
        return ""
    found = re.search(r"\bDoes\s+not\s+show[,:]?\s+(.+?)(?=\n\n|\n[A-Z][\w ]*: |\Z)", text, re.S)
    return " ".join(found[1].split()) if found else ""


def _said(
    data: xr.Dataset, one: xr.DataArray, limit: xr.DataArray | None, key: str, top: int
) -> list[str]:
    """What is said of one example."""
    finite = int(np.isfinite(one.values).sum()) if one.dtype.kind == "f" else one.size
    if not finite:
        return ["No number: nothing could be measured."]
    if limit is None:
        return [f"Largest: {_listed(data, key, choose.strongest(one, top))}."]
    far = limit.broadcast_like(one).transpose(*one.dims) if one.dims else limit
    beyond = one.where(np.abs(one) > far)
    count = int(np.isfinite(beyond.values).sum())
    sizes = sorted({float(x) for x in np.atleast_1d(limit.values).ravel() if np.isfinite(x)})
    if not sizes:
        return [f"No null was drawn. Largest: {_listed(data, key, choose.strongest(one, top))}."]
    height = " to ".join(scientific(x) for x in dict.fromkeys((sizes[0], sizes[-1])))
    how = [f"{data.attrs['draws']} draws"] if "draws" in data.attrs else []
    how += [str(data.attrs["null_kind"]).rstrip(".")] if data.attrs.get("null_kind") else []
    lines = [f"Chance reaches {height}{' ({})'.format('; '.join(how)) if how else ''}."]
    if count:
        named = _listed(data, key, choose.strongest(beyond, top))
        lines.append(f"Beyond chance, {count} of {finite}: {named}.")
    else:
        best = _listed(data, key, choose.strongest(one, 1))
        lines.append(f"Nothing of {finite} is beyond chance; the largest is {best}.")
    return lines


def _listed(data: xr.Dataset, key: str, places: list[dict[str, Any]]) -> str:
    return "; ".join(_entry(data, key, dict(place)) for place in places) or "nothing"


def _entry(data: xr.Dataset, key: str, place: dict[str, Any]) -> str:
    """One entry in words: where, how much, and its interval where there is one."""
    value = place.pop("value")
    sign = "+" if value > 0 and float(data[key].min()) < 0 else ""
    said = f"{' '.join(_where(data, place))} {sign}{scientific(value)}".strip()
    ends = [data.get(f"{key}_{end}") for end in ("low", "high")]
    if all(end is not None and set(end.dims) <= {*place, "example"} for end in ends):
        at = [_of(end, 0) for end in ends]
        low, high = (float(choose.pick(x, **{d: place[d] for d in x.dims})) for x in at)
        said += f" [{scientific(low)} to {scientific(high)}]"
        said += " (its interval holds 0)" if low <= 0 <= high else ""
    return said


def _where(data: xr.Dataset, place: dict[str, Any]) -> list[str]:
    """Each axis with its label, and what stands there: its token, its layer and neuron."""
    words = []
    for axis, label in place.items():
        beside = [n for n in ("layer", "neuron", "head") if n in data.coords and n not in place]
        units = [n for n in beside if data[n].dims == (axis,) and not isinstance(label, str)]
        if units:
            words += [f"{n} {choose.pick(data[n], **{axis: label}).item()}" for n in units]
            continue
        words.append(f"{axis.replace('_', ' ')} {label}")
        for name in (f"text_{axis}", "text", "token"):
            own = data[name].dims if name in data else ()
            if axis in own and set(own) <= {*place, "example"}:
                at = _of(data[name], 0)
                words.append(repr(str(choose.pick(at, **{d: place[d] for d in at.dims}).values)))
                break
    return words


def _of(array: Any, example: int) -> Any:
    return array.isel(example=example) if array is not None and "example" in array.dims else array


def _notes(data: xr.Dataset) -> list[str]:
    notes = data.attrs.get("notes", "")
    listed = [notes] if isinstance(notes, str) else list(notes)
    return [str(note) for note in listed if str(note).strip()]
