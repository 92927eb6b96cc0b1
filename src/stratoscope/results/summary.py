"""Many examples as one number for every cell, with an interval: the ratio of means for effects of
patching.

The effect of a pair of prompts is a share of its own gap, (d(patched) - d(base)) / (d(source) -
d(base)), so that a pair with a small or a negative gap counts as much in a plain mean as all others
together. Here

    effect[cell] = sum_pair (d(patched) - d(base)) / sum_pair (d(source) - d(base))

and every pair counts by its gap. Pairs whose clean prompt does not speak more for the answer than
the corrupt one show nothing to be restored; they are left out, and named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import xarray as xr

from stratoscope.errors import ResultError
from stratoscope.results.label import dataset

GAP = ("clean_difference", "corrupt_difference")


def summary(result: xr.Dataset | xr.DataArray, *, level: float = 0.95, seed: int = 0) -> xr.Dataset:
    """The mean of every number of a result over its examples, or the ratio of means where it is an
    effect.

    A result with effect, clean_difference and corrupt_difference (activation patching, path
    patching) gives ratios of means over its pairs; any other gives means of its floating-point
    variables that have an example axis. For each variable x: x, x_low, x_high (its other axes;
    studentised intervals of `maths.resample`, NaN below five examples) and x_n, how many examples
    have a number there. The attributes: pairs, left_out (which examples, and why), notes. Raises
    ResultError for a result without examples or without such a variable.
    """
    data = (
        result.to_dataset(name=result.name or "value")
        if isinstance(result, xr.DataArray)
        else result
    )
    shared = [
        str(n) for n, v in data.data_vars.items() if "example" in v.dims and v.dtype.kind == "f"
    ]
    names = [name for name in shared if name not in GAP]
    if not names:
        raise ResultError(
            f"a summary is over examples: none of {sorted(map(str, data.data_vars))} has any."
        )
    gap, keep, left_out = None, np.ones(data.sizes["example"], dtype=bool), []
    if set(GAP) <= set(shared) and "effect" in names:
        clean, corrupt = (data[name].values.astype(float) for name in GAP)
        keep = clean > corrupt
        left_out = [
            f"example {n}: the clean difference {clean[n]:.2f} is not above the corrupt one, "
            f"{corrupt[n]:.2f}"
            for n in np.flatnonzero(~keep).tolist()
        ]
        gap = (clean - corrupt)[keep]  # of either direction: both numerator and gap change sign
        names = [name for name in names if name in ("effect", "null")]
    variables = {}
    for name in names:
        one = data[name].transpose("example", ...)
        dims = tuple(map(str, one.dims[1:]))
        cells = list(_cells(one.values[keep].astype(float), gap, level, seed))
        for n, part in enumerate((name, f"{name}_low", f"{name}_high", f"{name}_n")):
            variables[part] = (dims, np.array([cell[n] for cell in cells]).reshape(one.shape[1:]))
    notes = [f"{len(left_out)} of {len(keep)} pairs are left out."] if left_out else []
    if keep.sum() < 5:
        notes.append(f"n too small: {int(keep.sum())} examples, and an interval needs 5.")
    coords = {
        str(n): (tuple(map(str, c.dims)), c.values)
        for n, c in data.coords.items()
        if "example" not in c.dims
    }
    return dataset(
        variables,
        method="results.summary",
        provenance=json.loads(data.attrs.get("provenance", "{}")),
        settings={"of": data.attrs.get("method", ""), "level": level},
        seed=seed,
        coords={n: c for n, c in coords.items() if c[0]},
        pairs=int(keep.sum()),
        left_out=left_out,
        notes=" ".join(notes),
    )


def _cells(
    values: np.ndarray, gap: np.ndarray | None, level: float, seed: int
) -> Iterator[tuple[float, float, float, int]]:
    """Estimate, low, high and n of every cell of (example, ...), in order; NaN where no example has
    a number."""
    # with scipy, which importing a result must not cost
    from stratoscope.maths.resample import interval

    for cell in values.reshape(len(values), -1).T:
        real = np.isfinite(cell)
        if not real.any():
            yield np.nan, np.nan, np.nan, 0
            continue
        over = None if gap is None else gap[real]
        top = cell[real] if over is None else cell[real] * over
        spread = interval(top, over, level=level, seed=seed)
        yield spread.value, spread.low, spread.high, int(real.sum())
