"""A claim, what is measured, and the word that comes of it; a paper's word from its claims'."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from stratoscope.claims import Claim, Measured, Verdict, claim, ledger
from stratoscope.claims.claim import judge
from stratoscope.claims.paper import read
from stratoscope.claims.run import run
from stratoscope.errors import ClaimError

WORDS = {
    "says": "It is so",
    "where": "abstract",
    "tier": "small",
    "subject": "none",
    "null": "chance",
}
CLAIM = Claim(name="it", expect="a > 2 * b", direction="a > b", **WORDS)


@pytest.mark.parametrize(
    ("a", "word"),
    [(5, "reproduced"), (3, "direction only"), (1, "not reproduced"), (math.nan, "not reproduced")],
)
def test_the_three_words(a: float, word: str) -> None:
    assert judge(CLAIM, Measured(values={"a": a}, null={"b": 2.0}, n=1)) == word


def test_without_a_direction_there_is_no_middle() -> None:
    plain = dataclasses.replace(CLAIM, direction="")
    assert judge(plain, Measured(values={"a": 3.0}, null={"b": 2.0}, n=1)) == "not reproduced"


def test_a_direction_that_was_not_measured_is_an_error_even_when_the_expectation_holds() -> None:
    with pytest.raises(ClaimError, match="'c'"):
        judge(dataclasses.replace(CLAIM, direction="a > c"), Measured(values={"a": 9, "b": 1}, n=1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"expect": ""},
        {"expect": "a"},
        {"direction": "a !"},
        {"tier": "large"},
        {"null": " "},
        {"says": ""},
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused_when_it_is_written(wrong: dict[str, str]) -> None:
    with pytest.raises(ClaimError):
        claim(**({"expect": "a > b"} | WORDS | wrong))(lambda seed: None)


def test_a_marked_function_stays_a_function() -> None:
    @claim(expect="a > b", **WORDS)
    def marked(seed: int) -> Measured:
        """How it
        is done."""
        return Measured(values={"a": seed}, n=1)

    assert marked(3).values == {"a": 3.0}
    assert marked.claim == Claim(name="marked", expect="a > b", about="How it is done.", **WORDS)


def test_what_is_measured_becomes_plain() -> None:
    found = Measured(
        values={"a": np.float32(0.5)},
        null={"b": np.int64(2)},
        n=1,
        interval={"a": (np.float64(0), 1)},
    )
    assert [type(value) for value in found.numbers.values()] == [float, float]
    assert found.interval == {"a": (0.0, 1.0)}


@pytest.mark.parametrize(
    "wrong",
    [
        {"values": {"a": "many"}},
        {"values": {"a": [1, 2]}},
        {"values": {"a": 1.0}, "null": {"a": 2.0}},
        {"values": {"a": 1.0}, "interval": {"b": (0, 1)}},
    ],
)
def test_what_cannot_be_kept_is_refused(wrong: dict) -> None:
    with pytest.raises(ClaimError):
        Measured(n=1, **wrong)


def test_a_large_figure_is_refused() -> None:
    import xarray as xr

    with pytest.raises(ClaimError, match="at most 400"):
        Measured(values={"a": 1}, n=1, figure=xr.DataArray(np.zeros(401)))


# a paper's word -----------------------------------------------------------------------------------


def entry(folder: Path, *verdicts: Verdict) -> ledger.Entry:
    return ledger.Entry(ledger.rows()["llm-drop"], read(folder / "llm_drop.py"), verdicts)


@pytest.fixture
def good(folder: Path) -> Verdict:
    paper = read(folder / "llm_drop.py")
    return run(paper, paper.named("attention_goes_first")[0])


def test_the_worst_seed_counts_and_the_newest_of_a_seed(folder: Path, good: Verdict) -> None:
    bad = dataclasses.replace(good, status="not reproduced", seed=1)
    assert entry(folder).status == "built, not run"
    assert (entry(folder, good).status, entry(folder, good).tally) == ("reproduced", "1 of 1")
    assert (entry(folder, good, bad).status, entry(folder, bad, good).status) == (
        "not reproduced",
    ) * 2
    assert entry(folder, good, bad).tally == "0 of 1"
    assert (
        entry(folder, bad, good, dataclasses.replace(good, seed=1)).status == "reproduced"
    )  # seed 1 was run again


@pytest.mark.parametrize(
    "change", [{"expect": "attention < 9"}, {"direction": ""}, {"subject": "x"}, {"claim": "gone"}]
)
def test_a_verdict_about_other_words_does_not_count(
    folder: Path, good: Verdict, change: dict[str, str]
) -> None:
    other = dataclasses.replace(good, **change)
    assert entry(folder, other).status == "built, not run"
    assert entry(folder, other).outdated() == [other]
    assert entry(folder, good, other).status == "reproduced"


def test_an_identity_verdict_is_not_a_papers_word(folder: Path) -> None:
    paper = read(folder / "llm_drop.py")
    assert entry(folder, run(paper, paper.named(tier="identity")[0])).status == "built, not run"


def test_one_claim_without_a_verdict_and_one_failed(folder: Path, good: Verdict) -> None:
    """A failure is not hidden by what was not run, and what was not run is not hidden by a
    success."""
    one = entry(folder, good)
    second = dataclasses.replace(one.paper.claims[0], name="second", says="Another statement")
    two = dataclasses.replace(
        one, paper=dataclasses.replace(one.paper, claims=(*one.paper.claims, second))
    )
    assert two.status == "built, not run"
    assert two.tally == "1 of 2"
    failed = dataclasses.replace(good, status="not reproduced")
    assert dataclasses.replace(two, verdicts=(failed,)).status == "not reproduced"
    assert (
        dataclasses.replace(
            two, verdicts=(dataclasses.replace(good, claim="second"), failed)
        ).status
        == "not reproduced"
    )


def test_a_statement_is_judged_on_its_best_subject_once_all_have_run(
    folder: Path, good: Verdict
) -> None:
    one = entry(folder, good)
    other = dataclasses.replace(one.paper.claims[0], name="second", subject="a miniature")
    two = dataclasses.replace(
        one, paper=dataclasses.replace(one.paper, claims=(*one.paper.claims, other))
    )
    failed = dataclasses.replace(good, status="not reproduced")
    there = dataclasses.replace(good, claim="second", subject="a miniature")
    assert two.status == "built, not run"
    assert dataclasses.replace(two, verdicts=(failed, there)).status == "reproduced"
    assert dataclasses.replace(two, verdicts=(failed, there)).tally == "1 of 2"
    assert dataclasses.replace(
        two, verdicts=(failed, dataclasses.replace(there, status="direction only"))
    ).status == ("direction only")
