"""Give arrays their axis words and provenance: `label` for one, `dataset` for several that belong
together.

Numbers keep their precision (bfloat16 and float16 become float32), text becomes Python strings, and
padding is NaN in numbers and "" in text. The values are copied: a result stays when its tensor
changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import xarray as xr
from pandas.api.types import infer_dtype

from stratoscope.errors import ResultError
from stratoscope.results import axes


def label(
    values: Any,
    dims: str | Sequence[str],
    *,
    name: str,
    method: str,
    provenance: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    coords: Mapping[str, Any] | None = None,
    **attrs: Any,
) -> xr.DataArray:
    """Return `values` as a DataArray with one axis word per dimension.

    `values` is a numpy array, a torch tensor, a (nested) list or a scalar. `coords` are given as in
    xarray: a list for a coordinate named after its axis, `(dims, values)` for any other. `dataset`
    says what it stamps. Raises ResultError on an unknown axis word or a size that does not fit.
    """
    together = dataset(
        {name: (dims, values)},
        method=method,
        provenance=provenance,
        settings=settings,
        seed=seed,
        coords=coords,
        **attrs,
    )
    array = together[name]
    stray = [key for key in together.coords if key not in array.coords]
    if stray:
        raise ResultError(
            f"Coordinate {stray[0]!r} has axes {together[stray[0]].dims}, but {name!r} has only "
            f"{array.dims}. "
            "Name the coordinate's axes as the array does."
        )
    return array.assign_attrs(together.attrs)


def dataset(
    variables: Mapping[str, tuple[str | Sequence[str], Any]],
    *,
    method: str,
    provenance: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    coords: Mapping[str, Any] | None = None,
    **attrs: Any,
) -> xr.Dataset:
    """Return several arrays that share axes as one Dataset: `{"effect": (("layer", "head"),
    values), ...}`.

    Stamped attributes: `method`; `settings` and `provenance` as JSON text; `seed` if there is one;
    `attrs`. Raises ResultError on an unknown axis word or a size that does not fit.
    """
    given = {
        name: spec if isinstance(spec, tuple) else (name, spec)
        for name, spec in (coords or {}).items()
    }
    sizes: dict[str, tuple[int, str]] = {}
    words = axes.words(method)
    arrays = {
        name: _variable(name, spec, sizes, words)
        for name, spec in [*variables.items(), *given.items()]
    }
    for name in variables:
        if name in given or name in sizes:
            raise ResultError(
                f"{name!r} names both a variable and an axis or coordinate. Rename the variable."
            )
    for name in given:
        if name in sizes and arrays[name].dims != (name,):
            raise ResultError(
                f"Coordinate {name!r} is named after an axis, so its only axis must be {name!r}; "
                f"it has {arrays[name].dims}. Rename the coordinate."
            )
    stamped = {
        "method": method,
        "settings": json.dumps(dict(settings or {}), default=_as_json),
        "provenance": json.dumps(dict(provenance or {}), default=_as_json),
        **({} if seed is None else {"seed": seed}),
        **{key: json.loads(json.dumps(value, default=_as_json)) for key, value in attrs.items()},
    }
    return xr.Dataset(
        {name: arrays[name] for name in variables},
        {name: arrays[name] for name in given},
        attrs=stamped,
    )


def _variable(
    name: str, spec: tuple[Any, ...], sizes: dict[str, tuple[int, str]], words: Mapping[str, str]
) -> xr.Variable:
    """Check one array against the axis words and against the `sizes` seen so far, which it
    extends."""
    if len(spec) != 2:
        raise ResultError(f"{name!r} was given as {len(spec)} things; give it as (axes, values).")
    dims = (spec[0],) if isinstance(spec[0], str) else tuple(spec[0])
    array = _array(name, spec[1])
    for word in dims:
        if word not in words:
            near = get_close_matches(str(word), words, 3)
            hint = f"nearest: {', '.join(near)}" if near else f"the words are {', '.join(words)}"
            raise ResultError(f"{name!r} uses {word!r}, which is not an axis word; {hint}.")
    if len(set(dims)) != len(dims):
        raise ResultError(
            f"{name!r} names an axis twice in {dims}. Attention has `query` and `key` for this."
        )
    if array.ndim != len(dims):
        raise ResultError(
            f"{name!r} has {array.ndim} axes, shape {array.shape}, but {len(dims)} words: {dims}."
        )
    for word, size in zip(dims, array.shape):
        known, first = sizes.setdefault(word, (size, name))
        if size != known:
            raise ResultError(
                f"Axis {word!r} has size {known} in {first!r} but {size} in {name!r}."
            )
    return xr.Variable(dims, array)


def _array(name: str, values: Any) -> np.ndarray:
    """Copy `values` into a numpy array of numbers, or of Python strings."""
    # a torch tensor, known by its manners: this room never imports torch
    if hasattr(values, "detach"):
        values = values.detach()
        if values.is_floating_point() and values.element_size() < 4:
            values = values.float()  # numpy has no bfloat16
        values = values.cpu().numpy()
    try:
        array = np.array(values)
    except (ValueError, TypeError) as error:
        raise ResultError(
            f"{name!r} is not a regular array ({error}). Pad numbers with NaN, text with ''."
        ) from error
    if array.dtype.kind in "UO":
        # Not numpy's fixed-width text: that drops trailing null characters, and byte-level tokens
        # have them.
        array = np.array(values, dtype=object)
        if infer_dtype(array.ravel(), skipna=False) not in ("string", "empty"):
            raise ResultError(
                f"{name!r} mixes text with something else. Give all strings, or all numbers."
            )
    elif array.dtype.kind not in "biuf":
        raise ResultError(
            f"{name!r} has dtype {array.dtype}. Results hold booleans, integers, floats and text."
        )
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _as_json(value: Any) -> Any:
    """Turn what JSON does not know (numpy numbers, tensors, paths) into what it does."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
