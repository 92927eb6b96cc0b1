"""Traces equal their closed forms: 1 where nothing changed, the cosine that was put there, and the
null for a stranger."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from stratoscope.editing import clamp, needle
from stratoscope.errors import InputError, SiteError
from stratoscope.models import wrap
from stratoscope.neurons import parametric_trace, vocabulary
from support.subjects import THREE, close, lm_of, parts, untouched

EXAMPLE = {"measure": {"inputs": [(0, 3), (1, 7), (1, 0)]}}

UNITS = [(2, 7), (0, 47), (1, 0)]


def test_jaccard_by_hand() -> None:
    one = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    two = torch.tensor([[4, 3, 2, 1], [1, 2, 8, 9], [5, 6, 7, 8]])
    assert parametric_trace.jaccard(one, two).tolist() == pytest.approx([1.0, 2 / 6, 0.0])


def test_no_step_turns_a_vector_further_than_the_bound() -> None:
    vector = 0.2 * torch.randn(256, generator=torch.Generator().manual_seed(0))
    reach = 40 * 1e-3 * 16 / float(vector.norm())
    bound = parametric_trace.least_cosine(vector, 40, 1e-3)
    assert bound == pytest.approx((1 - reach**2) ** 0.5)
    side = torch.randn(256, generator=torch.Generator().manual_seed(1)).sign()
    param = vector.clone().requires_grad_()
    adam = torch.optim.Adam([param], lr=1e-3)
    for _ in range(40):
        adam.zero_grad()
        (param @ side).backward()
        adam.step()
    turned = float(torch.cosine_similarity(vector, param.detach(), dim=0))
    assert bound - 1e-6 <= turned < 1 - 0.5 * (1 - bound)
    assert parametric_trace.least_cosine(vector, 10_000, 1e-3) == 0.0
    assert parametric_trace.least_cosine(vector, 60, 3e-5) > 0.999


@pytest.mark.parametrize("name", THREE)
@torch.no_grad()
def test_against_a_model_changed_by_hand(name: str) -> None:
    lm = lm_of(name)
    other = wrap(deepcopy(lm.model))
    down = parts(other, 2)[1].weight
    column = down[7] if name == "gpt2" else down[:, 7]
    old, step = column.clone(), torch.randn(32, generator=torch.Generator().manual_seed(0))
    column += step
    with untouched(lm), untouched(other):
        found = parametric_trace.measure(lm, UNITS, after=other, top=10)
    assert found.cosine.values[0] == pytest.approx(
        float(torch.cosine_similarity(old, old + step, dim=0)), abs=1e-5
    )
    assert found.distance.values[0] == pytest.approx(float(step.norm() / old.norm()), rel=1e-5)
    before, after = (
        set(vocabulary.measure(model, [(2, 7)], top=10).promoted.values[0].tolist())
        for model in (lm, other)
    )
    assert found.jaccard.values[0] == pytest.approx(len(before & after) / len(before | after))
    close(found.cosine[1:], torch.ones(2), 1e-6)
    assert found.jaccard[1:].values.tolist() == [1.0, 1.0]
    assert (found.null_cosine < 0.9).all()


def test_against_an_edit() -> None:
    lm = lm_of("llama")
    with untouched(lm):
        found = parametric_trace.measure(lm, UNITS, after=needle.edit(lm, [UNITS[0]], noise=10.0))
    assert found.cosine.values[0] < 0.6
    assert found.distance.values[0] == pytest.approx(10, rel=0.4)
    assert found.distance.values[1:].tolist() == [0.0, 0.0]
    # an edit at a site leaves the weights alone: the trace is whole, whatever the model says
    whole = parametric_trace.measure(lm, UNITS, after=clamp.edit(lm, UNITS))
    assert whole.jaccard.values.tolist() == [1.0] * 3
    alone = parametric_trace.measure(lm, UNITS)
    assert alone.distance.values.tolist() == [0.0] * 3


def test_refusals() -> None:
    lm = lm_of("llama")
    with pytest.raises(InputError, match="neuron"):
        parametric_trace.measure(lm, [(0, 48)])
    with pytest.raises(InputError, match="this one has"):
        parametric_trace.measure(lm, UNITS, after=lm_of("gpt2"))
    with pytest.raises(SiteError):
        parametric_trace.measure(lm_of("bert"), UNITS)
