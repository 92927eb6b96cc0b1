"""The loss of every kind equals its formula, written out; what is held back, and what a silent
feature learns from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stratoscope.engine import learner as module
from stratoscope.engine.learner import Learner

KINDS = ("relu", "topk", "jumprelu", "gated")


def drawn(kind: Any, writes: bool) -> tuple[Learner, Tensor, Tensor | None]:
    """A learner with no parameter at 0, and what it reads and writes."""
    rng = torch.Generator().manual_seed(4)
    x, y = torch.randn(64, 16, generator=rng), torch.randn(64, 10, generator=rng) + 1
    torch.manual_seed(0)
    made = Learner(x, 32, kind, 2.0, y if writes else None)
    for name in ("b_enc", "r_mag", "b_mag"):
        if hasattr(made, name):
            getattr(made, name).data = torch.randn(32, generator=rng) / 4
    return made, x, y if writes else None


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_formula(kind: Any, writes: bool) -> None:
    """With no feature silent, and half of the sparsity asked."""
    made, x, y = drawn(kind, writes)
    pre = (x - made.b_dec) @ made.W_enc + made.b_enc
    z, price = pre.relu(), pre.relu()
    if kind == "topk":
        z, price = z * (pre >= pre.topk(2, dim=1).values[:, 1:]), 0 * pre
    elif kind == "jumprelu":
        price = (pre > module.THRESHOLD).float()
        z = pre * price
    elif kind == "gated":
        own = (x - made.b_dec) @ (made.W_enc * made.r_mag.exp()) + made.b_mag
        z = own.relu() * (pre > 0)
    wanted, bias = (x, made.b_dec) if y is None else (y, made.b_dec_out)
    weight = 1.0 if y is None else 10**0.5 / y.norm(dim=1)
    missed = ((wanted - z @ made.W_dec - bias).square().sum(1) * weight).mean()
    expected = missed * (1 + 1 / 32) + 0.5 * 2.0 * price.sum(1).mean()
    if kind == "gated":
        gate = wanted - pre.relu() @ made.W_dec - bias
        expected = expected + (gate.square().sum(1) * weight).mean()
    assert torch.allclose(made(x, 0.5, y), expected, rtol=1e-5)


def test_the_gate_s_own_loss_leaves_the_decoder_alone() -> None:
    made, x, _ = drawn("gated", False)
    pre = (x - made.b_dec) @ made.W_enc + made.b_enc
    made.auxiliary(pre, x - made.b_dec.detach(), None).backward()
    assert made.W_dec.grad is None
    assert float(made.W_enc.grad.norm()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_given_back_is_what_was_learnt(kind: Any) -> None:
    """Of vectors as they are: x three times as long, y five times."""
    for writes in (False, True):
        made, x, y = drawn(kind, writes)
        scale_out = None if y is None else 0.2
        sites = {"site_in": "layers.0.mlp.act", "site_out": "layers.0.mlp.out" if writes else ""}
        given = made.dictionary(1 / 3, scale_out, **sites)
        pre = (x - made.b_dec) @ made.W_enc + made.b_enc
        times = 3 if y is None else 5
        z = made._features(pre)[0]
        assert torch.allclose(given.encode(3 * x), times * z, atol=1e-4)
        bias = made.b_dec if y is None else made.b_dec_out
        assert torch.allclose(given(3 * x), times * (z @ made.W_dec + bias), atol=1e-4)


def test_a_silent_feature_learns_from_what_is_missed() -> None:
    made, x, _ = drawn("topk", False)
    with torch.no_grad():
        made.b_enc[5] = -1.5
    made.silent.fill_(0.0)
    made.silent[5] = module.SILENT
    made(x, 1.0).backward()
    awake = made.W_dec.grad[5].clone()
    made.zero_grad()
    made.silent[5] = 0.0
    made(x, 1.0).backward()
    with torch.no_grad():
        pre = (x - made.b_dec) @ made.W_enc + made.b_enc
        assert not bool((made._features(pre)[0][:, 5] > 0).any())
        assert bool((pre[:, 5] > 0).any())
    assert float(awake.norm()) > 0
    assert float(made.W_dec.grad[5].norm()) == 0
    along = (made.W_dec.grad * made.W_dec.detach()).sum(dim=1)
    assert float(along.abs().max()) < 1e-4
