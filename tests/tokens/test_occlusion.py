"""Occlusion is that of token embeddings, by plain Hugging Face."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.tokens import occlusion
from support.slopes import ANSWER, FOIL, difference, embeddings
from support.subjects import ROWS, close, lm_of

EXAMPLE = {"measure": lambda case: {"answer": case.answer, "foil": case.foil}}


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("replacement", ["mean", "zero", 7])
def test_occlusion_is_that_of_token_embeddings(model: str, replacement: str | int) -> None:
    lm = lm_of(model)
    found = occlusion.measure(lm, ROWS, answer=ANSWER, foil=FOIL, replacement=replacement)
    for e, row in enumerate(ROWS):
        x, mean = embeddings(lm, row)
        blank = {"mean": mean, "zero": 0 * mean, 7: embeddings(lm, [7])[0][0, 0]}[replacement]
        many = x.repeat(len(row), 1, 1)
        many[range(len(row)), range(len(row))] = blank
        with torch.no_grad():
            expected = difference(lm, x) - difference(lm, many)
        close(found.attribution.values[e, : len(row)], expected.numpy())


def test_the_occlusion_null_has_a_seed_of_its_own() -> None:
    lm = lm_of("gpt2")
    state = torch.get_rng_state()
    first, again, other = (occlusion.measure(lm, ROWS, seed=s).null.values[0] for s in (0, 0, 1))
    assert (first == again).all()
    assert not np.allclose(first, other)
    assert torch.equal(state, torch.get_rng_state())
