"""How results are compared, and what a model is made of: the eyes of the contract suite."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr

from stratoscope.models import LM
from stratoscope.models.attention import configs_of

TOKEN_AXES = ("position", "query", "key")
TOLERANCE = 1e-4
# below this, values are compared as if they were so large: an error of rounding has no relative
# error
SMALL = 0.05


def same(one: np.ndarray, two: np.ndarray, tolerance: float = TOLERANCE) -> str:
    """How two arrays differ, or ""."""
    if one.shape != two.shape:
        return f"shapes {one.shape} and {two.shape}"
    if one.dtype.kind in "OUSbiu":
        return "" if (one == two).all() else f"{one.ravel()[:4]} and {two.ravel()[:4]}"
    if (np.isnan(one) != np.isnan(two)).any():
        return "NaN in different places"
    finite = np.isfinite(one)
    if not finite.any():
        return ""
    gap = np.abs(one[finite] - two[finite])
    scale = max(float(np.abs(two[finite]).max()), SMALL)
    worst = max(gap.max() / scale, np.linalg.norm(gap) / max(np.linalg.norm(two[finite]), SMALL))
    return "" if worst <= tolerance else f"difference {worst:.1e}"


def arrays(result: xr.Dataset) -> dict[str, xr.DataArray]:
    """Every array of a result by name, coordinates too."""
    return {str(k): v for k, v in {**result.data_vars, **result.coords}.items()}


def differences(one: xr.Dataset, two: xr.Dataset, tolerance: float = TOLERANCE) -> list[str]:
    """What differs between two results, a line each."""
    left, right = arrays(one), arrays(two)
    faults = [f"only one has {key}" for key in left.keys() ^ right.keys()]
    for key in left.keys() & right.keys():
        gap = same(left[key].values, right[key].values, tolerance)
        faults += [f"{key}: {gap}"] if gap else []
    return faults


def alone_differences(
    together: xr.Dataset, single: xr.Dataset, example: int, length: int
) -> list[str]:
    """What differs between an example's part of a batch and the same example alone.

    Nulls are drawn for a whole batch, and are left out.
    """

    def cut(array: xr.DataArray, example: int) -> np.ndarray:
        axes = {axis: slice(0, length) for axis in TOKEN_AXES if axis in array.dims}
        return array.isel(example=example, **axes).values

    faults = []
    for key, array in arrays(together).items():
        if "example" in array.dims and not key.startswith("null"):
            gap = same(cut(array, example), cut(single[key], 0))
            faults += [f"{key}: {gap}"] if gap else []
    return faults


def unpadded(result: xr.Dataset, lengths: list[int]) -> list[str]:
    """Where padding holds something: numbers must be NaN, ids -1, truth False, text empty."""
    faults = []
    for key, array in arrays(result).items():
        for axis in [a for a in TOKEN_AXES if a in array.dims and "example" in array.dims]:
            for example, length in enumerate(lengths):
                rest = array.isel(example=example, **{axis: slice(length, None)}).values
                if rest.dtype.kind == "f":
                    bad = ~np.isnan(rest)
                elif rest.dtype.kind == "O":
                    bad = rest != ""
                else:
                    bad = rest != (-1 if rest.dtype.kind == "i" else 0)
                faults += [f"{key} along {axis}"] if bad.any() else []
    return faults


def fingerprint(lm: LM) -> dict[str, Any]:
    """Weights, buffers, flags, modes, hooks, configs, generators, taps: what no verb may change."""
    modules = list(lm.model.named_modules())
    return {
        "weights": {k: v.clone() for k, v in lm.model.state_dict().items()},
        "buffers": {k: v.clone() for k, v in lm.model.named_buffers()},  # also those not saved
        "flags": {k: (p.requires_grad, p.grad is None) for k, p in lm.model.named_parameters()},
        "training": {k: m.training for k, m in modules},
        "hooks": {
            k: (list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks))
            for k, m in modules
        },
        "forwards": {k: id(m.__dict__.get("forward")) for k, m in modules},
        "configs": [(c.to_dict(), c._attn_implementation_internal) for c in configs_of(lm.model)],
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "taps": len(lm.taps.listening),
    }


def touched(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What of a fingerprint is not what it was."""

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
        return a == b

    return [key for key in before if not equal(before[key], after[key])]
