"""A claim, what is measured, and the word that comes of it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from stratoscope.claims import Claim, Measured, claim
from stratoscope.claims.verdict import judge
from stratoscope.errors import ClaimError
from stratoscope.maths import resample

WORDS = {
    "says": "It is so",
    "where": "abstract",
    "read": "abstract",
    "tier": "small",
    "subject": "none",
    "kind": "real",
    "n": "2 texts",
    "null": {"b": "chance"},
    "thresholds": "2: ours",
}
CLAIM = Claim(name="it", expect="a > 2 * b", direction="a > b", **WORDS)


def word(stated: Claim, measured: Measured) -> str:
    return judge(stated, measured.numbers, int(measured.n), stated.least).status


@pytest.mark.parametrize(
    ("a", "expected"),
    [(5, "reproduced"), (3, "direction only"), (1, "not reproduced"), (math.nan, "not reproduced")],
)
def test_the_words(a: float, expected: str) -> None:
    assert word(CLAIM, Measured(values={"a": a}, null={"b": 2.0}, n=2)) == expected


def test_without_a_direction_there_is_no_middle() -> None:
    plain = dataclasses.replace(CLAIM, direction="")
    assert word(plain, Measured(values={"a": 3.0}, null={"b": 2.0}, n=2)) == "not reproduced"


def test_reproduced_means_expectation_and_direction() -> None:
    odd = dataclasses.replace(CLAIM, expect="a > b", direction="a > 2 * b")
    assert word(odd, Measured(values={"a": 3.0}, null={"b": 2.0}, n=2)) == "not reproduced"
    assert word(odd, Measured(values={"a": 5.0}, null={"b": 2.0}, n=2)) == "reproduced"


def test_what_could_not_be_tested_is_no_test() -> None:
    """Neither a failure of the paper nor, whatever the numbers say, a success."""
    valid = dataclasses.replace(CLAIM, valid="right > 0.5")
    for a in (5.0, 1.0):
        found = Measured(values={"a": a, "right": 0.4}, null={"b": 2.0}, n=2)
        assert judge(valid, found.numbers, 2, 2)[:2] == ("no test", "`right > 0.5` does not hold")
    good = Measured(values={"a": 1.0, "right": 0.6}, null={"b": 2.0}, n=2)
    assert word(valid, good) == "not reproduced"
    few = Measured(values={"a": 5.0}, null={"b": 2.0}, n=1)
    assert judge(CLAIM, few.numbers, 1, 2)[:2] == ("no test", "n = 1, and at least 2 was wanted")


def test_what_we_add_is_judged_apart() -> None:
    more = dataclasses.replace(CLAIM, we_add="and much more", we_expect="a > 10 * b")
    small, large = (Measured(values={"a": a}, null={"b": 2.0}, n=2) for a in (5.0, 50.0))
    assert judge(more, small.numbers, 2, 2) == ("reproduced", "", "does not hold")
    assert judge(more, large.numbers, 2, 2) == ("reproduced", "", "holds")


@pytest.mark.parametrize(
    ("interval", "expected"), [((0.5, 1.5), "not reproduced"), ((0.5, 2.5), "no test")]
)
def test_it_fails_only_where_the_whole_interval_is_on_the_wrong_side(
    interval: tuple[float, float], expected: str
) -> None:
    found = Measured(values={"a": 1.0}, null={"b": 2.0}, n=2, interval={"a": interval})
    assert word(CLAIM, found) == expected


def test_a_name_that_was_not_measured_is_an_error_even_when_the_expectation_holds() -> None:
    odd = dataclasses.replace(CLAIM, direction="a > c")
    with pytest.raises(ClaimError, match="'c'"):
        word(odd, Measured(values={"a": 9, "b": 1}, n=2))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"expect": ""}, "expects nothing"),
        ({"expect": "a"}, "has no place here"),
        ({"direction": "a !"}, "cannot be read"),
        ({"tier": "large"}, "the tiers are"),
        ({"null": {"b": " "}}, "a null without words"),
        ({"says": ""}, "leaves 'says' empty"),
        ({"read": ""}, "how much was read"),
        ({"kind": ""}, "real' model or a 'miniature"),
        ({"kind": "large"}, "real' model or a 'miniature"),
        ({"n": ""}, "how many independent units"),
        ({"n": "-5 texts"}, "how many independent units"),
        ({"n": "5"}, "how many independent units"),
        ({"expect": "a > 3 * b", "thresholds": " "}, "compares with 3 and leaves 'thresholds'"),
        ({"expect": "a > c", "thresholds": ""}, "names none of its nulls (b)"),
        ({"we_add": "more"}, "only one of we_add and we_expect"),
        ({"we_expect": "a > b"}, "only one of we_add and we_expect"),
        ({"subject": ""}, "one of both"),
        ({"subjects": ("x",)}, "one of both"),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused_when_it_is_written(
    wrong: dict, said: str
) -> None:
    with pytest.raises(ClaimError) as caught:
        claim(**({"expect": "a > b"} | WORDS | wrong))(lambda seed: None)
    assert said in str(caught.value)


def test_an_identity_asks_for_less() -> None:
    few = {"tier": "identity", "read": "", "kind": "", "n": "", "thresholds": ""}
    stated = Claim(name="it", expect="a < 0.1", **(WORDS | few))
    assert (stated.least, stated.unit) == (1, "")


def test_a_marked_function_stays_a_function() -> None:
    @claim(expect="a > b", **WORDS)
    def marked(seed: int) -> Measured:
        """How it
        is done."""
        return Measured(values={"a": seed}, n=1)

    assert marked(3).values == {"a": 3.0}
    assert marked.claims == (
        Claim(name="marked", expect="a > b", about="How it is done.", **WORDS),
    )
    assert (marked.claims[0].least, marked.claims[0].unit) == (2, "texts")


def test_one_function_on_several_models_is_a_claim_about_each() -> None:
    words = {key: value for key, value in WORDS.items() if key not in ("subject", "kind")}

    @claim(expect="a > b", subjects=("smollm2", "gemma3-270m"), **words)
    def marked(lm: object, seed: int) -> Measured:
        """So."""
        return Measured(values={"a": seed}, n=1)

    assert [(c.subject, c.kind, c.any_model) for c in marked.claims] == [
        ("smollm2", "real", True),
        ("gemma3-270m", "real", True),
    ]


# what is measured ---------------------------------------------------------------------------------


def test_what_is_measured_becomes_plain() -> None:
    found = Measured(
        values={"a": np.float32(0.5)},
        null={"b": np.int64(2)},
        n=1,
        interval={"a": (np.float64(0), 1)},
    )
    assert {type(value) for value in found.numbers.values()} == {float}
    assert found.interval == {"a": (0.0, 1.0)}
    assert found.numbers == {"a": 0.5, "b": 2.0, "a_low": 0.0, "a_high": 1.0}


def test_units_give_the_mean_and_its_interval() -> None:
    row = np.random.default_rng(0).normal(3, 1, 12)
    found = Measured(units={"a": row}, n=12)
    expected = resample.interval(row)
    assert found.numbers == pytest.approx(
        {"a": row.mean(), "a_low": expected.low, "a_high": expected.high}
    )
    told = Measured(values={"a": 7.0}, units={"a": row}, n=12)  # a ratio, say, with its own units
    assert told.numbers["a"] == 7.0


def test_units_and_draws_are_stored_short_and_judged_as_stored() -> None:
    rows = {"a": [1 / 3, 2 / 3], "b": [1 / 7] * 2}
    found = Measured(units={"a": rows["a"]}, null={"b": rows["b"]}, n=2)
    assert found.units == {"a": (0.333333, 0.666667)}
    assert found.draws == {"b": (0.142857, 0.142857)}
    assert (found.numbers["a"], found.numbers["b"]) == (0.5, 1 / 7)  # the means are exact


def test_too_few_units_have_no_interval_and_their_bounds_hold_nothing() -> None:
    found = Measured(units={"a": [5.0, 6.0, 5.0]}, null={"b": 0.0}, n=3)
    assert math.isnan(found.numbers["a_low"])
    bounded = dataclasses.replace(CLAIM, expect="a_low > b", direction="")
    assert word(bounded, found) == "not reproduced"


def test_draws_of_a_null_give_mean_and_bounds() -> None:
    draws = np.arange(20.0)
    found = Measured(values={"a": 1.0}, null={"b": draws}, n=1).numbers
    assert (found["b"], found["b_bound"], found["b_floor"]) == (9.5, 19.0, 0.0)
    assert found["b_bound"] == resample.bound(draws)
    three = Measured(values={"a": 1.0}, null={"b": [1.0, 2.0, 3.0]}, n=1).numbers
    assert (three["b_bound"], three["b_floor"]) == (math.inf, -math.inf)


@pytest.mark.parametrize(
    "wrong",
    [
        {"values": {"a": "many"}},
        {"values": {"a": [1, 2]}},
        {"values": {"a": 1.0}, "null": {"a": 2.0}},
        {"values": {"a": 1.0}, "interval": {"b": (0, 1)}},
        {"values": {"a": 1.0, "a_low": 0.0}, "interval": {"a": (0, 1)}},
        {"values": {"a": 1.0, "b_bound": 0.0}, "null": {"b": [1.0, 2.0]}},
        {"values": {"a": 1.0}, "null": {"b": []}},
        {"values": {"a": 1.0}, "units": {"a": [1.0] * 401}},
        {"values": {"a": 1.0}, "n": 0},
        {"values": {"a": 1.0}, "n": -5},
    ],
)
def test_what_cannot_be_kept_is_refused(wrong: dict) -> None:
    with pytest.raises(ClaimError):
        Measured(**({"n": 1} | wrong))


def test_a_large_figure_is_refused() -> None:
    import xarray as xr

    with pytest.raises(ClaimError, match="at most 400"):
        Measured(values={"a": 1}, n=1, figure=xr.DataArray(np.zeros(401)))
