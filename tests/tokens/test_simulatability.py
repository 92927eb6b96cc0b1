"""Spans and coverage by hand, the reader against leaving each text out in turn, and the model
against plain Hugging Face."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError
from stratoscope.tokens import simulatability as s
from support.subjects import ROWS, close, lm_of, padded, untouched

EXAMPLE = {"measure": lambda case: {"answer": case.answer, "foil": case.foil}}

MAP = np.array([1.0, -4.0, 0.5, 3.0, -2.0, np.nan, 6.0, 0.0])


def test_spans_by_hand() -> None:
    assert s.spans(MAP, 1, 3) == [range(6, 7), range(1, 2), range(3, 4)]
    assert s.spans(MAP, 2, 2) == [range(6, 8), range(2)]  # 6; then 5 and 5: the first
    assert s.spans(MAP, 2, 9) == [range(6, 8), range(2), range(3, 5)]
    assert s.spans(MAP, 6, 1) == []  # each would hold the gap
    assert s.spans(MAP[:2], 3, 1) == []
    assert s.spans(0 * MAP, 1, 2) == [range(1), range(1, 2)]
    assert s.coverage(MAP, [range(6, 8), range(2)]) == pytest.approx(11 / 16.5)
    assert s.coverage(MAP, []) == 0


def test_the_first_span_is_the_best_there_is_and_none_overlap() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        values = generator.standard_cauchy(12)
        found = s.spans(values, 3, 3)
        sums = [np.abs(values[i : i + 3]).sum() for i in range(10)]
        assert found[0].start == int(np.argmax(sums))
        every = [p for span in found for p in span]
        assert len(set(every)) == len(every)
        drawn = s.anywhere(values, 3, 3, generator)
        assert s.coverage(values, drawn[:1]) <= s.coverage(values, found[:1]) + 1e-9


def test_the_reader_learns_from_the_others_only() -> None:
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(24, 5)), generator.random(24) > 0.4
    found = s.guessed(x, y, ridge=2.0)
    moved = x - x.mean(axis=0)
    z = np.column_stack([moved / np.sqrt((moved**2).sum(axis=1).mean()), np.ones(24)])
    for one in range(24):
        rest = np.arange(24) != one
        a = z[rest].T @ z[rest] + np.diag([2.0] * 5 + [1e-9])
        w = np.linalg.solve(a, z[rest].T @ np.where(y[rest], 1.0, -1.0))
        assert found[one] == (z[one] @ w > 0)


def test_the_reader_knows_what_is_there_and_nothing_else() -> None:
    generator = np.random.default_rng(2)
    y = np.arange(60) % 2 == 0
    assert (s.guessed(generator.normal(size=(60, 4)) + 4 * y[:, None], y) == y).all()
    silent = s.guessed(np.zeros((60, 4)), np.arange(60) < 40)
    assert silent.all()  # the commoner label
    assert (s.guessed(generator.normal(size=(60, 4)), y) == y).mean() < 0.75


def test_what_a_reader_holds_by_hand() -> None:
    vectors = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 2.0], [5.0, 0.0]])
    found = s.held(vectors, np.array([0.5, 0.2, -0.3, np.nan]))
    close(found, [0.3, 0.4, 0.7, 0.0, 0.3, 0.3], 1e-9)
    close(s.held(vectors, np.zeros(4)) + 1, np.ones(6), 1e-9)


def test_a_reader_of_signs_tells_what_words_alone_do_not() -> None:
    """The same words in every text; which of them lower the answer decides the label."""
    generator = np.random.default_rng(3)
    words = generator.normal(size=(6, 8))
    labels = np.arange(80) % 2 == 0
    signs = generator.random((80, 6)) * np.where(np.arange(6) < 3, 1, -1)
    maps = [row if yes else -row for row, yes in zip(signs, labels)]
    told = s.read([words] * 80, maps, labels)
    assert told.all()
    assert s.read([words] * 80, [abs(row) for row in maps], labels).mean() < 0.65
    # one word is known and says all; who is shown another word says nothing
    own = [np.where(np.arange(6)[:, None] == 2, (2 * yes - 1) * words, words) for yes in labels]
    shown, hidden = (np.arange(6) == place for place in (2, 4))
    assert s.read(own, [shown * 1.0] * 80, labels).all()
    assert s.read(own, [hidden * 1.0] * 80, labels).mean() < 0.65
    for maps in ([np.ones(6)] * 79, [np.ones(5)] * 80):
        with pytest.raises(InputError, match="a number for each of its words"):
            s.read(own, maps, labels)


def test_equals_plain_hugging_face() -> None:
    lm = lm_of("llama")
    with untouched(lm):
        found = s.measure(lm, padded(ROWS, "left"), answer=[7, 8], foil=[9, 10], width=2, count=1)
    table = lm.model.get_input_embeddings().weight.detach()
    for e, row in enumerate(ROWS):
        shown = [p for p in range(len(row)) if found.cited.values[e, p]]
        assert len(shown) == 2
        assert shown[1] == shown[0] + 1 < len(row) - 1
        assert not found.cited.values[e, len(row) :].any()
        x = table.double().mean(dim=0).float().repeat(len(row), 1)
        for p in (*shown, len(row) - 1):
            x[p] = table[row[p]]
        with torch.no_grad():
            logits = lm.model(inputs_embeds=x[None]).logits[0, -1]
        close(found.kept.values[e], (logits[7 + e] - logits[9 + e]).item(), 1e-4)


def test_everything_kept_is_the_prompt() -> None:
    found = s.measure(lm_of("gpt2"), ROWS, count=50)
    close(found.kept, found.logit_difference, 1e-4)
    close(found.coverage, np.ones(2), 1e-6)
    close(found.null_kept, found.logit_difference, 1e-4)


def test_refusals() -> None:
    lm = lm_of("llama")
    with pytest.raises(InputError, match="at least 1"):
        s.measure(lm, ROWS, width=0)
    short = s.gradient_times_input.measure(lm, ROWS).isel(position=slice(0, 3))
    with pytest.raises(InputError, match="of these prompts"):
        s.measure(lm, ROWS, saliency=short)
