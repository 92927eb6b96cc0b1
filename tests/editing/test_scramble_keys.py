"""Scrambled keys equal a GPT-2 with permuted key weights, and undo a planted copier."""

from __future__ import annotations

import pytest
import torch

from stratoscope.editing import scramble_keys
from stratoscope.engine.metric import last_logits
from stratoscope.errors import InputError, SiteError
from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.tokens import verbatim_recall
from support import tiny
from support.subjects import ROWS, close, lm_of, padded, untouched

EXAMPLE = {"edit": {"request": [0, 1]}}


@torch.no_grad()
def test_equals_permuted_weights() -> None:
    """GPT-2 has no rotary positions: permuting keys is permuting the key weights."""
    lm, other = lm_of("gpt2"), tiny.model("gpt2")
    size, dim = lm.dims.head_dim, lm.dims.dim
    order = scramble_keys.orders(lm.dims.heads, size, layer=1, seed=3)
    columns = torch.cat([dim + head * size + row for head, row in enumerate(order)])
    attention = other.transformer.h[1].attn.c_attn
    attention.weight[:, dim : 2 * dim] = attention.weight[:, columns].clone()
    attention.bias[dim : 2 * dim] = attention.bias[columns].clone()
    expected = torch.stack([other(torch.tensor([row])).logits[0, -1] for row in ROWS])
    plain = last_logits(lm, padded(ROWS, "left"))
    with untouched(lm), scramble_keys.edit(lm, [1], seed=3):
        found = last_logits(lm, padded(ROWS, "left"))
    close(found, expected, 1e-5)
    assert (found - plain).abs().max() > 100 * (found - expected).abs().max()


def test_a_planted_copier_recalls_no_more() -> None:
    p = planted.induction()
    lm = wrap(p.model, p.tokenizer)
    words = [word for word in p.tokenizer.get_vocab() if word.isalpha()][:8]
    recall = lambda: verbatim_recall.measure(lm, " ".join(words), opening=words[-1])  # noqa: E731
    assert recall().repeat.item() < 0.3
    with untouched(lm), scramble_keys.edit(lm):
        assert recall().repeat.item() > 0.6


def test_refusals() -> None:
    with pytest.raises(InputError, match="no layers are named"):
        scramble_keys.edit(lm_of("llama"), [])
    with pytest.raises(SiteError):
        scramble_keys.edit(lm_of("llama"), [9])
