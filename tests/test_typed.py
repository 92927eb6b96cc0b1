"""The hook under which the tests run does check, and leaves alone what it says it leaves."""

from __future__ import annotations

import ast
import importlib
import sys
from types import ModuleType

import pytest
import torch
from jaxtyping import TypeCheckError

from support import typed

SOURCE = '''
"""A module."""
from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from nowhere import Thing


Square = Float[Tensor, "n n"]


def trace(x: Square) -> Float[Tensor, ""]:
    return x.diagonal().sum()


def traces(x: Float[Tensor, "n d"], y: Square) -> float:
    return float(trace(x @ x.T) + trace(y))


def product(x: Float[Tensor, "n d"], y: Float[Tensor, "d m"]) -> Float[Tensor, "n m"]:
    return x @ y


def wrong(x: Float[Tensor, "n d"]) -> Float[Tensor, "d n"]:
    return x


def twice(n: int) -> int:
    def inner(text: str) -> str:
        return text

    return 2 * inner(n)


def of(thing: Thing) -> Thing:
    return thing


@dataclass
class Pair:
    first: Float[Tensor, "n"]
    second: Float[Tensor, "n"]

    def scaled(self, by: float) -> Float[Tensor, "n"]:
        return self.first * by
'''


@pytest.fixture(scope="module")
def module():
    made = ModuleType("planted")
    sys.modules["planted"] = made  # where dataclasses look for the names in annotations
    exec(compile(typed.checked(SOURCE), "planted.py", "exec", dont_inherit=True), vars(made))
    yield made
    del sys.modules["planted"]


def test_a_shape_a_type_a_field_and_a_method_are_checked(module):
    assert module.product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    pair = module.Pair(torch.ones(2), torch.ones(2))
    assert pair.scaled(2.0).tolist() == [2, 2]
    with pytest.raises(TypeCheckError):
        module.product(torch.ones(2, 3), torch.ones(2, 4))  # each fits alone, not both
    with pytest.raises(TypeCheckError):
        module.wrong(torch.ones(2, 3))  # the result
    with pytest.raises(TypeCheckError):
        module.Pair(torch.ones(2), torch.ones(3))
    with pytest.raises(Exception, match="by"):
        pair.scaled("2")
    with pytest.raises(Exception, match="violates type hint"):
        module.twice("2")


def test_axes_have_their_sizes_within_one_call_only(module):
    assert module.traces(torch.ones(2, 3), torch.ones(2, 2)) == 8
    with pytest.raises(TypeCheckError):
        module.traces(torch.ones(2, 3), torch.ones(3, 3))


def test_what_is_left_alone(module):
    assert module.twice(2) == 4  # inner takes a text, and is not checked
    assert module.of("anything") == "anything"  # its type is known to type checkers only
    for source in ("", '"""Only words."""\n', "x = 1\n", "from __future__ import annotations\n"):
        compile(typed.checked(source), "planted.py", "exec", dont_inherit=True)


def test_byte_code_of_another_hook_is_not_taken(tmp_path, monkeypatch):
    """A changed hook decorates otherwise: what an earlier one compiled is left."""
    (tmp_path / "thinned.py").write_text("def half(n: int) -> float:\n    return n / 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "meta_path", [typed._Finder("thinned"), *sys.meta_path])
    for tag, checked in (("typedone", typed.checked), ("typedtwo", ast.parse)):
        monkeypatch.setattr(typed, "TAG", tag)
        monkeypatch.setattr(typed, "checked", checked)
        monkeypatch.delitem(sys.modules, "thinned", raising=False)
        half = importlib.import_module("thinned").half
        if checked is ast.parse:
            assert half(1.5) == 0.75
        else:
            with pytest.raises(Exception, match="violates type hint"):
                half(1.5)
    monkeypatch.delitem(sys.modules, "thinned")
    names = sorted(path.name.split(".")[2] for path in tmp_path.rglob("*.pyc"))
    assert names == ["opt-typedone", "opt-typedtwo"]


def test_stratoscope_is_checked_while_the_tests_run():
    from stratoscope.maths import norm

    assert "stratoscope" in norm.__name__
    functions = [f for f in vars(norm).values() if callable(f) and hasattr(f, "__wrapped__")]
    assert functions, "no function of stratoscope.maths.norm is wrapped"
