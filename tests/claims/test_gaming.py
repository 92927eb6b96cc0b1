"""Ways to get a word that was not earned, each of which was tried on this machinery: what a hostile
reader found, and what came to mind when it was mended. All are refused, or change nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from stratoscope.claims import Claim, Measured, ledger, trial, verdicts
from stratoscope.claims.paper import read
from stratoscope.claims.run import run
from stratoscope.errors import ClaimError

WORDS = {
    "says": "It is so",
    "where": "abstract",
    "read": "abstract",
    "tier": "small",
    "subject": "none",
    "kind": "real",
    "n": "2 texts",
    "null": {"b": "chance"},
    "thresholds": "ours",
}


def refused(**words: str) -> str:
    with pytest.raises(ClaimError) as caught:
        Claim(name="it", **(WORDS | words))
    return str(caught.value)


@pytest.mark.parametrize(
    "expect",
    [
        "a == a",
        "abs(a) >= 0",
        "a - a == 0",
        "a <= max(a, b)",
        "a * a >= 0",
        "a_low <= a",
        "b <= b_bound",
        "0 * a < 1",
        "a > b and b == b",  # one comparison of two
        "a > b and abs(a - b) >= 0",
    ],
)
def test_1_what_holds_whatever_is_measured(expect: str) -> None:
    assert "holds whatever is measured" in refused(expect=expect)


def test_2_two_chances() -> None:
    assert "two chances" in refused(expect="a > b or a <= b")


@pytest.mark.parametrize("expect", ["a > 1 and a < 0", "a_low > a", "a > b and b > a"])
def test_3_what_cannot_succeed(expect: str) -> None:
    """A claim that must fail says as little about the paper."""
    assert "cannot succeed" in refused(expect=expect)


@pytest.mark.parametrize("n", [0, -5])
def test_4_no_units(n: int) -> None:
    assert "how many independent units" in refused(expect="a > b", n=f"{n} texts")
    with pytest.raises(ClaimError, match="there must be one"):
        Measured(values={"a": 1.0}, n=n)


def test_5_a_null_that_is_told_and_not_compared_with() -> None:
    assert "names none of its nulls (b)" in refused(expect="a > c", thresholds="")
    assert "leaves 'thresholds' empty" in refused(expect="a > 0.9", thresholds="")


def test_6_a_direction_that_is_stronger_than_the_expectation(folder: Path) -> None:
    """Reproduced means both, so that it makes the word harder to get and not easier."""
    file = folder / "llm_drop.py"
    text = file.read_text().replace('direction="attention < mlp"', 'direction="attention < 0.001"')
    file.write_text(text)
    paper = read(file)
    assert run(paper, paper.named("attention_goes_first")[0]).status == "not reproduced"


@pytest.mark.parametrize(("valid", "expect"), [("a > b", "a > b"), ("a > b + 1", "a > b")])
def test_7_a_validity_that_turns_failures_into_tests_that_were_none(
    valid: str, expect: str
) -> None:
    assert "it could never fail" in refused(expect=expect, valid=valid)
    assert Claim(name="it", **(WORDS | {"expect": expect, "valid": "right > 0.5"}))


def test_8_a_null_of_other_words_than_numbers(folder: Path) -> None:
    """A null that was described and not measured, or measured and not described."""
    for old, new in (
        ('null={"random": 0.35}', 'null={"rnd": 0.35}'),
        ('"random": "as', '"x": "as'),
    ):
        file = folder / "llm_drop.py"
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))
        paper = read(file)
        with pytest.raises(ClaimError, match="is only in one of them"):
            run(paper, paper.named("attention_goes_first")[0])
        file.write_text(text)


def test_9_a_word_written_by_hand(folder: Path) -> None:
    """The word of a line is made of its numbers again; a line whose word is another counts not."""
    paper = read(folder / "llm_drop.py")
    file = verdicts.append(run(paper, paper.named("attention_goes_first")[0], 7), [folder])
    line = json.loads(file.read_text())
    assert line["status"] == "not reproduced"
    file.write_text(json.dumps(line | {"status": "reproduced"}) + "\n")
    found, [problem] = verdicts.read([folder])
    assert found == []
    assert "says 'reproduced' of attention_goes_first, and its numbers give" in problem


def test_10_fewer_units_than_were_promised(folder: Path) -> None:
    file = folder / "llm_drop.py"
    file.write_text(file.read_text().replace("n=40,", "n=39,"))
    paper = read(file)
    found = run(paper, paper.named("attention_goes_first")[0])
    assert (found.status, found.why) == ("no test", "n = 39, and at least 40 was wanted")


def test_11_an_interval_of_ones_own_beside_numbers_of_the_same_name() -> None:
    with pytest.raises(ClaimError, match="comes of an interval"):
        Measured(values={"a": 1.0, "a_low": 9.0}, interval={"a": (0, 2)}, n=1)


def test_12_trying_seeds_until_one_holds(folder: Path) -> None:
    paper = read(folder / "llm_drop.py")
    claim = paper.named("attention_goes_first")[0]
    made = [run(paper, claim, seed) for seed in (7, 0)]
    entry = ledger.Entry(ledger.rows()["llm-drop"], paper, tuple(made))
    assert entry.status == "not reproduced"


def test_13_another_claims_word_under_this_claims_name(folder: Path) -> None:
    paper = read(folder / "llm_drop.py")
    claim = paper.named("attention_goes_first")[0]
    easier = dataclasses.replace(claim, expect="attention < mlp", direction="")
    with pytest.raises(ClaimError, match="says one thing"):
        run(paper, easier)


def test_real_expectations_are_not_refused() -> None:
    """Those of the present papers are tried when they are read; here the hard ones: equalities,
    tiny bounds, many comparisons."""
    for expect in (
        "kept == share and abs(untrained - 0.5) < 0.05 and smooth == 1",
        "error < 0.000001 and explained > 0.999999 and shuffled < 0.5",
        "early > late + 0.05 and early_rsa > late_rsa + 0.05 and early > 0.5 and shuffled < 0.05 "
        "and early - late > untrained_early - untrained_late + 0.05",
        "abs(share - 0.75) < 0.0001 and abs(loss - function_loss * 3) < 0.0001 and share > dealt",
        "masked / recall < facts_masked / facts and random_floor >= 0.9 * recall",
    ):
        trial.refuse(expect)
