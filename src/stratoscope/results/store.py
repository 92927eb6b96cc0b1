"""Keep a result in one netCDF file: written whole or not at all, read back exactly, without torch.

The arrays are plain netCDF variables that any tool can open. What netCDF cannot say (booleans,
which are coordinates, lists in attributes, null characters in text) stands in one JSON header, the
global attribute `stratoscope`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from stratoscope.errors import ResultError

HEADER = "stratoscope"
FORMAT = 1
_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")  # HDF5 text ends at a null and must be UTF-8
_BAD_NAME = re.compile(r"[\x00\ud800-\udfff/]|^\.*$|^_nc4_non_coord_")


def save(result: xr.DataArray | xr.Dataset, path: str | os.PathLike[str]) -> None:
    """Write `result` to `path`, replacing a file that is there.

    Raises ResultError when the result holds what a file cannot (its message says which variable),
    or when the disk refuses; then nothing is left behind and an earlier file is untouched.
    """
    if not isinstance(result, xr.DataArray | xr.Dataset):
        raise ResultError(f"save() takes a DataArray or a Dataset, not {type(result).__name__}.")
    # Built in memory first: HDF5 that runs out of disk half-way can crash the whole process when it
    # ends.
    _write(Path(path).resolve(), _to_netcdf(result))


def load(path: str | os.PathLike[str]) -> xr.DataArray | xr.Dataset:
    """Read what `save` wrote. Raises ResultError when `path` is no such file, or is damaged."""
    import h5py

    path = Path(path)
    if not path.is_file():
        raise ResultError(
            f"There is no result file at {path}. Give the path that was passed to save()."
        )
    try:
        # h5py looks first: on some damaged files h5netcdf would print a traceback of its own.
        with h5py.File(path, "r") as file:
            ours = HEADER in file.attrs
        if not ours:
            raise ResultError(
                f"{path} is HDF5, but stratoscope did not write it. Open it with "
                "xarray.open_dataset instead."
            )
        with xr.open_dataset(path, engine="h5netcdf", decode_cf=False) as file:
            raw = file.load()
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise ResultError(
            f"{path} cannot be read as netCDF: it is damaged, cut short or another kind of file "
            f"({error}). "
            "Copy it again, or measure and save again."
        ) from error
    try:
        header = json.loads(raw.attrs[HEADER])
        if header["format"] != FORMAT:
            raise ResultError(
                f"{path} has result format {header['format']}; this version reads format {FORMAT}. "
                "Update stratoscope, or measure and save again."
            )
        return _from_netcdf(raw, header)
    except (KeyError, TypeError, ValueError) as error:
        raise ResultError(
            f"The header of {path} is damaged ({error}). Measure and save again."
        ) from error


def _to_netcdf(result: xr.DataArray | xr.Dataset) -> memoryview:
    """Return the bytes of the file."""
    coords = {name: coord.variable for name, coord in result.coords.items()}
    header: dict[str, Any] = {"format": FORMAT, "coords": list(coords)}
    if isinstance(result, xr.DataArray):
        name = "values" if result.name is None else result.name
        # `ds["layer"]` is an array with the name of its coordinate
        while name in coords or name in result.dims:
            name = f"{name}_"
        variables = {name: result.variable}
        header |= {"kind": "DataArray", "name": result.name}
    else:
        variables = {name: array.variable for name, array in result.data_vars.items()}
        header |= {"kind": "Dataset", "attrs": _attrs("the dataset", result.attrs)}
    stored, notes = {}, {}
    for name, variable in (variables | coords).items():
        for word in (name, *variable.dims):
            if not isinstance(word, str) or _BAD_NAME.search(word):
                raise ResultError(f"{word!r} cannot name anything in a netCDF file. Rename it.")
        stored[name], notes[name] = _encode(str(name), variable)
    header["variables"] = notes
    try:
        whole = xr.Dataset(stored, attrs={HEADER: json.dumps(header)})
        return whole.to_netcdf(
            engine="h5netcdf", encoding={name: {"_FillValue": None} for name in stored}
        )
    except (ValueError, NotImplementedError) as error:
        raise ResultError(f"This result does not fit in a netCDF file: {error}") from error


def _from_netcdf(raw: xr.Dataset, header: dict[str, Any]) -> xr.DataArray | xr.Dataset:
    """Undo `_to_netcdf`: the header's order is the order of variables."""
    decoded = {
        name: _decode(raw.variables[name], note) for name, note in header["variables"].items()
    }
    coords = {name: decoded.pop(name) for name in header["coords"]}
    if header["kind"] == "Dataset":
        return xr.Dataset(decoded, coords, attrs=header["attrs"])
    [only] = decoded.values()
    return xr.DataArray(only.values, coords, only.dims, name=header["name"], attrs=only.attrs)


def _encode(name: str, variable: xr.Variable) -> tuple[xr.Variable, dict[str, Any]]:
    """Return the variable as netCDF can hold it, and the note that `_decode` needs."""
    values = variable.values
    kind = values.dtype.kind
    note = {"dtype": values.dtype.str, "attrs": _attrs(repr(name), variable.attrs)}
    if kind in "UO":
        values = values.astype(object)
        if not all(isinstance(item, str) for item in values.flat):
            raise ResultError(
                f"{name!r} holds objects that are not text; a file holds numbers and text only."
            )
        note["json"] = any(_UNSTORABLE.search(item) for item in values.flat)
        values = _each(json.dumps, values) if note["json"] else values
    elif kind == "b":
        values = values.astype(np.int8)
    elif values.dtype == np.float16:
        values = values.astype(np.float32)
    elif kind not in "iuf" or values.dtype.itemsize > 8:
        raise ResultError(
            f"{name!r} has dtype {values.dtype}; a file holds booleans, integers, floats and text."
        )
    return xr.Variable(variable.dims, values), note


def _decode(variable: xr.Variable, note: dict[str, Any]) -> xr.Variable:
    """Undo `_encode`."""
    values = variable.values
    if note.get("json"):
        values = _each(json.loads, values)
    return xr.Variable(variable.dims, values.astype(np.dtype(note["dtype"])), note["attrs"])


def _each(function: Any, values: np.ndarray) -> np.ndarray:
    """Apply a text function to each item, for any shape, empty and scalar included."""
    return np.vectorize(function, otypes=[object])(values)


def _attrs(owner: str, attrs: dict[Any, Any]) -> dict[str, Any]:
    """Return `attrs` if JSON keeps every one of them exactly."""

    def storable(value: Any) -> bool:
        if isinstance(value, list):
            return all(map(storable, value))
        if isinstance(value, dict):
            return all(isinstance(key, str) and storable(item) for key, item in value.items())
        return value is None or isinstance(value, str | bool | int | float)

    for key, value in attrs.items():
        if not isinstance(key, str) or not storable(value):
            raise ResultError(
                f"Attribute {key!r} of {owner} is a {type(value).__name__} that a file cannot "
                "keep. "
                "Use text, numbers, booleans, None, lists and dictionaries of these."
            )
    return dict(attrs)


def _write(target: Path, data: memoryview) -> None:
    """Put `data` at `target` in one step: a reader sees the old file or the new one, never a
    part."""
    temporary = target.with_name(f".stratoscope-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise ResultError(
            f"Could not save {len(data) / 1e6:.1f} MB to {target}: {error.strerror or error}. "
            "Nothing was "
            "written; an earlier file is untouched. Make room, or give a path in a writable folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # after success there is nothing left to remove
            temporary.unlink()
