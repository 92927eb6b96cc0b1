"""Linear layers through oneDNN: the same numbers, nothing else touched, and gone when the block
ends."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from stratoscope.engine import linear as module
from stratoscope.engine.linear import FastLinear

G = torch.Generator().manual_seed(0)
X, W, B = (
    torch.randn(2, 50, 96, generator=G),
    torch.randn(64, 96, generator=G),
    torch.randn(64, generator=G),
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts calls of oneDNN's operation."""
    if module._OPERATION is None:
        pytest.skip("this torch was built without oneDNN")
    seen: list[int] = []
    operation = module._OPERATION
    monkeypatch.setattr(module, "_OPERATION", lambda *given: seen.append(1) or operation(*given))
    return seen


@pytest.mark.parametrize("bias", [None, B], ids=["no bias", "bias"])
def test_same_numbers(bias: torch.Tensor | None, calls: list[int]) -> None:
    exact = linear(X.double(), W.double(), None if bias is None else bias.double())
    with torch.no_grad(), FastLinear():
        found = linear(X, W, bias)
        again = linear(input=X, weight=W, bias=bias)
    assert len(calls) == 2
    assert torch.equal(found, again)
    assert (found - exact).abs().max() < 2e-5
    assert (found - exact).norm() / exact.norm() < 1e-6


def test_a_module_is_reached(calls: list[int]) -> None:
    layer = torch.nn.Linear(96, 64)
    with torch.no_grad(), FastLinear():
        found = layer(X)
    assert calls == [1]
    torch.testing.assert_close(found, layer(X), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("x", "w"),
    [
        (X.double(), W.double()),
        (X.bfloat16(), W.bfloat16()),
        (X, W.T.contiguous().T),
        (X[:, ::2], W),
    ],
    ids=["float64", "bfloat16", "strided weight", "strided input"],
)
def test_what_does_not_fit_is_left_alone(
    x: torch.Tensor, w: torch.Tensor, calls: list[int]
) -> None:
    with torch.no_grad(), FastLinear():
        found = linear(x, w)
    assert calls == []
    assert torch.equal(found, linear(x, w))


def test_gradients_are_left_alone(calls: list[int]) -> None:
    w = W.clone().requires_grad_()
    with FastLinear():
        linear(X, w).sum().backward()
    assert calls == []
    assert w.grad is not None


def test_gone_after_the_block(calls: list[int]) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match="inside"), FastLinear():
        raise ValueError("inside")
    with torch.no_grad():
        linear(X, W)
    assert calls == []
