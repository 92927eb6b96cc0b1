"""Top-k keeps the k largest and nothing else, equals a plain hook, lets gradients through, and
leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from stratoscope.editing import top_k
from stratoscope.engine.intervention import largest
from stratoscope.engine.metric import last_logits
from stratoscope.engine.trace import capture
from stratoscope.errors import InputError, SiteError
from support.subjects import ROWS, THREE, close, lm_of, logits_with, padded, parts, untouched

EXAMPLE = {"edit": {"request": 3}}


def test_keep() -> None:
    x = torch.tensor([[0.5, -3.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert largest(x, 2)[0].tolist() == [0, -3, 2, 0]
    assert (largest(x, 2)[1] != 0).sum() == 2  # a tie
    assert torch.equal(largest(x, 4), x)
    assert torch.equal(largest(x, 9), x)
    assert not largest(x, 0).any()
    x.requires_grad_()
    largest(x, 1)[0].sum().backward()
    assert x.grad is not None
    assert x.grad[0].tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("name", THREE)
def test_equals_plain_hook(name: str) -> None:
    lm = lm_of(name)

    def change(x: torch.Tensor) -> None:
        order = x.abs().argsort(dim=1, descending=True)
        for position, row in enumerate(order):
            x[position, row[5:]] = 0.0

    expected = torch.stack([logits_with(lm, parts(lm, 1)[1], row, change) for row in ROWS])
    before = last_logits(lm, ROWS)
    with untouched(lm):
        with top_k.edit(lm, [(1, 9), (1, 5), (0, lm.dims.neurons)]):
            found = last_logits(lm, padded(ROWS, "left"))
        assert torch.equal(last_logits(lm, ROWS), before)
    assert (expected - before).abs().max() > 1e-3
    close(found, expected, 1e-5)


def test_every_layer_keeps_k_and_a_model_can_be_trained_inside() -> None:
    lm = lm_of("llama")
    with untouched(lm), top_k.edit(lm, 7):
        act = capture(lm, ROWS, "layers.*.mlp.act").stack("layers.*.mlp.act")
        assert ((act[:, 0] != 0).sum(dim=-1) == 7).all()
    with top_k.edit(lm, 7) as once, once:  # may be entered twice
        lm.model(torch.tensor([ROWS[0]])).logits.square().sum().backward()
    assert all(parts(lm, layer)[1].weight.grad.abs().sum() > 0 for layer in range(3))


def test_refusals() -> None:
    lm = lm_of("llama")
    for wrong in (-1, 49, [(0, 49)]):
        with pytest.raises(InputError, match="48 neurons"):
            top_k.edit(lm, wrong)
    for wrong in ([], [(1,)]):
        with pytest.raises(InputError, match="at least one"):
            top_k.edit(lm, wrong)
    with pytest.raises(SiteError, match="layer 3 of 3"):
        top_k.edit(lm, [(3, 4)])
    with pytest.raises(SiteError, match="mixture of experts"):
        top_k.edit(lm_of("mixtral"), 4)
    with untouched(lm), pytest.raises(KeyboardInterrupt), top_k.edit(lm, 4):
        raise KeyboardInterrupt
