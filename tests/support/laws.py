"""The laws of `measure`, `fit` and `edit`, as functions that return what is broken, a line each.

The contract suite asks that each list is empty; `tests/test_laws.py` shows that each law can fail.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from safetensors.torch import load_file
from torch import Tensor, nn

import stratoscope
from stratoscope.models import LM
from stratoscope.results import axes, load, save
from support.cases import Case
from support.compare import (
    alone_differences,
    arrays,
    differences,
    fingerprint,
    touched,
    unpadded,
)

Faults = list[str]


# --- measure --------------------------------------------------------------------------------------


def labelled(result: xr.Dataset, address: str, case: Case, folder: Path) -> Faults:
    """A result is whole, says where it came from, holds nothing in padding, and survives a file."""
    faults = [] if result.data_vars else ["no data"]
    for key, array in arrays(result).items():
        unknown = set(map(str, array.dims)) - set(axes.words(address))
        faults += [f"{key} has axes that no page explains: {unknown}"] if unknown else []
        faults += [] if array.dtype.kind in "fiubO" else [f"{key} is of type {array.dtype}"]
    numbers = [a for a in result.data_vars.values() if a.dtype.kind == "f"]
    if numbers and not any(np.isfinite(a.values).any() for a in numbers):
        faults.append("no number is finite")
    faults += [f"padding holds something: {key}" for key in unpadded(result, case.lengths)]
    if result.attrs.get("method") != address:
        faults.append(f"it calls itself {result.attrs.get('method')}")
    if json.loads(result.attrs["provenance"]) != json.loads(json.dumps(case.lm.provenance)):
        faults.append("its provenance is not the model's")
    if not isinstance(json.loads(result.attrs["settings"]), dict):
        faults.append("its settings are no table")
    save(result, folder / "result.nc")
    back = load(folder / "result.nc")
    return faults if back.identical(result) else [*faults, "a file of it is not the same"]


def seeded(result: xr.Dataset, measure: Callable[..., Any]) -> Faults:
    """A measure that draws says with which seed."""
    draws = "seed" in inspect.signature(measure).parameters
    return ["its seed is not in the result"] if draws and result.attrs.get("seed") != 0 else []


def batched(measure: Callable[[Case], xr.Dataset], right: xr.Dataset, case: Case) -> Faults:
    """Padding on the left gives what padding on the right gave, and so does each prompt alone; the
    model is untouched."""
    before = fingerprint(case.lm)
    left = measure(case.at("left"))
    faults = [f"changed: {what}" for what in touched(before, fingerprint(case.lm))]
    faults += [f"left padding: {said}" for said in differences(right, left, 1e-6)]
    if not case.rows:  # pictures are named by their place in the batch
        right = right.drop_vars("example_text", errors="ignore")
    if not any("example" in array.dims for array in right.data_vars.values()):
        return faults
    for example, length in enumerate(case.lengths):
        single = measure(case.at(example=example))
        gaps = alone_differences(right, single, example, length)
        faults += [f"example {example} alone: {said}" for said in gaps]
    return faults


def repeatable(measure: Callable[[Case], xr.Dataset], first: xr.Dataset, case: Case) -> Faults:
    """The same seed gives the same result bit for bit, on a model in training mode with dropout,
    with other numbers drawn in between."""
    torch.manual_seed(123)
    case.lm.model.train()
    before = fingerprint(case.lm)
    try:
        again = measure(case)
        faults = [f"changed: {what}" for what in touched(before, fingerprint(case.lm))]
    finally:
        case.lm.model.eval()
    return faults + [f"again: {said}" for said in differences(first, again, 0.0)]


def interrupted(run: Callable[[], Any], lm: LM, module: nn.Module) -> tuple[Faults, bool]:
    """What is not as it was after a run that breaks half way, in `module`; and whether it ran."""

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    before, ran = fingerprint(lm), False
    own = module.__dict__.get("forward")
    module.forward = fail  # type: ignore[method-assign]
    try:
        run()
    except KeyboardInterrupt:
        ran = True
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
    return [f"changed: {what}" for what in touched(before, fingerprint(lm))], ran


# --- edit -----------------------------------------------------------------------------------------


def undone(make: Callable[[], Any], run: Callable[[], Tensor], lm: LM, file: Path) -> Faults:
    """Outputs change inside the block, and not a bit afterwards, also after an exception; the same
    edit made again, and one read from a file, change them alike."""
    before, plain = fingerprint(lm), run()
    edit = make()
    faults = [f"making it changed: {what}" for what in touched(before, fingerprint(lm))]
    with edit:
        inside = run()
    if torch.equal(inside, plain):
        faults.append("outputs are the same inside the block")
    faults += [f"left changed: {what}" for what in touched(before, fingerprint(lm))]
    if not torch.equal(run(), plain):
        faults.append("outputs are not what they were")
    try:
        with edit:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    else:
        faults.append("the block swallows exceptions")
    faults += [f"left changed by an exception: {w}" for w in touched(before, fingerprint(lm))]
    with make():
        if not torch.equal(run(), inside):
            faults.append("the same request again is another edit")
    return faults + _kept(edit, run, inside, lm, file)


def _kept(edit: Any, run: Callable[[], Tensor], inside: Tensor, lm: LM, file: Path) -> Faults:
    if not hasattr(edit, "save"):
        return ["it cannot be saved"]
    edit.save(file)
    with type(edit).load(lm, file):
        return [] if torch.equal(run(), inside) else ["read from its file it is another edit"]


# --- fit ------------------------------------------------------------------------------------------


def tensors(fitted: Any) -> dict[str, Tensor]:
    """The tensors of what was fitted, by name: a `Fitted`, or a model's folder."""
    if isinstance(fitted, Path):
        files = sorted(fitted.glob("*.safetensors"))
        return {name: x for file in files for name, x in load_file(file).items()}
    held = getattr(fitted, "tensors", None)
    fields = held if isinstance(held, dict) else vars(fitted)
    return {name: x for name, x in fields.items() if isinstance(x, Tensor)}


def unequal(one: Any, two: Any) -> Faults:
    """Which tensors of two fits are not the same, bit for bit."""
    left, right = tensors(one), tensors(two)
    if not left or left.keys() != right.keys():
        return [f"tensors {sorted(left)} and {sorted(right)}"]
    same = {k for k in left if left[k].dtype == right[k].dtype and torch.equal(left[k], right[k])}
    return [k for k in left if k not in same]


def kept(fit: Callable[[Path], Any], lm: LM, folder: Path) -> Faults:
    """A fit is the same after save and load and with the same seed, bit for bit, whatever was drawn
    before; the model is untouched.

    fit: makes it anew; the path is for those that give a model's folder.
    """
    before = fingerprint(lm)
    first = fit(folder / "first")
    faults = [f"changed: {what}" for what in touched(before, fingerprint(lm))]
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002
    faults += [f"the same seed, another {name}" for name in unequal(first, fit(folder / "second"))]
    if isinstance(first, Path):
        opened = stratoscope.load(str(first), tokenizer=False)
        opened.model.save_pretrained(folder / "saved")
        wrong = unequal(first, folder / "saved")
    else:
        first.save(folder / "saved")
        wrong = unequal(first, type(first).load(folder / "saved"))
    return faults + [f"loaded, another {name}" for name in wrong]


def resumed(fit: Callable[[Path], Any], folder: Path, after: int = 1) -> Faults:
    """A fit that breaks in its backward pass `after` (from 0), and is begun again in its folder, is
    the fit that was never interrupted."""
    whole, count, backward = fit(folder / "whole"), 0, Tensor.backward

    def breaks(*args: Any, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        backward(*args, **kwargs)

    Tensor.backward = breaks  # type: ignore[method-assign]
    try:
        fit(folder / "broken")
    except KeyboardInterrupt:
        pass
    else:
        return ["it was never interrupted"]
    finally:
        Tensor.backward = backward  # type: ignore[method-assign]
    return [f"resumed, another {name}" for name in unequal(whole, fit(folder / "broken"))]
