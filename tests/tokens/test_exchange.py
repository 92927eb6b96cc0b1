"""Exchange equals plain Hugging Face on the words drawn, finds planted positions, and its interval
holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.engine.metric import target
from stratoscope.errors import InputError
from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.tokens import _kinds, exchange
from support.subjects import ROWS, close, lm_of, padded, untouched

EXAMPLE = {"measure": lambda case: {"answer": case.answer, "foil": case.foil}}
WHOLE_ANSWER = {"draws": 5}

WORDS = {"answer": 5, "foil": 60}
NAMES = ("copy_head", "induction", "induction_gpt2", "fact_lookup", "fact_lookup_moved", "two_hop")


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_it_is_the_mean_over_prompts_with_one_word_exchanged(model: str) -> None:
    lm, draws = lm_of(model), 6
    with untouched(lm):
        found = exchange.measure(lm, padded(ROWS, "left"), draws=draws, seed=2, **WORDS)
    for e, row in enumerate(ROWS):
        batch = lm.batch([row])
        drawn = _kinds.words(lm, batch, draws, 2, target(lm, batch, **WORDS))[:, 0]
        prompts = torch.tensor(row).repeat(draws, len(row), 1)
        for p in range(len(row)):
            prompts[:, p, p] = drawn[:, p]
        with torch.no_grad():
            logits = lm.model(prompts.flatten(0, 1)).logits[:, -1]
            whole = lm.model(torch.tensor([row])).logits[0, -1]
        lost = (whole[5] - whole[60]) - (logits[:, 5] - logits[:, 60]).unflatten(0, (draws, -1))
        close(found.attribution.values[e, : len(row)], lost.mean(dim=0).numpy(), 1e-3)
        half = 2.5706 * lost.std(dim=0) / draws**0.5  # Student's t, five degrees of freedom
        close((found.high - found.low).values[e, : len(row)] / 2, half.numpy(), 1e-3)
        assert np.isnan(found.attribution.values[e, len(row) :]).all()


@pytest.mark.parametrize("name", NAMES)
def test_planted_positions_lead(name: str) -> None:
    p: planted.Planted = getattr(planted, name)()
    found = exchange.measure(wrap(p.model, p.tokenizer), p.clean, answer=p.answer, foil=p.foil)
    size = abs(found.attribution.values[0])
    order = [int(i) for i in np.argsort(-size)]
    assert set(order[: len(p.positions)]) == set(p.positions)
    assert size[[i for i in range(len(size)) if i not in p.positions]].max() < 0.1 * size.max()


def test_the_mean_and_its_interval_place_by_place() -> None:
    lost = np.arange(12.0).reshape(6, 2) ** 2
    mean, low, high = exchange.mean_lost(lost)
    assert np.allclose(mean, lost.mean(axis=0))
    half = 2.5706 * lost.std(axis=0, ddof=1) / 6**0.5
    assert np.allclose([high - mean, mean - low], [half, half], rtol=1e-4)


def test_refusals() -> None:
    with pytest.raises(InputError, match="at least 5"):
        exchange.measure(lm_of("llama"), ROWS, draws=4)
