"""Dropping heads equals zeroing columns of the output projection by hand, and takes back what a
planted suppressor did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stratoscope.editing import drop_heads
from stratoscope.engine.edit import Edit
from stratoscope.engine.metric import last_logits, target
from stratoscope.errors import InputError, SiteError
from stratoscope.heads import answer_suppression
from stratoscope.lab import planted
from stratoscope.models import wrap
from support.subjects import ROWS, THREE, close, lm_of, logits_with, padded, parts, untouched

EXAMPLE = {"edit": {"request": [(0, 3), (1, 1)]}}


@pytest.mark.parametrize("name", THREE)
@pytest.mark.parametrize("positions", [None, -1])
def test_equals_plain_hook(name: str, positions: int | None) -> None:
    lm, size = lm_of(name), lm_of(name).dims.head_dim
    with untouched(lm), drop_heads.edit(lm, [(1, 0), (1, 2)], positions=positions):
        found = last_logits(lm, padded(ROWS, "left"))

    def change(x: torch.Tensor) -> None:
        rows = x if positions is None else x[-1:]
        rows[:, :size] = 0
        rows[:, 2 * size : 3 * size] = 0

    expected = [logits_with(lm, parts(lm, 1)[0], row, change) for row in ROWS]
    close(found, torch.stack(expected), 1e-4)
    assert not torch.allclose(found, last_logits(lm, padded(ROWS, "left")), atol=1e-3)


def test_without_the_planted_suppressor_the_answer_rises() -> None:
    """The heads that are found on some prompts are taken out on another."""
    p = planted.suppression()
    lm = wrap(p.model, p.tokenizer)
    some = p.variants(6, seed=1)
    found = answer_suppression.measure(
        lm, [v.clean for v in some], answer=[v.answer for v in some], layer=1
    )
    heads = answer_suppression.suppressors(found, 1)
    assert {*heads} == p.opposing_heads
    asked = target(lm, p.clean, p.answer, p.foil)
    difference = lambda: float(asked.difference(last_logits(lm, p.clean)))  # noqa: E731
    before = difference()
    with untouched(lm), drop_heads.edit(lm, heads):
        assert difference() == pytest.approx(before + 5, abs=0.5)  # what it took back
    with drop_heads.edit(lm, [(1, 3)]):
        assert difference() == pytest.approx(before, abs=0.1)


def test_the_strongest_are_taken_and_as_many_others_at_random() -> None:
    score = np.zeros((3, 4))
    score[0, 3], score[2, 1], score[1, 0], score[1, 2] = 0.9, 1.0, 0.5, 0.5
    assert drop_heads.strongest(score, 0.25) == [(2, 1), (0, 3), (1, 0)]
    assert drop_heads.strongest(score, 0.2, without=[(0, 3)]) == [(2, 1), (1, 0)]
    for wrong, said in ((0.0, "share=0.0 of 12 heads is 0"), (1.0, "choose 1 to 11")):
        with pytest.raises(InputError, match=said):
            drop_heads.strongest(score, wrong, without=[(0, 0)])
    with pytest.raises(InputError, match="take the mean over"):
        drop_heads.strongest(score[None], 0.2)
    lm, request = lm_of("llama"), [(0, 3), (1, 0), (1, 1)]
    drawn = []
    for seed in range(40):
        changes = drop_heads.edit(lm, request, null=seed).interventions
        heads = {(change.site.layer, head) for change in changes for head in change.units}
        assert len(heads) == 3
        assert not heads & {*request}
        drawn += heads
    assert len({*drawn}) == lm.dims.layers * lm.dims.heads - 3
    layers = [layer for layer, _ in drawn]
    # each layer as often as it has heads left: 3, 2 and 4 of 9
    assert abs(layers.count(2) / len(layers) - 4 / 9) < 0.15
    again = drop_heads.edit(lm, request, null=7)
    with again:
        expected = last_logits(lm, ROWS)
    with drop_heads.edit(lm, request, null=7):
        assert torch.equal(last_logits(lm, ROWS), expected)
    every = [(a, b) for a in range(lm.dims.layers) for b in range(lm.dims.heads)]
    with pytest.raises(InputError, match="heads are left to draw"):
        drop_heads.edit(lm, every[:-1], null=0)


def test_random_heads_of_the_same_layers() -> None:
    lm, request = lm_of("llama"), [(0, 3), (2, 0), (2, 1)]
    drawn: set[tuple[int, int]] = set()
    for seed in range(40):
        changes = drop_heads.edit(lm, request, null=seed, same_layers=True).interventions
        heads = {(change.site.layer, head) for change in changes for head in change.units}
        assert sorted(layer for layer, _ in heads) == [0, 2, 2]
        drawn |= heads
    assert drawn == {(0, 0), (0, 1), (0, 2), (2, 2), (2, 3)}
    with pytest.raises(InputError, match="1 heads are left in layer 1 to draw 3 from"):
        drop_heads.edit(lm, [(1, 0), (1, 1), (1, 2)], null=0, same_layers=True)


def test_saved_and_loaded(tmp_path: Path) -> None:
    lm = lm_of("llama")
    edit = drop_heads.edit(lm, [(2, 1)], positions=-1)
    edit.save(tmp_path / "heads.safetensors")
    with edit:
        expected = last_logits(lm, ROWS)
    with Edit.load(lm, tmp_path / "heads.safetensors"):
        assert torch.equal(last_logits(lm, ROWS), expected)


def test_refusals() -> None:
    lm = lm_of("llama")
    with pytest.raises(InputError, match=r"\(layer, head\), at least one"):
        drop_heads.edit(lm, [])
    with pytest.raises(InputError, match=r"head 4 of layer 0: this model has 0 to 3"):
        drop_heads.edit(lm, [(0, 4)])
    with pytest.raises(SiteError):
        drop_heads.edit(lm, [(9, 0)])
