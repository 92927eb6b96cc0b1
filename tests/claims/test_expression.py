"""Expectations: what they may say, what they mean, and that what is no number never holds."""

from __future__ import annotations

import math
import random

import pytest

from stratoscope.claims import expression
from stratoscope.claims.expression import holds, names
from stratoscope.errors import ClaimError

VALUES = {"a": 1.0, "b": 3.0, "zero": 0.0, "nan": math.nan, "inf": math.inf}


REFUSED = """a |a + |a < b < |1 < 2 |not a < b |a != b |a < 'x' |a < True |a ** 2 < b |a is b
|a in b |a.real < b |a[0] < 1 |__import__('os').system('x') < 1 |(lambda: a)() < 1 |abs(a, b) < 1
|max(a) < 1 |sum(a, b) < 1 |a < b; b < a |a < b if a < b else b < a |max(a, b, key=abs) < 1
|(a < b) < b |(a < b) + 1 > 0 |a < b or b < a |a < 1 and (b < 1 or a > 2)
|a and b |(c := a) < b |abs(*a) < 1"""


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("a < b", True),
        ("a > b", False),
        ("a <= 0.5 * b and b >= 3", True),
        ("a <= 0.3 * b", False),
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
        ("a < b and nan > 1", False),
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
        holds("missing < a and a > b", VALUES)  # even where the other half decides


TRUE, FALSE = "a < b", "a > b"


@pytest.mark.parametrize("left", [TRUE, FALSE])
@pytest.mark.parametrize("right", [TRUE, FALSE])
def test_and_needs_both(left: str, right: str) -> None:
    """Every verdict rests on this; `and` judged as `or` once went unseen."""
    one, two = left == TRUE, right == TRUE
    assert holds(f"{left} and {right}", VALUES) is (one and two)
    for third, three in ((TRUE, True), (FALSE, False)):
        assert holds(f"{left} and {right} and {third}", VALUES) is (one and two and three)
        assert holds(f"{left} and ({right} and {third})", VALUES) is (one and two and three)


def test_or_is_two_chances() -> None:
    with pytest.raises(ClaimError, match="two chances"):
        names("a < b or b < a")


def test_what_comes_of_an_interval_belongs_to_its_name() -> None:
    ends = ["x_low", "x_high", "x_bound", "x_floor", "x", "low"]
    assert [expression.base(name) for name in ends] == ["x", "x", "x", "x", "x", "low"]
    assert expression.numbers("a <= 0.5 * b and c > 2") == {0.5, 2.0}
    assert len(expression.parts("a < b and (c < d and e < f)")) == 3


def test_random_expressions_mean_what_they_mean_in_python() -> None:
    """Python itself is the judge: numbers of every operator, at and beside equality, chained,
    joined and bracketed."""
    generator = random.Random(0)

    def number(depth: int) -> str:
        if depth == 0:
            return generator.choice(
                ["a", "b", "1", "2.5", "-a", "abs(a - b)", "min(a, b)", "max(a, b, 2)"]
            )
        return (
            f"({number(depth - 1)} {generator.choice(['+', '-', '*'])} {number(0)} / "
            f"{generator.choice(['2', 'b'])})"
        )

    def comparison() -> str:
        sides = [number(generator.randrange(2)) for _ in range(generator.choice([2, 2, 3]))]
        return (
            "".join(
                f"{side} {generator.choice(['<', '<=', '>', '>=', '=='])} " for side in sides[:-1]
            )
            + sides[-1]
        )

    def whole(depth: int) -> str:
        if depth == 0:
            return comparison()
        joined = " and ".join(whole(depth - 1) for _ in range(generator.choice([2, 3])))
        return f"({joined})" if generator.random() < 0.5 else joined

    seen = []
    for _ in range(800):
        text, values = (
            f"a >= 0.5 and ({whole(generator.randrange(3))})",
            {"a": 1.0, "b": generator.choice([0.5, 1.0, 3.0])},
        )
        expected = bool(
            eval(text, {"__builtins__": {}, "abs": abs, "min": min, "max": max}, values)
        )
        assert holds(text, values) is expected, (text, values)
        seen.append(expected)
    assert 100 < sum(seen) < 500
