"""The needle spoils one value vector by the noise that it says, destroys a planted fact, and
nothing else."""

from __future__ import annotations

import pytest
import torch

from stratoscope.editing import needle
from stratoscope.engine.metric import last_logits, target
from stratoscope.errors import InputError, SiteError
from stratoscope.lab import planted
from stratoscope.models import wrap
from support.subjects import ROWS, THREE, lm_of, parts, untouched

EXAMPLE = {"edit": {"request": [(0, 3)]}}


def test_closed_form() -> None:
    """Noise s leaves a cosine of 1 / sqrt(1 + s^2) in a long vector, whatever its length."""
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-3, 10.0):
        vector = scale * torch.randn(200_000, generator=generator)
        for noise in (0.5, 5.0):
            added = needle.needle(vector, noise, generator)
            assert float(added.norm() / vector.norm()) == pytest.approx(noise, rel=0.02)
            left = torch.cosine_similarity(vector, vector + added, dim=0)
            assert float(left) == pytest.approx((1 + noise**2) ** -0.5, abs=0.02)


def test_a_planted_fact_is_lost_and_the_others_stay() -> None:
    p = planted.fact_lookup()
    lm = wrap(p.model, p.tokenizer)
    asked = target(lm, p.clean, p.answer, p.foil)
    difference = lambda: float(asked.difference(last_logits(lm, p.clean)))  # noqa: E731
    before = difference()
    spoilt, kept = [], []
    # noise can by chance point to the answer: over many draws the vector keeps nothing
    for seed in range(20):
        with needle.edit(lm, sorted(p.neurons), seed=seed):
            spoilt.append(difference())
        with needle.edit(lm, [(1, 17)], seed=seed):  # another country's
            kept.append(difference())
    assert max(abs(value - before) for value in kept) < 0.05 * before
    assert torch.tensor(spoilt).std() > before  # it says anything at all


@pytest.mark.parametrize("name", THREE)
def test_only_the_named_columns_move(name: str) -> None:
    lm = lm_of(name)
    old = parts(lm, 1)[1].weight.clone()
    weights = {key: value.clone() for key, value in lm.model.state_dict().items()}
    made = needle.edit(lm, [(1, 5), (-2, 9)], noise=2.0, seed=3)
    with untouched(lm), made:
        new = parts(lm, 1)[1].weight
        moved = (new != old).any(dim=1 if name == "gpt2" else 0).nonzero()[:, 0].tolist()
        assert moved == [5, 9]
        changed = [
            key
            for key, value in lm.model.state_dict().items()
            if not torch.equal(value, weights[key])
        ]
        assert len(changed) == 1
        edited = last_logits(lm, ROWS)
        both = new.clone()
    with needle.edit(lm, [(1, 9), (1, 5)], noise=2.0, seed=3):
        assert torch.equal(last_logits(lm, ROWS), edited)
    with needle.edit(lm, [(1, 5)], noise=2.0, seed=4):
        assert not torch.equal(parts(lm, 1)[1].weight, both)


def test_refusals() -> None:
    lm = lm_of("llama")
    for wrong in ([(0, 48)], [(0, -1)], [], [(1,)]):
        with pytest.raises(InputError, match="neuron"):
            needle.edit(lm, wrong)
    for noise in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="positive"):
            needle.edit(lm, [(0, 0)], noise=noise)
    with pytest.raises(SiteError, match="mixture of experts"):
        needle.edit(lm_of("mixtral"), [(0, 0)])
