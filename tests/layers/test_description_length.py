"""Description length: the code by hand, in closed form, and on a planted model."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from stratoscope.errors import InputError
from stratoscope.lab import planted
from stratoscope.layers import concept_depth, description_length
from stratoscope.models import wrap

EXAMPLE = {
    "measure": lambda case: {"inputs": case.rows * 5, "labels": [0, 1] * 5, "draws": 2, "batch": 4}
}
RNG = np.random.default_rng(0)


def test_blocks_are_those_of_the_paper() -> None:
    paper = [1, 2, 4, 8, 16, 32, 62, 125, 250, 500, 1000]
    assert description_length.ends(1000) == paper
    assert description_length.ends(20) == [1, 2, 5, 10, 20]


def test_without_states_the_code_is_that_of_the_shares() -> None:
    kinds = RNG.integers(0, 3, 40)
    bits, at = description_length.ends(40)[0] * np.log2(3), description_length.ends(40)
    for start, end in pairwise(at):
        for kind in kinds[start:end]:
            bits -= np.log2(((kinds[:start] == kind).sum() + 1) / (start + 3))
    found = description_length.online_code(np.zeros((40, 1)), kinds, 3, 1.0)
    assert found == pytest.approx(bits, rel=1e-4)


def test_the_code_is_scikit_learn_block_by_block() -> None:
    x, kinds = RNG.normal(size=(64, 5)), RNG.integers(0, 2, 64)
    x[:, 0] += 2 * kinds
    scaled = (x - x.mean(0)) / x.std(0)
    bits, at = 1.0, [1, 2, 4, 8, 16, 32, 64]
    assert description_length.ends(64) == at
    for start, end in pairwise(at):
        seen = kinds[:start]
        if len(set(seen)) == 1:
            said = np.tile([seen[0] == 0, seen[0] == 1], (end - start, 1)).astype(float)
        else:
            line = LogisticRegression(C=0.5).fit(scaled[:start], seen)
            said = line.predict_proba(scaled[start:end])
        for row, kind in zip(said, kinds[start:end]):
            bits -= np.log2((start * row[kind] + 1) / (start + 2))
    assert description_length.online_code(x, kinds, 2, 0.5) == pytest.approx(bits, rel=1e-5)


def test_texts_of_a_type_have_one_control_label() -> None:
    types, kinds = np.array([0, 1, 2, 1, 0, 2, 3, 3]), np.array([0, 1, 0, 1, 0, 1, 0, 1])
    dealt = description_length.control(kinds, types, np.random.default_rng(1))
    assert all(len(set(dealt[types == one])) == 1 for one in range(4))
    alone = description_length.control(kinds, np.arange(8), np.random.default_rng(1))
    assert sorted(alone) == sorted(kinds)
    assert (alone != kinds).any()


def test_a_moved_word_is_cheap_to_tell_after_the_layer_that_moves_it() -> None:
    p = planted.suppression()
    lm, [(layer, _)] = wrap(p.model, p.tokenizer), p.heads
    words = ("Finn", "Hana")
    texts = [v.clean for v in p.variants(2000, seed=1) if len({*v.clean.split()} & {*words}) == 1]
    texts = texts[:80]
    named = [next(word for word in words if word in text.split()) for text in texts]
    seen = description_length.measure(lm, texts, labels=named, draws=3)
    before, after = (seen.bits.sel(depth=layer + step).mean() for step in (0, 1))
    blind, dealt = seen.blind_bits.mean(), seen.null_bits.sel(depth=layer + 1).mean()
    assert before > 0.85 * blind
    assert after < 0.4 * blind
    assert dealt > 0.85 * blind
    assert float(seen.compression.sel(depth=layer + 1)) > 2.5
    states = concept_depth.states(lm, texts)
    again = description_length.measure(lm, states, labels=named, draws=3)
    assert np.array_equal(again.bits, seen.bits)
    with pytest.raises(InputError, match="7 labels of 2 kinds"):
        description_length.measure(lm, texts[:7], labels=[0, 1, 0, 1, 0, 1, 0])
    with pytest.raises(InputError, match="80 labels and 80 types for 79 texts"):
        description_length.measure(lm, torch.as_tensor(states[1:]), labels=named)
