"""Jitter changes the same matrices by the same amount, in another direction."""

from __future__ import annotations

import pytest
import torch

from stratoscope.editing import clamp, fine_tune, jitter
from stratoscope.engine.edit import Edit
from stratoscope.errors import InputError
from support.subjects import ROWS, lm_of, untouched


def some(lm: object) -> Edit:
    return fine_tune.edit(lm, [row for row in ROWS if len(row) > 1], steps=2, rate=1e-2)


EXAMPLE = {
    "edit": lambda case: {"request": fine_tune.edit(case.lm, case.inputs, steps=1, rate=0.01)}
}


def test_as_large_in_every_matrix_and_elsewhere() -> None:
    lm = lm_of("llama")
    with untouched(lm):
        made = some(lm)
        found = jitter.edit(lm, made, seed=1)
    assert found.deltas.keys() == made.deltas.keys()
    for name, delta in made.deltas.items():
        noise = found.deltas[name]
        assert float(noise.norm()) == pytest.approx(float(delta.norm()), rel=1e-5)
        if delta.numel() > 500:
            cosine = torch.cosine_similarity(noise.flatten(), delta.flatten(), dim=0)
            assert abs(float(cosine)) < 4 / delta.numel() ** 0.5


def test_the_seed_decides() -> None:
    lm = lm_of("llama")
    made = some(lm)
    one, two, other = (jitter.edit(lm, made, seed=seed).deltas for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_an_edit_without_weights_is_refused() -> None:
    lm = lm_of("llama")
    with pytest.raises(InputError, match="changes no weight"):
        jitter.edit(lm, clamp.edit(lm, [(0, 3)]))
