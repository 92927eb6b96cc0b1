"""A claim is what a paper says, the number expected before anything is measured, and the null it
must beat.

    @claim(says=..., where=..., tier="small", subjects=("smollm2", "gemma3-270m"), n="40 texts",
        expect="effect_low > 2 * random_bound", null={"random": "..."}, thresholds="2: the paper's")
    def a_name(lm: LM, seed: int) -> Measured: ...

    @claim(..., subject="MNIST classifiers of four seeds", kind="miniature", ...)
    def another(seed: int) -> Measured: ...

The decorator only writes the statement on the function (`a_name.claims`, one for each subject); the
function stays an ordinary one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, TypeVar

from stratoscope.claims import expression, trial
from stratoscope.errors import ClaimError

TIERS = {
    "identity": "milliseconds on a tiny random or planted model, in every test run",
    "small": "minutes on one core, with a real or a miniature model",
    "paper": "the paper's own model, on request; where it cannot run here, its protocol stands on "
    "the page",
}
READ = ("full text", "authors' code", "abstract")
REAL, MINIATURE = "real", "miniature"
_UNITS = re.compile(r"([\d,]+) (\S.*)")

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement of a paper about one subject, and what must be measured for it to count. Raises
    ClaimError when it cannot be judged.

    says: what the authors say, alone; where: where they say so; read: how much of the paper was
    read (one of READ). tier: a key of TIERS. subject: what it runs on; kind: whether that is a real
    model or a miniature; any_model: whether it can be measured on any other language model.

    valid: the comparison without which there was no test ("" asks for nothing). expect: the one
    that makes it `reproduced`; direction: the weaker one that makes it `direction only`, or "".
    we_add: what we demand beyond the authors, and we_expect: its comparison, judged apart.
    null: what each null is, by the name of its number. thresholds: where the numbers in the
    comparisons come from, and the smallest effect that would matter. n: the least number of
    independent units, with their name: "40 texts". found_there: the paper's own numbers by name.
    side: whether it is beside what the authors would name first. about: how it is measured here.
    """

    name: str
    says: str
    where: str
    tier: str
    subject: str
    expect: str
    null: Mapping[str, str]
    read: str = ""
    kind: str = ""
    any_model: bool = False
    valid: str = ""
    direction: str = ""
    we_add: str = ""
    we_expect: str = ""
    thresholds: str = ""
    n: str = ""
    found_there: Mapping[str, float] = field(default_factory=dict)
    side: bool = False
    about: str = ""

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise ClaimError(f"Claim {self.name} {problem}")
        try:
            trial.refuse(self.expect, self.direction, self.valid)
            if self.we_expect:
                trial.refuse(self.we_expect, "", self.valid)
        except ClaimError as error:
            raise ClaimError(f"Claim {self.name}: {error}") from error

    @property
    def least(self) -> int:
        """The least number of independent units; 1 where none is asked for."""
        match = _UNITS.fullmatch(self.n)
        return int(match[1].replace(",", "")) if match else 1

    @property
    def unit(self) -> str:
        """What an independent unit is: "texts"; "" where it was not said."""
        match = _UNITS.fullmatch(self.n)
        return match[2] if match else ""

    @property
    def names_a_null(self) -> bool:
        """Whether the expectation compares with one of the nulls."""
        return _names_a_null(self.expect, self.null)


def claim(
    *, subject: str = "", subjects: Sequence[str] = (), **words: Any
) -> Callable[[Function], Function]:
    """Mark a function as the measurement of a claim; `Claim` says what the words mean.

    With `subject` the function takes a seed and brings its own model; with `subjects`, names of
    language models, it takes a model and a seed, and can be run on any other one.
    """

    def mark(function: Function) -> Function:
        about = " ".join((function.__doc__ or "").split())
        function.claims = stated(  # type: ignore[attr-defined]
            function.__name__,
            list(signature(function).parameters),
            words | {"subject": subject, "subjects": tuple(subjects), "about": about},
        )
        return function

    return mark


def stated(name: str, parameters: Sequence[str], words: Mapping[str, Any]) -> tuple[Claim, ...]:
    """The claims of one marked function, one for each of its subjects.

    Raises ClaimError when they cannot be judged or the function takes something else, TypeError for
    a word too many or too few.
    """
    options = dict(words)
    one, several = options.pop("subject", ""), tuple(options.pop("subjects", ()))
    wanted = ["lm", "seed"] if several else ["seed"]
    if bool(one) == bool(several):
        raise ClaimError(
            f"Claim {name} needs a subject in words, or subjects by name: one of both."
        )
    if list(parameters) != wanted:
        raise ClaimError(
            f"Claim {name} takes ({', '.join(parameters)}); with "
            f"{'subjects' if several else 'a subject of its own'} it takes ({', '.join(wanted)})."
        )
    if several:
        options |= {"any_model": True, "kind": options.get("kind", REAL)}
    return tuple(Claim(name=name, subject=subject, **options) for subject in several or (one,))


def _problems(claim: Claim) -> Iterator[str]:
    """What is wrong with the words of a claim, in parts of sentences; the comparisons are read."""
    for word in ("says", "where", "subject"):
        if not getattr(claim, word).strip():
            yield f"leaves {word!r} empty. Say it in words."
    if claim.tier not in TIERS:
        yield f"has tier {claim.tier!r}; the tiers are {', '.join(TIERS)}."
    if not claim.expect:
        yield "expects nothing. Write the comparison before measuring."
    if not isinstance(claim.null, Mapping) or not all(map(str.strip, claim.null.values())):
        yield 'has a null without words. Write null={"random": "what it is"}.'
    if bool(claim.we_add) != bool(claim.we_expect):
        yield "has only one of we_add and we_expect: what we demand beyond the authors needs both."
    texts = [claim.valid, claim.expect, claim.direction, claim.we_expect]
    numbers = set().union(*(expression.numbers(text) for text in texts if text)) - {0.0, 1.0}
    for text in filter(None, texts):
        expression.names(text)
    if claim.tier == "identity":
        return
    if claim.read not in READ:
        yield f"has read={claim.read!r}; say how much was read: {', '.join(READ)}."
    if claim.kind not in (REAL, MINIATURE):
        yield f"has kind={claim.kind!r}: is its subject a {REAL!r} model or a {MINIATURE!r}?"
    if not _UNITS.fullmatch(claim.n) or claim.least < 1:
        yield f'has n={claim.n!r}: say how many independent units there are, as "40 texts".'
    if numbers and not claim.thresholds.strip():
        yield (
            f"compares with {', '.join(f'{x:g}' for x in sorted(numbers))} and leaves 'thresholds' "
            "empty. Say where these numbers come from."
        )
    if not claim.names_a_null and not claim.thresholds.strip():
        yield (
            f"names none of its nulls ({', '.join(claim.null) or 'it has none'}) in "
            f"{claim.expect!r}. Compare with one, or state in 'thresholds' whose bound it is."
        )


def _names_a_null(expect: str, null: Mapping[str, str]) -> bool:
    used = expression.names(expect)
    return bool((used | {expression.base(name) for name in used}) & null.keys())
