"""Rollout is the sum over all paths of attention, by plain Hugging Face; a planted word that heads
move comes first; and a head that speaks against the answer is one that speaks for it."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from stratoscope.errors import SiteError
from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.tokens import attention_rollout, gradient_attention
from support import tiny
from support.subjects import ROWS, close, lm_of, padded, untouched

EXAMPLE: dict[str, Any] = {"measure": {}}


def test_two_layers_by_hand() -> None:
    first, second = torch.tensor([[1.0, 0.0], [0.4, 0.6]]), torch.tensor([[1.0, 0.0], [0.8, 0.2]])
    found = attention_rollout.rollout(torch.stack([first, second])[:, None, None])
    # half of [0.8, 1.2] of what the two positions had after half of layer 0
    close(found[0, 1], [0.4 * 1 + 0.6 * 0.2, 0.6 * 0.8])
    close(attention_rollout.rollout(first[None, None, None], stream=1.0)[0], torch.eye(2))


def paths(patterns: np.ndarray, read: int) -> np.ndarray:
    """The weight of every path from each position to `read`, all of them written out: a step in a
    layer stays, with half, or follows a head's pattern, with the other half of its share."""
    layers, heads, size, _ = patterns.shape
    total = np.zeros(size)
    for path in product(range(size), repeat=layers):
        stops = (*path, read)
        weight = 1.0
        for layer in range(layers):
            here, there = stops[layer + 1], stops[layer]
            weight *= patterns[layer, :, here, there].sum() / heads / 2 + (here == there) / 2
        total[path[0]] += weight
    return total


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_it_is_the_sum_over_paths(name: str) -> None:
    model = tiny.model(name)
    lm = wrap(model)
    rows = [row[:5] for row in ROWS[:1]] + [ROWS[1][:4]]
    with untouched(lm):
        found = attention_rollout.measure(lm, rows)
    left = attention_rollout.measure(lm, padded(rows, "left"))
    for n, row in enumerate(rows):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            seen = model(torch.tensor([row]), output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        expected = paths(torch.stack(seen)[:, 0].numpy(), len(row) - 1)
        close(found.attribution[n, : len(row)], expected)
        close(left.attribution[n, : len(row)], expected)
        assert expected.sum() == pytest.approx(1)


def test_pictures_are_read_at_the_class_token() -> None:
    lm, given = lm_of("vit"), tiny.inputs("vit")
    found = attention_rollout.measure(lm, given).attribution[0]
    lm.model.set_attn_implementation("eager")
    with torch.no_grad():
        seen = lm.model(**given, output_attentions=True).attentions
    lm.model.set_attn_implementation("sdpa")
    close(found, paths(torch.stack(seen)[:, 0].numpy(), 0))


def found_first(p: planted.Planted, measure: Any, n: int = 24) -> float:
    """On how many prompts the word that the planted heads move to the last one comes first of
    those before it."""
    lm = wrap(p.model, p.tokenizer)
    right = []
    for v in p.variants(n, seed=2):
        words = v.clean.split()
        found = measure(lm, v).attribution.values[0][: len(words) - 1]
        right.append(words[int(found.argmax())] == v.answer)
    return float(np.mean(right))


@pytest.mark.parametrize(
    "p", [planted.copy_head(), planted.induction(), planted.induction_gpt2()], ids=lambda p: p.name
)
def test_the_word_that_planted_heads_move_comes_first(p: planted.Planted) -> None:
    """The easiest case: one head is sharp, all others are faint noise."""
    assert found_first(p, lambda lm, v: attention_rollout.measure(lm, v.clean)) > 0.9

    def graded(lm, v):
        return gradient_attention.measure(lm, v.clean, answer=v.answer, foil=v.foil)

    assert found_first(p, graded) > 0.9


def test_rollout_knows_no_answer() -> None:
    """A head that speaks for the answer and one that speaks against it are one to it."""
    p = planted.copy_head()
    lm = wrap(p.model, p.tokenizer)
    before = attention_rollout.measure(lm, p.clean).attribution.values
    graded = gradient_attention.measure(lm, p.clean, answer=p.answer, foil=p.foil)
    [(layer, head)] = p.heads
    with torch.no_grad():
        rows = slice(32 * head, 32 * head + 32)
        p.model.transformer.h[layer].attn.c_proj.weight[rows] *= -1
    again = wrap(p.model, p.tokenizer)
    close(attention_rollout.measure(again, p.clean).attribution.values, before, 1e-3)
    turned = gradient_attention.measure(again, p.clean, answer=p.answer, foil=p.foil)
    name = p.clean.split().index(p.answer)
    assert float(turned.attribution[0, name]) < 0.1 * float(graded.attribution[0, name])


def test_refusals() -> None:
    with pytest.raises(SiteError, match="does not exist on"):
        attention_rollout.measure(lm_of("bloom"), ROWS)
