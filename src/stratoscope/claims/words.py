"""The two words of a paper, by one rule, wherever they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from stratoscope.claims import expression
from stratoscope.claims.claim import MINIATURE, READ, REAL, Claim
from stratoscope.claims.verdict import DIRECTION, FAILED, NO_TEST, REPRODUCED, Verdict

NOT_RUN, NOT_BUILT, MECHANISM = "built, not run", "not built", "mechanism only"
STATUSES = (REPRODUCED, DIRECTION, FAILED, NO_TEST, MECHANISM, NOT_RUN, NOT_BUILT)
WORST_FIRST = (FAILED, NOT_RUN, NO_TEST, DIRECTION, REPRODUCED)
RULE = (
    "A paper has two words. On real models: the worst among its statements, each the worst among "
    "the models that could be tested; beside it on how many of these models every statement is "
    "reproduced. On miniatures: the mechanism, by the same rule; it never counts for real models. "
    "A statement that could be tested on no model is no test, and the worst seed of a claim is its "
    "word."
)

Cell = tuple[Claim, str]  # a claim on one subject, and its word


class Words(NamedTuple):
    """real, mechanism: the word on real models and on miniatures, "" where the paper has none. held
    of tested: real models on which every statement is reproduced, of all but those on which none
    could be tested. run of claims: those with a verdict, each on each of its subjects."""

    real: str
    mechanism: str
    held: int
    tested: int
    run: int = 0
    claims: int = 0

    @property
    def status(self) -> str:
        """One word to count papers by: that of real models; `mechanism only` where there are only
        miniatures, and they have run."""
        alone = NOT_RUN if self.mechanism == NOT_RUN else MECHANISM
        return self.real or alone

    @property
    def summary(self) -> str:
        """Both in a line: `direction only (1 of 2 models); mechanism: reproduced`."""
        models = f" ({self.held} of {self.tested} models)" if self.tested else ""
        parts = [f"{self.real}{models}"] if self.real else []
        parts += [f"mechanism: {self.mechanism}"] if self.mechanism else []
        parts += [f"{self.run} of {self.claims} claims have run"] if self.in_part else []
        return "; ".join(parts)

    @property
    def in_part(self) -> bool:
        """Whether some claims have run and others have not."""
        return 0 < self.run < self.claims


def words(cells: Iterable[Cell]) -> Words:
    """The two words of a paper, from the words of its small claims."""
    small = [(claim, word) for claim, word in cells if claim.tier == "small"]
    real = [(claim, word) for claim, word in small if claim.kind == REAL]
    mechanism = _over([(claim, word) for claim, word in small if claim.kind == MINIATURE])
    models: dict[str, list[str]] = {}
    for claim, word in real:
        models.setdefault(claim.subject, []).append(word)
    tested = [result for result in models.values() if {*result} != {NO_TEST}]
    held = sum({*result} == {REPRODUCED} for result in tested)
    run = sum(word != NOT_RUN for _, word in small)
    return Words(_over(real), mechanism, held, len(tested), run, len(small))


def sentence(of: Words) -> str:
    """What was found, in a sentence for each kind of subject."""
    parts = []
    if of.real:
        reproduce = "reproduces" if of.held == 1 else "reproduce"
        models = f"; {of.held} of {of.tested} models {reproduce} every statement"
        parts.append(f"On real models: {of.real}{models if of.tested else ''}.")
    if of.mechanism:
        parts.append(f"In miniatures: {of.mechanism}.")
    if of.in_part:
        parts.append(f"So far {of.run} of {of.claims} claims have run, each on each of its models.")
    return " ".join(parts) or "Nothing was measured."


def marks(claims: Sequence[Claim], counted: Sequence[Verdict]) -> dict[str, tuple[bool, str]]:
    """Five marks of a paper's small claims, each with its reason; none is a matter of opinion."""
    named = {claim.name: claim for claim in claims}.values()
    unread = sum(claim.read == READ[-1] for claim in named)
    nulls = sum(claim.names_a_null for claim in named)
    bounds = sum(_by_bounds(claim) for claim in named)
    seeds = min((_seeds(claim, counted) for claim in claims), default=0)
    models = len({v.subject for v in counted for c in claims if c.kind == REAL and v.judges(c)})
    central = any(not claim.side for claim in named)
    every = f"of {len(named)} {_plural('claim', len(named))}"
    return {
        "faithful": (not unread, f"{unread} {every} read in the abstract alone"),
        "central": (
            central,
            "has what the authors would name first" if central else "has side shows alone",
        ),
        "severe": (nulls == len(named), f"{nulls} {every} compared with a null"),
        "powered": (
            bounds == len(named) and seeds > 2,
            f"{bounds} {every} judged by a bound; {seeds} {_plural('seed', seeds)}",
        ),
        "general": (models > 1, f"{models} real {_plural('model', models)} measured"),
    }


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _seeds(claim: Claim, counted: Sequence[Verdict]) -> int:
    return len({verdict.seed for verdict in counted if verdict.judges(claim)})


def _by_bounds(claim: Claim) -> bool:
    return any(expression.base(name) != name for name in expression.names(claim.expect))


def worst(results: Iterable[str]) -> str:
    """The worst of some words, "" of none."""
    return min(results, key=WORST_FIRST.index, default="")


def _over(cells: Sequence[Cell]) -> str:
    """The worst among statements; a model that could not be tested counts if no other could."""
    statements: dict[str, list[str]] = {}
    for claim, word in cells:
        statements.setdefault(claim.says, []).append(word)
    each = ([word for word in results if word != NO_TEST] for results in statements.values())
    return worst(worst(results) or NO_TEST for results in each)
