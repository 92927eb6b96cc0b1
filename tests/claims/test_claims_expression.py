"""Expectations: what they may say, what they mean, and that what is no number never holds."""

from __future__ import annotations

import math

import pytest

from stratoscope.claims.expression import holds, names
from stratoscope.errors import ClaimError

VALUES = {"a": 1.0, "b": 3.0, "zero": 0.0, "nan": math.nan, "inf": math.inf}


REFUSED = """a |a + |a < b < |1 < 2 |not a < b |a != b |a < 'x' |a < True |a ** 2 < b |a is b |a in b |a.real < b |a[0] < 1
|__import__('os').system('x') < 1 |(lambda: a)() < 1 |abs(a, b) < 1 |max(a) < 1 |sum(a, b) < 1 |a < b; b < a
|a < b if a < b else b < a |max(a, b, key=abs) < 1 |(a < b) < b |(a < b) + 1 > 0 |a and b |(c := a) < b |abs(*a) < 1"""


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("a < b", True),
        ("a > b", False),
        ("a <= 0.5 * b and b >= 3", True),
        ("a <= 0.3 * b", False),
        ("a > b or b == 3", True),
        ("0 < a < b", True),
        ("0 < b < a", False),
        ("abs(a - b) == 2 and min(a, b) == 1 and max(a, b, 7) == 7", True),
        ("-a < 0", True),
        ("a / b < 0.34", True),
        ("(a + b) * 2 == 8", True),
        ("b / zero > 1", False),  # a ratio to nothing is no evidence
        ("b / zero < 1", False),
        ("nan < 1", False),
        ("nan > 1", False),
        ("a < b or nan > 1", False),  # a claim that came out NaN does not count by its other half
        ("inf > a", True),
        ("inf - inf == zero", False),
        ("min(b, inf - inf) == 3", False),
    ],
)
def test_meaning(text: str, truth: bool) -> None:
    assert holds(text, VALUES) is truth


@pytest.mark.parametrize(
    "text",
    [*REFUSED.split("|"), "", "(" * 300 + "a" + ")" * 300 + " < 1"],
)
def test_refused(text: str) -> None:
    with pytest.raises(ClaimError):
        names(text)


def test_names_and_what_is_missing() -> None:
    assert names("a < max(b, 2) and abs(c) > 1") == {"a", "b", "c"}
    with pytest.raises(ClaimError, match=r"names \['missing'\], which was not measured"):
        holds("missing < a or a < b", VALUES)  # even where the other half decides
