"""Kept weights: the edit against plain weights set to zero, with these and without, from a mask and
from its folder."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from stratoscope.editing import keep_weights
from stratoscope.engine import masks
from stratoscope.engine.edit import Edit
from stratoscope.engine.masks import Mask
from stratoscope.errors import InputError, LoadError
from stratoscope.models import LM
from support.subjects import ROWS, THREE, close, lm_of, padded, untouched

EXAMPLE = {"edit": lambda case: {"request": half(case.lm)}}


def half(lm: LM) -> Mask:
    generator = torch.Generator().manual_seed(0)
    keep = {
        name: torch.rand(matrix.weight.shape, generator=generator) < 0.5
        for name, matrix in masks.matrices(lm).items()
    }
    return Mask(keep=keep, settings={}, seed=0, provenance=lm.provenance)


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("name", THREE)
def test_it_is_the_model_whose_other_weights_are_zero(name: str, invert: bool) -> None:
    lm = lm_of(name)
    mask, model = half(lm), deepcopy(lm.model)
    for parameter, weight in model.named_parameters():
        if parameter in mask.keep:
            weight.data[mask.keep[parameter] if invert else ~mask.keep[parameter]] = 0
    with torch.no_grad():
        expected = [model(torch.tensor([row])).logits[0] for row in ROWS]
    with untouched(lm), keep_weights.edit(lm, mask, invert=invert), torch.no_grad():
        found = lm(padded(ROWS, "left"))["logits"]
    for number, row in enumerate(ROWS):
        close(found[number, : len(row)], expected[number], 1e-4)


def test_from_a_folder_and_saved_as_an_edit(tmp_path: Path) -> None:
    lm = lm_of("llama")
    mask = half(lm)
    mask.save(tmp_path / "mask")
    edit = keep_weights.edit(lm, str(tmp_path / "mask"), invert=True)
    assert edit.note == f"without {mask.kept} of {mask.size} weights"
    edit.save(tmp_path / "edit.safetensors")
    with keep_weights.edit(lm, mask, invert=True), torch.no_grad():
        expected = lm(ROWS)["logits"]
    for again in (edit, Edit.load(lm, tmp_path / "edit.safetensors")):
        with again, torch.no_grad():
            assert lm(ROWS)["logits"].equal(expected)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mask is of another model"):
        keep_weights.edit(lm_of("llama"), half(lm_of("gpt2")))
    with pytest.raises(LoadError, match="does not exist"):
        keep_weights.edit(lm_of("llama"), tmp_path / "nothing")
