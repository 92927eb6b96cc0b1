"""The kernel's gradient equals its closed form, and that of the mean loss where it can be told; a
sample's own gradient, which is 0, is told apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stratoscope.engine.jump import jump


def case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    pre = torch.randn(400, 6, generator=rng).requires_grad_()
    threshold = torch.rand(6, generator=rng).requires_grad_()
    return pre, threshold, *torch.randn(2, 400, 6, generator=rng).unbind()


def test_gradients_are_the_closed_form() -> None:
    pre, threshold, a, b = case()
    z, fires = jump(pre, threshold, 0.3)
    assert torch.equal(z, torch.where(pre > threshold, pre, 0.0))
    assert torch.equal(fires, (pre > threshold).float())
    (z * a + fires * b).sum().backward()
    kernel = ((pre - threshold).detach() / 0.3).abs() < 0.5
    expected = -(kernel * (threshold.detach() * a + b)).sum(dim=0) / 0.3
    assert int(kernel.sum(dim=0).min()) > 10
    assert torch.allclose(threshold.grad, expected, rtol=1e-4)
    assert torch.equal(pre.grad, a * (pre > threshold))


def test_it_is_the_slope_of_the_mean_loss() -> None:
    """Of one feature on numbers spread evenly from 0 to 1, with a price c for speaking,

        mean of (x - z)^2 + c fires  =  t^3 / 3 + c (1 - t)        its slope  t^2 - c

    The kernel has a quarter of its bandwidth too little of the first. The slope is 0 at the square
    root of c: what a feature costs is the squared error that it must save."""
    x = torch.linspace(0, 1, 200_001, dtype=torch.double)[:, None]
    for at, price in ((0.4, 0.05), (0.7, 0.49), (0.5, 0.6)):
        t = torch.tensor([at], dtype=torch.double, requires_grad=True)
        z, fires = jump(x, t, 0.02)
        ((x - z).square() + price * fires).mean().backward()
        assert float(t.grad) == pytest.approx(at * (at - 0.02 / 4) - price, abs=2e-4)
        assert float(t.grad) == pytest.approx(at**2 - price, abs=0.005)


def test_a_sample_s_own_gradient_is_none() -> None:
    """What plain autograd says of the same formula."""
    pre, threshold, a, _ = case()
    plain = pre * (pre > threshold)
    (plain * a).sum().backward()
    assert threshold.grad is None
