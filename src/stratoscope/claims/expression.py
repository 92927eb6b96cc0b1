"""Expectations as small comparison expressions, such as `attention <= 0.5 * mlp and attention <
random_floor`.

They may hold names, numbers, + - * /, < <= > >= ==, and, brackets, abs, min and max; nothing else
is Python here. There is no `or`: it would be two chances. What is not a number never holds: NaN
among the named values, or a division by zero, makes the whole expression false.

`x_low` and `x_high` are the ends of the interval of `x`; where `x` is a null of several draws,
`x_bound` is what one more draw exceeds in 5 of 100 cases, and `x_floor` what it falls below.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Mapping

from stratoscope.errors import ClaimError

SUFFIXES = ("_low", "_high", "_bound", "_floor")
_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARE = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
}
_CALLS = {"abs": abs, "min": min, "max": max}


def base(name: str) -> str:
    """The measured name that `x_low`, `x_high`, `x_bound` or `x_floor` belongs to: `x`."""
    return next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name)


def names(text: str) -> set[str]:
    """The names that `text` compares. Raises ClaimError when it is no comparison that can be
    judged."""
    tree = parsed(text)
    functions = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in functions}
    # a first judgement with ones, only to see that it can be judged
    _truth(tree, dict.fromkeys(names, 1.0), text)
    if not names:
        raise ClaimError(
            f"{text!r} names nothing that is measured: it cannot fail. Compare a measured value."
        )
    return names


def numbers(text: str) -> set[float]:
    """The numbers that stand in `text`."""
    constants = (node for node in ast.walk(parsed(text)) if isinstance(node, ast.Constant))
    return {float(node.value) for node in constants if isinstance(node.value, int | float)}


def parts(text: str) -> list[ast.expr]:
    """The comparisons that `and` joins; none of an empty text."""
    if not text:
        return []
    tree = parsed(text)
    return _flat(tree) if isinstance(tree, ast.BoolOp) else [tree]


def holds(text: str, values: Mapping[str, float]) -> bool:
    """Whether `text` is true of `values`. Raises ClaimError when it names what was not measured."""
    used = names(text)
    if missing := sorted(used - values.keys()):
        raise ClaimError(
            f"{text!r} names {missing}, which was not measured; measured: {sorted(values)}."
        )
    return not any(math.isnan(values[name]) for name in used) and _truth(parsed(text), values, text)


def parsed(text: str) -> ast.expr:
    """The syntax tree of `text`. Raises ClaimError when it is no expression."""
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ClaimError(f"{text!r} cannot be read as a comparison ({error}).") from error


def _flat(tree: ast.expr) -> list[ast.expr]:
    if not isinstance(tree, ast.BoolOp):
        return [tree]
    return [part for value in tree.values for part in _flat(value)]


def _truth(node: ast.expr, values: Mapping[str, float], text: str) -> bool:
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        # all of them: no part goes unread
        parts = [_truth(part, values, text) for part in node.values]
        return all(parts)
    if isinstance(node, ast.Compare) and all(type(op) in _COMPARE for op in node.ops):
        sides = [_number(side, values, text) for side in (node.left, *node.comparators)]
        return all(
            _COMPARE[type(op)](left, right) for op, left, right in zip(node.ops, sides, sides[1:])
        )
    raise _refused(node, text)


def _number(node: ast.expr, values: Mapping[str, float], text: str) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)
    if isinstance(node, ast.Name):
        return float(values[node.id])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand, values, text)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = _number(node.left, values, text), _number(node.right, values, text)
        return (
            _ARITHMETIC[type(node.op)](left, right)
            if right or not isinstance(node.op, ast.Div)
            else math.nan
        )
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _CALLS
        and not node.keywords
    ):
        given = [_number(argument, values, text) for argument in node.args]
        if len(given) != 1 if node.func.id == "abs" else len(given) < 2:
            raise _refused(node, text)
        if any(map(math.isnan, given)):
            return math.nan  # Python's min and max would drop it
        return _CALLS[node.func.id](*given)
    raise _refused(node, text)


def _refused(node: ast.expr, text: str) -> ClaimError:
    either = isinstance(node, ast.BoolOp)
    more = " `or` gives a claim two chances: write two claims." if either else ""
    return ClaimError(
        f"{text!r}: {ast.unparse(node)!r} has no place here. An expectation compares numbers (< <= "
        "> >= ==) made of names, numbers, + - * /, abs, min and max, and joins comparisons with "
        f"`and`.{more}"
    )
