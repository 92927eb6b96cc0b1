"""What the contract suite runs, on a real device beside the CPU: tiny models, a line each.

    PYTHONPATH=src:tests python bench/gpu_contracts.py --device cuda     a minute; needs no pytest

A line says `ok` with the largest gap of all arrays, absolute and relative in norm, `DIFFERS` where
a gap is larger than --tolerance or NaN stands elsewhere, or the exception, with the last line of
stratoscope's that it went through. Ends with the counts; the exit status is 1 where a line is not
ok. --only WORD runs the lines that hold the word; --every runs measures on every subject.
"""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import torch
import xarray as xr

SOURCE = Path(__file__).parents[1] / "src"


class _Anything(ModuleType):
    """Stands for pytest, where that is not installed: the subjects are defined in test files,
    whose marks and fixtures nobody asks for here."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **options: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not options else self

    def __iter__(self) -> Any:
        return iter(())

    def fail(self, reason: str) -> None:
        raise RuntimeError(reason)


try:
    import pytest  # noqa: F401
except ImportError:
    sys.modules["pytest"] = _Anything("pytest")

import jaxtyping  # noqa: E402

from support import cases, on_device  # noqa: E402


def arrays(result: Any) -> dict[str, np.ndarray]:
    if isinstance(result, xr.Dataset):
        both = {**result.data_vars, **result.coords}
        return {str(name): values.values for name, values in both.items()}
    return {str(n): x.detach().float().cpu().numpy() for n, x in enumerate(result)}


def compared(here: Any, there: Any, tolerance: float) -> str:
    """`ok` or `DIFFERS`, the largest gaps and where."""
    left, right = arrays(here), arrays(there)
    worst, absolute, relative = "", 0.0, 0.0
    faults = [f"only one has {name}" for name in left.keys() ^ right.keys()]
    for name in left.keys() & right.keys():
        one, two = left[name], right[name]
        if one.shape != two.shape:
            faults.append(f"{name}: shapes {one.shape} and {two.shape}")
        elif one.dtype.kind != "f":
            faults += [f"{name}: other values"] if (one != two).any() else []
        elif (np.isfinite(one) != np.isfinite(two)).any():
            faults.append(f"{name}: not finite in other places")
        elif (finite := np.isfinite(one)).any():
            gap = np.abs(one[finite].astype(float) - two[finite])
            size = max(float(np.linalg.norm(one[finite])), 0.05)  # rounding has no relative error
            share = float(np.linalg.norm(gap)) / size
            absolute = max(absolute, float(gap.max()))
            worst, relative = (name, share) if share > relative else (worst, relative)
    if relative > tolerance:
        faults.append(worst)
    gaps = f"abs {absolute:.1e} rel {relative:.1e}"
    return f"DIFFERS {gaps} {'; '.join(faults)[:160]}" if faults else f"ok      {gaps}"


def place(error: BaseException) -> str:
    """The last of stratoscope's own lines that an error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if SOURCE in Path(frame.filename).parents] or frames
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} in {own[-1].name}"


@click.command(help=__doc__)
@click.option("--device", default="cuda", show_default=True)
@click.option("--only", default="", help="Run the lines whose name holds this.")
@click.option("--every", is_flag=True, help="Each measure on every subject that it runs on.")
@click.option("--tolerance", default=1e-3, show_default=True)
@click.option("--seconds", default=80.0, show_default=True, help="Begin nothing after so long.")
def main(device: str, only: str, every: bool, tolerance: float, seconds: float) -> None:
    jaxtyping.config.update("jaxtyping_disable", True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    began, moved, counts = time.perf_counter(), {}, {}
    for work in on_device.everything(every):
        if only not in work.name:
            continue
        if time.perf_counter() - began > seconds:
            text = "left out: no time"
        else:
            lm, start, where = cases.subject(work.subject), time.perf_counter(), "on the CPU"
            try:
                here, where = work.run(lm), f"on {device}"
                if work.subject not in moved:
                    moved[work.subject] = on_device.moved(lm, device)
                text = compared(here, work.run(moved[work.subject]), tolerance)
            except Exception as error:
                kind = type(error).__name__
                reason = " ".join(str(error).split())[:160]
                text = f"FAILS   {where}: {kind} at {place(error)}: {reason}"
            text += f" ({time.perf_counter() - start:.1f} s)"
        counts[text.split()[0]] = counts.get(text.split()[0], 0) + 1
        click.echo(f"{work.name:44} {work.subject:8} {text}")
    spent = time.perf_counter() - began
    click.echo(f"{device}, torch {torch.__version__}: {counts}, {spent:.0f} s")
    sys.exit(set(counts) != {"ok"})


if __name__ == "__main__":
    main()
