"""Gradient times input is that of token embeddings, by plain torch."""

from __future__ import annotations

import pytest

from stratoscope.tokens import gradient_times_input
from support.slopes import ANSWER, FOIL, difference, embeddings, slope
from support.subjects import ROWS, close, lm_of

EXAMPLE = {"measure": lambda case: {"answer": case.answer, "foil": case.foil}}


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_gradient_times_input_is_that_of_token_embeddings(model: str) -> None:
    lm = lm_of(model)
    found = gradient_times_input.measure(lm, ROWS, answer=ANSWER, foil=FOIL)
    for e, row in enumerate(ROWS):
        x, _ = embeddings(lm, row)
        close(found.attribution.values[e, : len(row)], (slope(lm, x) * x).sum(-1)[0].numpy())
        close(found.logit_difference.values[e], difference(lm, x).detach().numpy()[0])
