"""Whether what a claim expects can come true and can fail, tried on made-up numbers before anything
is measured.

`a == a`, `abs(a) >= 0` or `a <= max(a, b)` hold whatever is measured; `a > 1 and a < 0` never does;
and a validity that already implies the expectation turns each failure into a test that was none.
Up to 2,000 random assignments are tried for each: numbers of all sizes, those that stand in the
expressions, and copies of one another; an interval always holds its value. The search goes from
the assignment that satisfies most.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Sequence
from functools import cache
from types import CodeType

from stratoscope.claims import expression
from stratoscope.errors import ClaimError

DRAWS = 2000
RESTART = 250  # assignments after which the search begins anew
_FUNCTIONS = {"__builtins__": {}, "abs": abs, "min": min, "max": max}

Values = dict[str, float]
Test = Callable[[Values], bool]


@cache
def refuse(expect: str, direction: str = "", valid: str = "") -> None:
    """Raises ClaimError, in a sentence, when the expressions could not both hold and fail."""
    texts = [text for text in (valid, expect, direction) if text]
    draw = _Draw(texts)
    for text in texts:
        for part in expression.parts(text):
            source = ast.unparse(part)
            if not draw.finds([_not([_test(part)])]):
                raise ClaimError(f"`{source}` holds whatever is measured: it tests nothing.")
    tests = {text: _tests(text) for text in texts}
    if not draw.finds([test for part in tests.values() for test in part]):
        raise ClaimError(
            f"`{' and '.join(texts)}` holds of none of {DRAWS:,} random assignments: it cannot "
            "succeed."
        )
    fails = [_not(tests[text]) for text in (expect, direction) if text]
    if not draw.finds([*tests.get(valid, ()), *fails]):
        raise ClaimError(
            f"Whenever the validity `{valid}` holds, so does the claim: it could never fail. "
            "Validity asks whether the test could be made, not how it ended."
        )


class _Draw:
    """Random assignments of the names in some expressions, always the same ones."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.generator = random.Random(0)
        self.used = sorted(set().union(*map(expression.names, texts)))
        self.bases = sorted({expression.base(name) for name in self.used})
        written = sorted(set().union(*map(expression.numbers, texts)))
        self.numbers = [0.0, 1.0, *written, *(-number for number in written)]

    def finds(self, tests: Sequence[Test]) -> bool:
        """Whether some assignment satisfies all tests."""
        best, most = {}, -1
        for number in range(DRAWS):
            fresh = number % RESTART == 0
            some = self.bases if fresh else self.generator.sample(self.bases, self._few())
            values = {} if fresh else dict(best)
            for name in some:
                self._assign(values, name)
            count = sum(test(values) for test in tests)
            if count == len(tests):
                return True
            if fresh or count >= most:
                best, most = values, count
        return False

    def _few(self) -> int:
        return min(len(self.bases), self.generator.choice((1, 1, 2)))

    def _assign(self, values: Values, name: str) -> None:
        value = self._number(values)
        values[name] = value
        for end in expression.SUFFIXES:
            away = self.generator.choice((0.0, 1e-3, 1.0)) * abs(self._number(values))
            values[name + end] = value + (-away if end in ("_low", "_floor") else away)

    def _number(self, values: Values) -> float:
        chosen, generator = self.generator.random(), self.generator
        if chosen < 0.25:
            return generator.choice(self.numbers)
        if chosen < 0.5 and values:
            other = generator.choice([*values.values()])
            return other * generator.choice((1.0, 1.0, *self.numbers))
        if chosen < 0.75:
            return generator.uniform(-1.5, 1.5)
        return generator.choice((-1, 1)) * 10 ** generator.uniform(-8, 5)


def _tests(text: str) -> list[Test]:
    return [_test(part) for part in expression.parts(text)]


def _test(part: ast.expr) -> Test:
    # the tree was read by `expression`, which lets nothing through but comparisons of numbers
    code: CodeType = compile(ast.Expression(part), "<expectation>", "eval")

    def test(values: Values) -> bool:
        try:
            return bool(eval(code, _FUNCTIONS, values))
        except ZeroDivisionError:
            return False

    return test


def _not(tests: Sequence[Test]) -> Test:
    return lambda values: not all(test(values) for test in tests)
