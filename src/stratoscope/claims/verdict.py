"""A verdict: one run of a claim as it is kept, and how its word comes of its numbers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stratoscope.claims import expression
from stratoscope.claims.claim import Claim
from stratoscope.claims.measured import bounds, ends
from stratoscope.errors import ClaimError

REPRODUCED, DIRECTION, FAILED = "reproduced", "direction only", "not reproduced"
NO_TEST = "no test"
WORDS = (REPRODUCED, DIRECTION, FAILED, NO_TEST)
HOLDS, DOES_NOT = "holds", "does not hold"
MOST_CORNERS = 8  # names with an interval in one comparison


class Judgement(NamedTuple):
    """status: one of WORDS; why: what spoilt the test, or ""; added: of what we demand beyond the
    authors, `holds`, `does not hold`, or "" where nothing is demanded or nothing was tested."""

    status: str
    why: str = ""
    added: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One run of a claim: the comparisons are those that were judged, whatever they are now.

    form: 1 for verdicts from before validity, bounds and registration; their word is the old one.
    """

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
    form: int = 1
    valid: str = ""
    we_expect: str = ""
    wanted: str = ""  # the claim's n
    why: str = ""
    added: str = ""
    draws: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    units: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    registered: str = ""  # the digest of its registration, where that lay in the commit

    def __post_init__(self) -> None:
        if self.status not in WORDS:
            raise ClaimError(f"{self.status!r} is no status; they are {', '.join(WORDS)}.")

    def judges(self, claim: Claim) -> bool:
        """Whether this verdict is about the claim as it stands: its words were not changed after
        the measurement."""
        before = (self.claim, self.tier, self.subject, self.expect, self.direction, self.valid)
        now = (claim.name, claim.tier, claim.subject, claim.expect, claim.direction, claim.valid)
        units = self.form == 1 or self.wanted == claim.n
        return before == now and self.we_expect == claim.we_expect and units

    @property
    def numbers(self) -> dict[str, float]:
        """All that its comparisons may name."""
        return {**self.values, **self.null, **ends(self.interval), **bounds(self.draws)}


def judge(claim: Claim | Verdict, numbers: Mapping[str, float], n: int, least: int) -> Judgement:
    """The word that the numbers give. NaN never counts.

    `no test` where the validity does not hold, where there are fewer units than were wanted, or
    where nothing holds and yet the direction could, within the intervals. Raises ClaimError when a
    comparison names what was not measured.
    """
    texts = [claim.expect, *filter(None, (claim.direction, claim.valid, claim.we_expect))]
    true = {text: expression.holds(text, numbers) for text in texts}
    if claim.valid and not true[claim.valid]:
        return Judgement(NO_TEST, f"`{claim.valid}` does not hold")
    if n < least:
        return Judgement(NO_TEST, f"n = {n}, and at least {least} was wanted")
    added = (HOLDS if true[claim.we_expect] else DOES_NOT) if claim.we_expect else ""
    toward = claim.direction or claim.expect
    if true[toward]:
        return Judgement(REPRODUCED if true[claim.expect] else DIRECTION, "", added)
    if _open(toward, numbers):
        return Judgement(NO_TEST, f"within the intervals `{toward}` may hold or not", added)
    return Judgement(FAILED, "", added)


def refused(reason: str) -> Judgement:
    """The word of a claim whose measure refused the model or its material, with the reason."""
    return Judgement(NO_TEST, f"it could not be measured: {' '.join(reason.split())}")


def rejudged(verdict: Verdict) -> Judgement:
    """The word that a verdict's own numbers give, by its own comparisons; the word as it stands for
    those of the old form. Without numbers it is `no test`."""
    if verdict.form == 1:
        return Judgement(verdict.status)
    if not verdict.n:
        return Judgement(NO_TEST, verdict.why)
    least = int(verdict.wanted.partition(" ")[0].replace(",", "") or 1)
    return judge(verdict, verdict.numbers, verdict.n, least)


def _open(text: str, numbers: Mapping[str, float]) -> bool:
    """Whether a comparison that does not hold could, had each number been anywhere in its
    interval."""
    used = {expression.base(name) for name in expression.names(text)}
    inside = [name for name in sorted(used) if f"{name}_low" in numbers][:MOST_CORNERS]
    spans = [(numbers[f"{name}_low"], numbers[f"{name}_high"]) for name in inside]
    for corner in itertools.product(*spans):
        moved = {
            f"{name}{end}": value
            for name, value in zip(inside, corner)
            for end in ("", "_low", "_high")
        }
        if expression.holds(text, {**numbers, **moved}):
            return True
    return False
