"""Integrated gradients equal a fine sum, and say when they do not add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor

from stratoscope.engine.metric import target
from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.tokens import _kinds, integrated_gradients
from support.slopes import ANSWER, FOIL, difference, embeddings, slope
from support.subjects import ROWS, close, lm_of

EXAMPLE = {"measure": lambda case: {"answer": case.answer, "foil": case.foil}}
WHOLE_ANSWER = {"steps": 9}

# planted models where what the story tells happens at just these tokens, and to no other
NAMES = ("copy_head", "induction", "induction_gpt2", "fact_lookup", "fact_lookup_moved", "two_hop")


PLANTED = [getattr(planted, name)() for name in NAMES]


name = lambda x: getattr(x, "name", None) or x.__name__.rpartition(".")[2]  # noqa: E731


@pytest.mark.parametrize(
    ("model", "baseline"), [("llama", "mean"), ("gpt2", "mean"), ("gpt2", "zero")]
)
def test_integrated_gradients_equals_a_fine_riemann_sum(
    model: str, baseline: Literal["mean", "zero"]
) -> None:
    lm = lm_of(model)
    options = {"baseline": baseline, "steps": 513, "tolerance": 1e-4}
    found = integrated_gradients.measure(lm, ROWS, answer=ANSWER, foil=FOIL, **options)
    for e, row in enumerate(ROWS):
        x, mean = embeddings(lm, row)
        mean = mean if baseline == "mean" else 0 * mean
        blank = mean.expand_as(x)
        a = (torch.arange(2000) + 0.5) / 2000
        gradient = torch.cat(
            [slope(lm, blank + b[:, None, None] * (x - blank)) for b in a.split(500)]
        ).mean(dim=0)
        expected = (gradient * (x[0] - mean)).sum(dim=-1).numpy()
        close(found.attribution.values[e, : len(row)], expected, 1e-3)
        rise = float((difference(lm, x) - difference(lm, blank)).detach())
        assert abs(float(found.completeness_error[e])) < 1e-3 * max(1, abs(rise))
        close(float(found.logit_difference[e] - found.baseline_difference[e]), rise, 1e-4)


def test_expected_gradients_are_the_mean_over_ways_from_words_of_the_kinds() -> None:
    lm, row = lm_of("llama"), ROWS[1]
    options = {"steps": 257, "tolerance": 1e-4, "baseline": "kind", "draws": 2, "seed": 4}
    found = integrated_gradients.measure(lm, [ROWS[0], row], answer=ANSWER, foil=FOIL, **options)
    batch = lm.batch([row])
    drawn = _kinds.words(lm, batch, 2, 4, target(lm, batch, ANSWER, FOIL))[:, 0]
    assert not {ANSWER, FOIL} & set(drawn.flatten().tolist())
    x, _ = embeddings(lm, row)
    a = (torch.arange(500) + 0.5) / 500
    expected = torch.zeros(len(row))
    rise = 0.0
    for ids in drawn.tolist():
        blank, _ = embeddings(lm, ids)
        gradient = slope(lm, blank + a[:, None, None] * (x - blank)).mean(dim=0)
        expected += (gradient * (x - blank)[0]).sum(dim=-1) / 2
        rise += float((difference(lm, x) - difference(lm, blank)).detach()) / 2
    close(found.attribution.values[1, : len(row)], expected.numpy(), 1e-3)
    close(float(found.logit_difference[1] - found.baseline_difference[1]), rise, 1e-3)
    assert int(found.points[1]) <= 2 * 257


def _poly(degree: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    return lambda a: (a ** (degree + 1), torch.stack([(degree + 1) * a**degree, 0 * a], dim=1))


def test_the_integral_is_exact_for_cubic_rates_and_finds_a_narrow_jump() -> None:
    for degree in range(4):
        total, a, value = integrated_gradients.integrate(_poly(degree), steps=9, tolerance=0.0)
        assert torch.allclose(total, torch.tensor([1.0, 0.0]).double(), atol=1e-12)
        assert len(a) == 9
        assert float(value[-1]) == 1
    # nine points do not do
    assert abs(float(integrated_gradients.integrate(_poly(9), 9, 0.0)[0][0]) - 1) > 1e-5

    def jump(a: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.sigmoid((a - 0.37) * 1000)
        return y, (1000 * y * (1 - y))[:, None]

    total, a, _ = integrated_gradients.integrate(jump, 65, 1e-3)
    even = jump((torch.arange(65, dtype=torch.float64) + 0.5) / 65)[1].mean()
    assert abs(float(total[0]) - 1) < 0.01 < 0.1 < abs(float(even) - 1)
    assert len(a) <= 65


@pytest.mark.parametrize("p", PLANTED, ids=name)
def test_planted_positions_by_expected_gradients(p: planted.Planted) -> None:
    """As by integrated gradients: of a pair whose product counts, the second gets less."""
    lm = wrap(p.model, p.tokenizer)
    found = integrated_gradients.measure(lm, p.clean, answer=p.answer, foil=p.foil, baseline="kind")
    size = abs(found.attribution.values[0])
    assert int(size.argmax()) in p.positions
    rest = [i for i in range(len(size)) if i not in p.positions]
    assert size[rest].max() < 0.3 * size.max()


def test_batch_size_of_the_path_does_not_matter() -> None:
    lm = lm_of("llama")
    one, many = (
        integrated_gradients.measure(lm, ROWS, answer=5, foil=60, batch_size=n) for n in (1, 16)
    )
    close(one.attribution.values[0], many.attribution.values[0])
    assert (one.points == many.points).all()


def test_a_missed_sum_is_said() -> None:
    """Sharp attention makes the way rough: nine points miss it, and more points come nearer."""
    lm = lm_of("llama")
    with torch.no_grad():
        for layer in lm.model.model.layers:
            layer.self_attn.q_proj.weight.mul_(12)
    options = {"answer": ANSWER, "foil": FOIL, "tolerance": 1e-3}
    rough, fine = (integrated_gradients.measure(lm, ROWS[0], steps=n, **options) for n in (9, 513))
    rise = abs(float(rough.logit_difference[0] - rough.baseline_difference[0]))
    assert abs(float(rough.completeness_error[0])) > 0.1 * rise
    assert "Example 0: the attributions miss their sum" in rough.attrs["notes"]
    assert abs(float(fine.completeness_error[0])) < 0.02 * rise
    assert fine.attrs["notes"] == ""
