"""A claim is what a paper says, the number expected before anything is measured, and the null it
must beat.

    @claim(says=..., where=..., tier="small", subject="smollm2", expect="effect > 2 * random",
        null="...")
    def a_name(seed: int) -> Measured: ...

The decorator only writes the statement on the function (`a_name.claim`); the function stays an
ordinary one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsInt, TypeVar

from stratoscope.claims import expression
from stratoscope.errors import ClaimError

if TYPE_CHECKING:
    import xarray as xr

TIERS = {
    "identity": "milliseconds on a tiny random or planted model, in every test run",
    "small": "minutes on one core, with a real or a miniature model",
    "paper": "the paper's own model, on request",
}
REPRODUCED, DIRECTION, FAILED = "reproduced", "direction only", "not reproduced"
LARGEST = 400  # numbers in a figure: it is stored as text, in one line of the verdict file

Function = TypeVar("Function", bound=Callable[[int], Any])


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of a paper, and what must be measured for it to count. Raises ClaimError when
    it cannot be judged.

    says: what the paper says; where: where it says so. tier: a key of TIERS. subject: what it runs
    on. expect: the comparison that makes it `reproduced`; direction: the weaker one that makes it
    `direction only`, or "". null: what the null is, in words. about: how it is measured here.
    """

    name: str
    says: str
    where: str
    tier: str
    subject: str
    expect: str
    null: str
    direction: str = ""
    about: str = ""

    def __post_init__(self) -> None:
        for word in ("says", "where", "subject", "null"):
            if not getattr(self, word).strip():
                raise ClaimError(f"Claim {self.name} leaves {word!r} empty. Say it in words.")
        if self.tier not in TIERS:
            raise ClaimError(
                f"Claim {self.name} has tier {self.tier!r}; the tiers are {', '.join(TIERS)}."
            )
        for text in filter(None, (self.expect, self.direction)):
            expression.names(text)
        if not self.expect:
            raise ClaimError(
                f"Claim {self.name} expects nothing. Write the comparison before measuring."
            )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one run of a claim found. Raises ClaimError for what cannot be judged or stored.

    values: numbers by the names that the expectation uses; null: the null's numbers, their names
    usable as well. n: independent units (prompts, neurons, pictures). interval: (low, high) by
    name. figure: a labelled array of at most 400 numbers. note: what was tried, and caveats.
    """

    values: Mapping[str, Any]
    null: Mapping[str, Any] = field(default_factory=dict)
    n: SupportsInt
    interval: Mapping[str, Any] = field(default_factory=dict)
    figure: xr.DataArray | None = None
    note: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", int(self.n))
        for name in ("values", "null"):
            # numpy's and torch's scalars become plain numbers here, so that a stored verdict is
            # plain JSON
            try:
                plain = {str(key): float(value) for key, value in getattr(self, name).items()}
            except (TypeError, ValueError) as error:
                raise ClaimError(
                    f"{name} of a claim are numbers by name, and one of them is not ({error})."
                ) from error
            object.__setattr__(self, name, plain)
        if both := sorted(self.values.keys() & self.null.keys()):
            raise ClaimError(f"{both} is measured and null at once. Give one of them another name.")
        if stray := sorted(self.interval.keys() - self.numbers.keys()):
            raise ClaimError(
                f"There is an interval for {stray}, but no such number; there are "
                f"{sorted(self.numbers)}."
            )
        object.__setattr__(
            self, "interval", {k: (float(a), float(b)) for k, (a, b) in self.interval.items()}
        )
        if self.figure is not None and self.figure.size > LARGEST:
            raise ClaimError(
                f"The figure has {self.figure.size} numbers; at most {LARGEST} are kept. Summarise "
                "it."
            )

    @property
    def numbers(self) -> dict[str, float]:
        """Values and null together: the names an expectation may use."""
        return {**self.values, **self.null}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One run of a claim, as it is kept: `expect` and `direction` are those that were judged,
    whatever they are now."""

    key: str
    claim: str
    tier: str
    subject: str
    status: str
    expect: str
    direction: str
    values: Mapping[str, float]
    null: Mapping[str, float]
    interval: Mapping[str, tuple[float, float]]
    n: int
    seed: int
    seconds: float
    date: str  # UTC, 2026-07-01T12:00:00Z
    versions: Mapping[str, str]
    figure: Mapping[str, Any] | None = None  # as figure.encode gives it
    note: str = ""
    # what it was measured with: digests by module (`code.py`), the commit, the machine
    code: Mapping[str, str] = field(default_factory=dict)
    commit: str = ""
    machine: str = ""

    def __post_init__(self) -> None:
        if self.status not in (REPRODUCED, DIRECTION, FAILED):
            raise ClaimError(
                f"{self.status!r} is no status; they are {REPRODUCED}, {DIRECTION} and {FAILED}."
            )

    def judges(self, claim: Claim) -> bool:
        """Whether this verdict is about the claim as it stands: its words were not changed after
        the measurement."""
        kept = (self.claim, self.tier, self.subject, self.expect, self.direction)
        return kept == (claim.name, claim.tier, claim.subject, claim.expect, claim.direction)


def claim(
    *, says: str, where: str, tier: str, subject: str, expect: str, null: str, direction: str = ""
) -> Callable[[Function], Function]:
    """Mark a function as the measurement of a claim; `Claim` says what the words mean. It takes a
    seed."""

    def mark(function: Function) -> Function:
        words = {"says": says, "where": where, "tier": tier, "subject": subject, "null": null}
        about = " ".join((function.__doc__ or "").split())
        stated = Claim(
            name=function.__name__, expect=expect, direction=direction, about=about, **words
        )
        function.claim = stated
        return function

    return mark


def judge(claim: Claim, measured: Measured) -> str:
    """The status word. NaN never counts. Raises ClaimError when the expectation names what was not
    measured."""
    numbers = measured.numbers
    direction = bool(claim.direction) and expression.holds(claim.direction, numbers)
    if expression.holds(claim.expect, numbers):
        return REPRODUCED
    return DIRECTION if direction else FAILED
