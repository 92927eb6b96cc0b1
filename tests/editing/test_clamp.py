"""A clamp destroys the planted fact, equals writing into activations by a plain hook, and leaves
nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stratoscope.editing import clamp
from stratoscope.engine.edit import Edit
from stratoscope.engine.metric import last_logits, target
from stratoscope.errors import InputError, SiteError
from stratoscope.lab import planted
from stratoscope.models import wrap
from support.subjects import ROWS, THREE, close, lm_of, logits_with, padded, parts, untouched

EXAMPLE = {"edit": {"request": [(0, 3), (1, 7)]}}


@pytest.mark.parametrize(
    "p",
    [planted.fact_lookup(), planted.fact_lookup_moved(), planted.two_hop()],
    ids=lambda p: p.name,
)
def test_planted_answer_is_destroyed(p: planted.Planted) -> None:
    lm = wrap(p.model, p.tokenizer)
    asked = target(lm, p.clean, p.answer, p.foil)
    difference = lambda: float(asked.difference(last_logits(lm, p.clean)))  # noqa: E731
    before = difference()
    assert before > 9
    with untouched(lm):
        for neuron in p.neurons:
            with clamp.edit(lm, [neuron]):
                assert difference() < -9  # the foil, "unknown", is what is left
            others = [
                (layer, n) for layer in range(2) for n in range(32) if (layer, n) not in p.neurons
            ]
            with clamp.edit(lm, others):  # the control: all the other neurons
                assert difference() == pytest.approx(before, abs=0.5)
    with clamp.edit(lm, sorted(p.neurons), value=8.0):  # and held on, they say it of a stranger
        stranger = target(lm, p.corrupt, p.answer, p.foil)
        assert float(stranger.difference(last_logits(lm, p.corrupt))) > 9


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("positions", [None, -1, [0, 2]])
def test_equals_plain_hook(name: str, positions: int | list[int] | None) -> None:
    lm = lm_of(name)
    with untouched(lm):
        edit = clamp.edit(lm, [(0, 5), (0, 9)], value=2.5, positions=positions)
        with edit:
            found = last_logits(lm, padded(ROWS, "left"))
    where = slice(None) if positions is None else [positions] if positions == -1 else positions

    def change(x: torch.Tensor) -> None:
        held = x[where]
        held[:, [5, 9]] = 2.5
        x[where] = held

    expected = torch.stack([logits_with(lm, parts(lm, 0)[1], row, change) for row in ROWS])
    before = torch.stack([logits_with(lm, parts(lm, 0)[1], row, lambda x: None) for row in ROWS])
    assert (expected - before).abs().max() > 1e-3
    close(found, expected, 1e-5)


def test_bit_identical_after_an_error() -> None:
    lm = lm_of("llama")
    with (
        untouched(lm),
        pytest.raises(InputError, match="empty"),
        clamp.edit(lm, [(1, 5)], value=3.0),
    ):
        lm([[3, 4], []])


@pytest.mark.parametrize("positions", [None, -1, [0, 2]])
def test_save_and_load(tmp_path: Path, positions: int | list[int] | None) -> None:
    lm = lm_of("gpt2")
    edit = clamp.edit(
        lm, [(2, 1), (0, 9), (0, 5), (0, 9), (-1, 1)], value=-1.5, positions=positions
    )
    edit.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(lm, tmp_path / "edit.safetensors")
    assert loaded.note == edit.note == "L2N1, L0N5, L0N9 held at -1.5"
    plain = last_logits(lm, ROWS)
    with edit:
        expected = last_logits(lm, ROWS)
    with loaded:
        assert torch.equal(last_logits(lm, ROWS), expected)
    assert not torch.equal(plain, expected)
    assert torch.equal(last_logits(lm, ROWS), plain)


def test_refusals() -> None:
    lm = lm_of("llama")
    for wrong in ([(0, 48)], [(0, -1)], [], [(1,)], [(1, 2, 3)]):
        with pytest.raises(InputError, match="neuron"):
            clamp.edit(lm, wrong)
    with pytest.raises(SiteError, match="layer 3 of 3"):
        clamp.edit(lm, [(3, 0)])
    with pytest.raises(InputError, match="finite"):
        clamp.edit(lm, [(0, 0)], value=float("nan"))
    with pytest.raises(SiteError, match="mixture of experts"):
        clamp.edit(lm_of("mixtral"), [(0, 0)])
