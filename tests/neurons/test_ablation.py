"""Neurons switched off one by one: a planted fact goes with its neurons, and the numbers are those
of plain hooks, whole answers included."""

from __future__ import annotations

import copy

import pytest
import torch

from stratoscope.engine.metric import Whole
from stratoscope.errors import InputError, SiteError
from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.neurons import ablation
from support.subjects import ROWS, THREE, close, lm_of, logits_with, padded, parts, untouched

EXAMPLE = {
    "measure": lambda case: {
        "units": [(0, 3), (1, 7)], "answer": case.answer, "foil": case.foil, "draws": 4,
        "value": 3.0,
    }
}  # fmt: skip
WHOLE_ANSWER = {"units": [(0, 1)]}


def test_the_planted_neurons_are_needed_and_no_others() -> None:
    p = planted.fact_lookup()
    lm = wrap(p.model, p.tokenizer)
    others = [(layer, n) for layer in range(2) for n in range(32) if (layer, n) not in p.neurons]
    units = [*sorted(p.neurons), *others[::8]]
    with untouched(lm):
        found = ablation.measure(lm, p.clean, units=units, answer=p.answer, foil=p.foil, seed=3)
    effect = found.effect.values[0]
    assert float(found.difference[0]) > 9
    # each of them takes the whole lead, and the foil is what is left
    assert (effect[: len(p.neurons)] > float(found.difference[0]) + 9).all()
    assert abs(effect[len(p.neurons) :]).max() < 0.5
    assert list(zip(found.layer.values.tolist(), found.neuron.values.tolist())) == units


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("value", [0.0, 2.5])
def test_equals_plain_hooks(name: str, value: float) -> None:
    lm, units = lm_of(name), [(0, 5), (2, 9), (2, 0)]
    how = {"answer": 7, "foil": 60, "value": value, "draws": 3, "seed": 1}
    with untouched(lm):
        found = ablation.measure(lm, padded(ROWS, "left"), units=units, **how)
    drawn = ablation.random_units(units, lm.dims.neurons, 3, 1)

    def lead(row: list[int], layer: int = 0, neuron: int | None = None) -> float:
        def change(x: torch.Tensor) -> None:
            if neuron is not None:
                x[:, neuron] = value

        logits = logits_with(lm, parts(lm, layer)[1], row, change)
        return float(logits[7] - logits[60])

    before = torch.tensor([lead(row) for row in ROWS])
    close(found.difference, before)
    for variable, own in (("effect", units), ("null", drawn)):
        after = torch.tensor([[lead(row, *unit) for unit in own] for row in ROWS])
        close(found[variable], before[:, None] - after)
        assert abs(found[variable]).min() > 1e-6


def test_random_neurons_stand_in_the_same_layers_and_are_others() -> None:
    units = [(0, 3), (4, 1), (4, 2)]
    drawn = ablation.random_units(units, 5, 300, 0)
    assert [layer for layer, _ in drawn[:6]] == [0, 4, 4, 0, 4, 4]
    assert {*drawn} == {(0, 0), (0, 1), (0, 2), (0, 4), (4, 0), (4, 3), (4, 4)}
    assert ablation.random_units(units, 5, 9, 1) != ablation.random_units(units, 5, 9, 2)
    with pytest.raises(InputError, match="all 2 neurons of layer 1 are given"):
        ablation.random_units([(1, 0), (1, 1)], 2, 1, 0)


def test_an_answer_of_several_tokens_is_scored_whole() -> None:
    lm, row = lm_of("llama"), ROWS[0]
    found = ablation.measure(
        lm, [row], units=[(1, 4)], answer=Whole([7, 8]), foil=Whole([9, 11]), draws=1
    )

    def score(tokens: list[int], value: float | None) -> float:
        def change(x: torch.Tensor) -> None:
            if value is not None:
                x[: len(row), 4] = value  # in the prompt, and not in the answer

        ends = [logits_with(lm, parts(lm, 1)[1], row + tokens[:k], change) for k in (0, 1)]
        return sum(float(x.log_softmax(0)[token]) for x, token in zip(ends, tokens))

    before, after = (score([7, 8], v) - score([9, 11], v) for v in (None, 0.0))
    close(found.difference, [before])
    close(found.effect, [[before - after]])


def test_refusals() -> None:
    lm = lm_of("llama")
    for units, said in (
        ([], "0 neurons and draws=20"),
        ([(0, 48)], "neuron 48 of layer 0: this model has 0 to 47"),
        ([(0, 1, 2)], r"given as \(layer, neuron\)"),
    ):
        with pytest.raises(InputError, match=said):
            ablation.measure(lm, ROWS, units=units)
    with pytest.raises(InputError, match="draws=0"):
        ablation.measure(lm, ROWS, units=[(0, 1)], draws=0)
    with pytest.raises(SiteError):
        ablation.measure(lm, ROWS, units=[(9, 1)])


def test_in_half_precision_a_note_says_what_is_rounding() -> None:
    """Random neurons of a planted model do nothing, and a step of rounding is more than that."""
    p = planted.fact_lookup()
    exact, coarse = (
        wrap(copy.deepcopy(p.model).to(t), p.tokenizer) for t in (torch.float32, torch.bfloat16)
    )
    notes = [
        ablation.measure(lm, p.clean, units=sorted(p.neurons), answer=p.answer, foil=p.foil).attrs[
            "notes"
        ]
        for lm in (exact, coarse)
    ]
    assert "rounding" not in notes[0]
    assert "effects of that size are rounding" in notes[1]
