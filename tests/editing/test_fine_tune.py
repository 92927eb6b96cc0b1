"""One step equals Adam's, loss goes down (and up), the model itself is never trained, and only
decoders are."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch.nn.functional import cross_entropy

from stratoscope.editing import fine_tune
from stratoscope.errors import InputError, SiteError
from stratoscope.maths.loss import next_token_loss
from stratoscope.models import LM
from support.subjects import ROWS, THREE, lm_of, padded, untouched

EXAMPLE = {"edit": {"request": [[3, 4, 5]], "steps": 2}}


def test_loss_is_cross_entropy_of_real_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, ids = (
        torch.randn(2, 4, 7, generator=generator),
        torch.randint(0, 7, (2, 4), generator=generator),
    )
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    real = [(0, 0), (0, 1), (0, 2), (1, 0)]
    expected = torch.stack([cross_entropy(logits[e, p], ids[e, p + 1]) for e, p in real]).mean()
    assert torch.allclose(next_token_loss(logits, ids, mask), expected)


@pytest.mark.parametrize("ascend", [False, True])
@pytest.mark.parametrize("name", THREE)
def test_equals_training_a_copy(name: str, ascend: bool) -> None:
    lm = lm_of(name)
    with untouched(lm):
        made = fine_tune.edit(lm, padded(ROWS, "left"), steps=3, rate=1e-3, ascend=ascend)
    model = deepcopy(lm.model)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, maximize=ascend)
    for row in (ROWS[0], ROWS[1], ROWS[0]):
        ids = torch.tensor([row])
        optimiser.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimiser.step()
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        expected, plain = model(ids).logits, lm.model(ids).logits
    with untouched(lm), made, torch.no_grad():
        found = lm.model(ids).logits
    # Adam divides by the gradient's size: where that is rounding, so is the step
    assert (found - expected).norm() < 0.02 * (expected - plain).norm()


@pytest.mark.parametrize("ascend", [False, True])
def test_the_loss_moves_as_asked_and_stop_is_heard(ascend: bool) -> None:
    lm, heard = lm_of("llama"), []

    @torch.no_grad()
    def loss(model: LM) -> float:
        return float(next_token_loss(model(ROWS)["logits"], *model.batch(ROWS).text))

    def stop(student: LM, step: int) -> bool:
        heard.append(loss(student))
        return step == 4

    before = loss(lm)
    made = fine_tune.edit(lm, ROWS, steps=50, rate=1e-3, ascend=ascend, stop=stop)
    assert len(heard) == 4
    assert (heard[-1] > before) == ascend
    with made:
        assert loss(lm) == pytest.approx(heard[-1], abs=1e-4)
    assert loss(lm) == before
    assert "4 steps" in made.note


def test_refusals() -> None:
    lm = lm_of("llama")
    for steps, texts in ((0, ROWS), (1, [[3]])):
        with pytest.raises(InputError, match="at least"):
            fine_tune.edit(lm, texts, steps=steps)
    with untouched(lm), pytest.raises(InputError, match="lower rate"):
        fine_tune.edit(lm, ROWS, steps=20, rate=1e20)
    for name in ("bert", "vit"):
        with pytest.raises(SiteError, match="next token"):
            fine_tune.edit(lm_of(name), ROWS)


def test_a_copy_is_trained_without_the_interventions_around() -> None:
    """Inside a block the copy is a plain model: the deltas are those of training outside."""
    from stratoscope.engine.intervene import ablate, intervene

    lm, texts = lm_of("llama"), [[3, 14, 15, 92, 65], [38, 46, 26]]
    outside = fine_tune.edit(lm, texts, steps=2, rate=1e-3).deltas
    with intervene(lm, ablate("layers.1.attn.out")):
        inside = fine_tune.edit(lm, texts, steps=2, rate=1e-3).deltas
    assert outside.keys() == inside.keys()
    assert all(torch.equal(outside[name], inside[name]) for name in outside)
