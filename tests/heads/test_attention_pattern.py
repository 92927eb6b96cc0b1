"""Attention patterns equal Hugging Face's own, hold the planted attention, and leave padding
out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError, SiteError
from stratoscope.heads import attention_pattern
from stratoscope.lab import planted
from stratoscope.models import wrap
from support import tiny
from support.subjects import ROWS, THREE, close, lm_of, padded, untouched

EXAMPLE = {"measure": {}}


@pytest.mark.parametrize("name", THREE)
@torch.no_grad()
def test_equals_hugging_face(name: str) -> None:
    lm = lm_of(name)
    with untouched(lm):
        found = attention_pattern.measure(lm, ROWS)
    assert found.dims == ("example", "layer", "head", "query", "key")
    other = tiny.model(name)
    other.set_attn_implementation("eager")
    for example, row in enumerate(ROWS):
        expected = torch.stack(
            other(torch.tensor([row]), output_attentions=True).attentions, dim=1
        )[0]
        n = len(row)
        close(found[example, ..., :n, :n], expected, 1e-6)
        assert np.isnan(found[example, ..., n:, :]).all()
        assert np.isnan(found[example, ..., :, n:]).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_equals_single(side: str) -> None:
    lm = lm_of("llama")
    found = attention_pattern.measure(lm, padded(ROWS, side))
    for example, row in enumerate(ROWS):
        alone = attention_pattern.measure(lm, [row])[0]
        close(found[example, ..., : len(row), : len(row)], alone, 1e-6)


def test_planted() -> None:
    for p in planted.everything():
        lm = wrap(p.model, p.tokenizer)
        found = attention_pattern.measure(lm, p.clean)[0]
        assert all(float(found[at]) > 0.9 for at in p.attention)
        assert found.text_query.values.tolist() == found.text_key.values.tolist() == p.clean.split()


def test_layers() -> None:
    lm = lm_of("gpt2")
    whole = attention_pattern.measure(lm, ROWS)
    some = attention_pattern.measure(lm, ROWS, layers=[-1, 0])
    assert some.layer.values.tolist() == [2, 0]
    assert some.equals(whole.isel(layer=[2, 0]))
    with pytest.raises(SiteError, match="layer 7 of 3"):
        attention_pattern.measure(lm, ROWS, layers=[7])
    with pytest.raises(InputError, match="no pattern"):
        attention_pattern.measure(lm, ROWS, layers=[])


def test_others() -> None:
    with pytest.raises(SiteError, match="ALiBi"):
        attention_pattern.measure(lm_of("bloom"), ROWS)
    # patches: no text, no padding
    image = attention_pattern.measure(lm_of("vit"), tiny.inputs("vit"))
    close(image.sum("key"), np.ones(image.shape[:-1]), 1e-5)
