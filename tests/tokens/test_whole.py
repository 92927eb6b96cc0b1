"""Token attributions of whole answers against plain transformers: the sum of log probabilities
written out by hand, its autograd, and plain exchanges of embeddings."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stratoscope.engine.metric import Whole
from stratoscope.engine.sequence import target
from stratoscope.tokens import (
    _kinds,
    exchange,
    gradient_times_input,
    integrated_gradients,
    shapley,
)
from support import tiny

ROWS = [[3, 14, 15, 92, 65, 35], [38, 46, 26, 43]]
ANSWER, FOIL = (5, 60, 7), (9, 61)
WHOLE: dict[str, Any] = {"answer": Whole(ANSWER), "foil": Whole(FOIL)}
NAMES = ("llama", "gpt2", "gemma2")
CALLS: tuple[tuple[Any, dict[str, int]], ...] = (
    (gradient_times_input.measure, {}),
    (integrated_gradients.measure, {"steps": 13}),
    (shapley.measure, {"permutations": 4}),
    (exchange.measure, {"draws": 5}),
)


def by_hand(model: nn.Module, prompt: Tensor) -> Tensor:
    """sum_k log p(answer_k) - sum_k log p(foil_k) after a prompt of embeddings (position, dim)."""
    table, total = model.get_input_embeddings(), []
    for text in (ANSWER, FOIL):
        own = table(torch.tensor(text)).detach()
        logits = model(inputs_embeds=torch.cat([prompt, own])[None]).logits[0].log_softmax(-1)
        total.append(sum(logits[len(prompt) - 1 + k, token] for k, token in enumerate(text)))
    return total[0] - total[1]


def embedded(model: nn.Module, row: list[int]) -> Tensor:
    return model.get_input_embeddings()(torch.tensor(row)).detach()


def slope_by_hand(model: nn.Module, prompt: Tensor) -> Tensor:
    leaf = prompt.clone().requires_grad_(True)
    return torch.autograd.grad(by_hand(model, leaf), leaf)[0]


def agree(found: Any, expected: Tensor, *, within: float) -> None:
    """Near in the largest difference and in norm, both as shares of the expected."""
    gap, scale = torch.as_tensor(found).double() - expected.double(), expected.double()
    assert scale.abs().max() > 0.01  # there is something to compare
    assert gap.abs().max() <= within * scale.abs().max()
    assert gap.norm() <= within * scale.norm()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_times_input_is_the_autograd_of_the_sum(name: str) -> None:
    lm = tiny.lm(name)
    found = gradient_times_input.measure(lm, ROWS, **WHOLE)
    assert "as wholes, of 3 and 2 tokens" in found.attrs["notes"]
    for e, row in enumerate(ROWS):
        x = embedded(lm.model, row)
        expected = (slope_by_hand(lm.model, x) * x).sum(dim=-1)
        agree(found.attribution.values[e, : len(row)], expected, within=1e-3)
        whole = float(by_hand(lm.model, x).detach())
        assert float(found.logit_difference[e]) == pytest.approx(whole, abs=2e-4)


@pytest.mark.parametrize("name", NAMES[1:])
def test_integrated_gradients_sum_to_the_difference_of_log_probabilities(name: str) -> None:
    """And share it out as a plain sum of many midpoints does."""
    lm = tiny.lm(name)
    row, vocabulary = ROWS[1], embedded(lm.model, list(range(lm.dims.vocab)))
    found = integrated_gradients.measure(lm, [row], tolerance=1e-4, steps=129, **WHOLE)
    x = embedded(lm.model, row)
    blank = vocabulary.double().mean(dim=0).float().expand_as(x)
    ends = [float(by_hand(lm.model, at).detach()) for at in (x, blank)]
    assert float(found.logit_difference[0]) == pytest.approx(ends[0], abs=2e-4)
    assert float(found.baseline_difference[0]) == pytest.approx(ends[1], abs=2e-4)
    rise = ends[0] - ends[1]
    assert abs(rise) > 0.05
    assert float(found.attribution.sum()) == pytest.approx(rise, rel=2e-3)
    points = [(n + 0.5) / 64 for n in range(64)]
    slopes = torch.stack([slope_by_hand(lm.model, blank + a * (x - blank)) for a in points])
    agree(found.attribution.values[0], (slopes.mean(dim=0) * (x - blank)).sum(-1), within=5e-3)


@pytest.mark.parametrize("name", NAMES[1:])
def test_shapley_values_are_the_mean_over_all_orders(name: str) -> None:
    lm, row = tiny.lm(name), ROWS[1]
    token = 50
    found = shapley.measure(lm, [row], permutations="all", absent=token, **WHOLE)
    x, gone = embedded(lm.model, row), embedded(lm.model, [token])[0]

    def value(present: frozenset[int]) -> Tensor:
        there = torch.tensor([p in present for p in range(len(row))])[:, None]
        return by_hand(lm.model, torch.where(there, x, gone)).detach()

    expected = torch.zeros(len(row))
    orders = list(permutations(range(len(row))))
    known: dict[frozenset[int], Tensor] = {}
    for order in orders:
        for k, p in enumerate(order):
            for some in (frozenset(order[:k]), frozenset(order[: k + 1])):
                if some not in known:
                    known[some] = value(some)
            expected[p] += known[frozenset(order[: k + 1])] - known[frozenset(order[:k])]
    agree(found.attribution.values[0], expected / len(orders), within=2e-3)


@pytest.mark.parametrize("name", NAMES[1:])
def test_exchange_is_the_mean_over_other_words(name: str) -> None:
    lm, row = tiny.lm(name), ROWS[1]
    found = exchange.measure(lm, [row], draws=5, **WHOLE)
    batch = lm.batch([row])
    drawn = _kinds.words(lm, batch, 5, 0, target(lm, batch, **WHOLE))[:, 0]
    whole = by_hand(lm.model, embedded(lm.model, row)).detach()
    expected = torch.zeros(len(row))
    for other in drawn.tolist():
        for p, word in enumerate(other):
            moved = [*row[:p], word, *row[p + 1 :]]
            expected[p] += (whole - by_hand(lm.model, embedded(lm.model, moved)).detach()) / 5
    agree(found.attribution.values[0], expected, within=2e-3)


def test_no_token_of_a_whole_answer_is_put_into_the_prompt() -> None:
    """Nor of its foil: 96 tokens and 70 draws, so that every word of a kind comes."""
    lm = tiny.lm("llama")
    batch = lm.batch(ROWS)
    whole = set(_kinds.words(lm, batch, 70, 0, target(lm, batch, **WHOLE)).flatten().tolist())
    assert not whole & {*ANSWER, *FOIL}
    one = set(_kinds.words(lm, batch, 70, 0, target(lm, batch, 5, 9)).flatten().tolist())
    assert one & {60, 7, 61}


def test_one_token_each_is_the_logit_difference() -> None:
    """What makes logits probabilities drops out: also of the gradient."""
    lm = tiny.lm("gpt2")
    one, whole = {"answer": 5, "foil": 9}, {"answer": Whole([5]), "foil": Whole([9])}
    for measure, more in CALLS:
        plain, found = (measure(lm, ROWS, **asked, **more) for asked in (one, whole))
        for name in plain.data_vars:
            np.testing.assert_allclose(plain[name], found[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_equals_single(side: str) -> None:
    lm = tiny.lm("gpt2")
    asked = {"answer": [Whole((5, 60, 7)), Whole((8, 4))], "foil": [Whole((9,)), Whole((10, 5, 3))]}
    pads = [[0] * (7 - len(row)) for row in ROWS]
    laid = [[*r, *p] if side == "right" else [*p, *r] for r, p in zip(ROWS, pads)]
    real = [[1] * len(row) for row in ROWS]
    mask = [[*r, *p] if side == "right" else [*p, *r] for r, p in zip(real, pads)]
    both = {"input_ids": torch.tensor(laid), "attention_mask": torch.tensor(mask)}
    for measure, more in CALLS:
        batched = measure(lm, both, **asked, **more)
        for e, row in enumerate(ROWS):
            own = {name: [words[e]] for name, words in asked.items()}
            alone = measure(lm, [row], **own, **more).attribution[0].values
            got = batched.attribution[e].values
            np.testing.assert_allclose(got[: len(row)], alone, atol=2e-4, rtol=1e-3)
            assert np.isnan(got[len(row) :]).all()
