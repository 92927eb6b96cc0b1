"""Rounded weights equal a plain loop's, by output row, whichever way round a model holds them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from stratoscope.editing import round_weights
from stratoscope.engine.metric import last_logits
from stratoscope.errors import InputError
from support import tiny
from support.subjects import ROWS, close, lm_of, padded, untouched

EXAMPLE = {"edit": {"request": 3}}


def test_steps_by_hand() -> None:
    """Three bits: seven steps, from -3 to 3."""
    weight = torch.tensor([[3.0, 1.4, -0.6, 0.1], [-30.0, 14.0, 6.0, 0.0]])
    expected = torch.tensor([[3.0, 1.0, -1.0, 0.0], [-30.0, 10.0, 10.0, 0.0]])
    assert torch.allclose(round_weights.rounded(weight, 3), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_equals_a_model_rounded_by_hand(name: str) -> None:
    lm, other = lm_of(name), tiny.model(name)
    for path, module in other.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or path.endswith("lm_head"):
            continue
        for out in range(module.weight.shape[isinstance(module, Conv1D)]):
            row = module.weight[:, out] if isinstance(module, Conv1D) else module.weight[out]
            step = float(row.abs().max()) / 3
            row.copy_(torch.tensor([round(float(x) / step) * step for x in row]))
    expected = torch.stack([other(torch.tensor([row])).logits[0, -1] for row in ROWS])
    plain = last_logits(lm, padded(ROWS, "left"))
    with untouched(lm), round_weights.edit(lm, 3):
        found = last_logits(lm, padded(ROWS, "left"))
    close(found, expected, 1e-5)
    assert (found - plain).abs().max() > 100 * (found - expected).abs().max()


def test_no_such_number_of_bits() -> None:
    with pytest.raises(InputError, match="2 to 16"):
        round_weights.edit(lm_of("llama"), 1)
