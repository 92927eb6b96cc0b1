"""What one run of a claim found: numbers by name, also of the null, with intervals and bounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsInt

from stratoscope.errors import ClaimError

if TYPE_CHECKING:
    import xarray as xr

LARGEST = 400  # numbers in a figure, or of units: stored as text, in one line of the verdict file


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Raises ClaimError for what cannot be judged or stored.

    values: numbers by the names that the expectation uses. null: the null's numbers, or its draws
    (draw,), by names that are usable as well. units: raw numbers by name (unit,), from which the
    mean (where `values` has none) and its 95 % interval are made. interval: (low, high) by name,
    where it was made otherwise. n: independent units (prompts, concepts, nets), at least 1.
    figure: a labelled array of at most 400 numbers. note: what was tried, and caveats.

    From an interval of x come x_low and x_high, from several draws of x their mean x, x_bound (the
    next draw exceeds it in 5 of 100 cases) and x_floor (the next draw falls below it as rarely);
    with fewer than 19 draws both are infinite.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    null: Mapping[str, Any] = field(default_factory=dict)
    n: SupportsInt
    units: Mapping[str, Any] = field(default_factory=dict)
    interval: Mapping[str, Any] = field(default_factory=dict)
    figure: xr.DataArray | None = None
    note: str = ""
    draws: Mapping[str, tuple[float, ...]] = field(init=False)

    def __post_init__(self) -> None:
        keep = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        keep("n", int(self.n))
        if int(self.n) < 1:
            raise ClaimError(f"A claim was measured on n = {self.n} units; there must be one.")
        drawn = {str(k): v for k, v in self.null.items() if _several(v)}
        rows = {name: _row(name, values) for name, values in drawn.items()}
        means = {name: sum(row) / len(row) for name, row in rows.items()}
        keep("null", _plain("null", {**self.null, **means}))
        keep("draws", {name: _short(row) for name, row in rows.items()})
        rows = {str(name): _row(name, values) for name, values in self.units.items()}
        means = {name: sum(row) / len(row) for name, row in rows.items()}
        keep("values", _plain("values", {**means, **self.values}))
        keep("units", {name: _short(row) for name, row in rows.items()})
        made = {name: _interval(row) for name, row in rows.items()}
        given = {str(k): (float(low), float(high)) for k, (low, high) in self.interval.items()}
        keep("interval", {**made, **given})
        self._check()

    def _check(self) -> None:
        plain = {**self.values, **self.null}
        if twice := sorted(self.values.keys() & self.null.keys()):
            raise ClaimError(
                f"{twice} is measured and null at once. Give one of them another name."
            )
        if stray := sorted(self.interval.keys() - plain.keys()):
            raise ClaimError(
                f"There is an interval for {stray}, but no such number; there are {sorted(plain)}."
            )
        if made := sorted(self._made().keys() & plain.keys()):
            raise ClaimError(f"{made} comes of an interval or of draws. Give the number its own.")
        if self.figure is not None and self.figure.size > LARGEST:
            raise ClaimError(
                f"The figure has {self.figure.size} numbers; at most {LARGEST} are kept. Summarise "
                "it."
            )

    @property
    def numbers(self) -> dict[str, float]:
        """Values and null, and what comes of intervals and draws: what an expectation may use."""
        return {**self.values, **self.null, **self._made()}

    def _made(self) -> dict[str, float]:
        return {**ends(self.interval), **bounds(self.draws)}


def ends(interval: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """x_low and x_high of each interval."""
    low = {f"{name}_low": low for name, (low, _) in interval.items()}
    return low | {f"{name}_high": high for name, (_, high) in interval.items()}


def bounds(draws: Mapping[str, tuple[float, ...]]) -> dict[str, float]:
    """x_bound and x_floor of each null's draws."""
    if not draws:
        return {}
    import numpy as np

    from stratoscope.maths import resample

    rows = {name: np.array(row) for name, row in draws.items()}
    above = {f"{name}_bound": resample.bound(row) for name, row in rows.items()}
    return above | {f"{name}_floor": -resample.bound(-row) for name, row in rows.items()}


def _interval(row: tuple[float, ...]) -> tuple[float, float]:
    import numpy as np

    from stratoscope.maths import resample

    spread = resample.interval(np.array(row))
    return spread.low, spread.high


def _short(row: tuple[float, ...]) -> tuple[float, ...]:
    """Six digits, as they are stored: the bounds of draws come of these, before and after."""
    return tuple(float(f"{value:.6g}") for value in row)


def _several(value: Any) -> bool:
    """Whether it is a row of draws; an array without axes is a number."""
    return isinstance(value, list | tuple) or bool(getattr(value, "ndim", 0))


def _row(name: str, values: Iterable[Any]) -> tuple[float, ...]:
    row = tuple(_plain(name, dict(enumerate(values))).values())
    if not 0 < len(row) <= LARGEST:
        raise ClaimError(f"{name} has {len(row)} numbers; there are 1 to {LARGEST} of a name.")
    return row


def _plain(what: str, numbers: Mapping[Any, Any]) -> dict[str, float]:
    """numpy's and torch's scalars as plain numbers, so that a stored verdict is plain JSON."""
    try:
        return {str(key): float(value) for key, value in numbers.items()}
    except (TypeError, ValueError) as error:
        raise ClaimError(
            f"{what} of a claim are numbers by name, and one of them is not ({error})."
        ) from error
