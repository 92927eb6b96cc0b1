"""What is still to be measured, and measuring it piece by piece until the time is used up.

Nothing is remembered but the verdicts: what was measured is no longer due, so a run that was
interrupted goes on where it stopped. Each claim runs in a process of its own, so that its verdict
names the modules it loaded and no other claim's, and so that a crash costs one claim.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from stratoscope.claims.claim import Claim
from stratoscope.claims.ledger import Atlas, Entry
from stratoscope.errors import ClaimError

_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Due:
    """One claim on one seed. seconds: what it last took, NaN where it never ran. why: "not run", or
    what changed."""

    entry: Entry
    claim: Claim
    seed: int
    seconds: float
    why: str

    def __str__(self) -> str:
        return f"{self.entry.row.key} {self.claim.name} on {self.claim.subject}, seed {self.seed}"

    @property
    def arguments(self) -> list[str]:
        """What `stratoscope` is told on the command line."""
        claim = ["claim", self.entry.row.key, "--claim", self.claim.name]
        return [*claim, "--subject", self.claim.subject, "--seed", str(self.seed)]


def due(atlas: Atlas, seeds: Sequence[int], *, stale: bool, keys: Sequence[str] = ()) -> list[Due]:
    """Small claims without a verdict on one of the seeds and, if stale, those whose verdict is; the
    quickest first.

    keys: only these papers. Claims that were never timed come last. Of a claim whose seeds are all
    stale the first alone is due: if it gives the same numbers again, it confirms the others.
    """
    chosen = [atlas.find(key) for key in keys] or atlas.built()
    pieces = [
        piece
        for entry in chosen
        for claim in entry.small
        for piece in _of(entry, claim, seeds, stale)
    ]
    return sorted(pieces, key=lambda piece: (piece.seconds != piece.seconds, piece.seconds))


def work(
    pieces: Sequence[Due],
    budget: float,
    measure: Callable[[Due], int],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[Due, str]]:
    """Measure one after another, and say of each what became of it: "measured", "failed", or "left"
    for another time.

    budget: seconds. measure(piece): its exit status. A claim that is known to take longer than what
    is left is left out; one that runs is never stopped.
    """
    end = clock() + budget
    for piece in pieces:
        left = end - clock()
        if left <= 0 or piece.seconds > left:
            yield piece, "left"
        else:
            yield piece, "failed" if measure(piece) else "measured"


def read_seeds(text: str) -> list[int]:
    """`0-2` or `0,1,5`. Raises ClaimError for anything else."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?((?:,\d+)*)", text)
    if not match:
        raise ClaimError(f"seeds {text!r}: write 0-2, or 0,1,5.")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ClaimError(f"seeds {text!r}: {first} comes after {last}.")
    return [*range(first, last + 1), *map(int, filter(None, match[3].split(",")))]


def read_budget(text: str) -> float:
    """`90s`, `30m` or `2h` in seconds. Raises ClaimError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match:
        raise ClaimError(f"budget {text!r}: write 90s, 30m or 2h.")
    return float(match[1]) * _UNITS[match[2]]


def _of(entry: Entry, claim: Claim, seeds: Sequence[int], stale: bool) -> list[Due]:
    whys = {seed: why for seed in seeds if (why := _why(entry, claim, seed, stale))}
    measured = {verdict.seed for verdict in entry.seeds(claim)}
    if len(seeds) > 1 and set(seeds) <= measured and len(whys) == len(seeds):
        whys = dict([next(iter(whys.items()))])
    return [Due(entry, claim, seed, _seconds(entry, claim), why) for seed, why in whys.items()]


def _why(entry: Entry, claim: Claim, seed: int, stale: bool) -> str:
    newest = next((v for v in entry.seeds(claim) if v.seed == seed), None)
    if newest is None:
        return "not run"
    return "; ".join(entry.why_stale(newest)) if stale else ""


def _seconds(entry: Entry, claim: Claim) -> float:
    """What it took at most; on another subject, if it was never timed on this one."""
    timed = [v for v in entry.verdicts if v.claim == claim.name]
    here = [v for v in timed if v.subject == claim.subject] or timed
    return max((v.seconds for v in here), default=float("nan"))
