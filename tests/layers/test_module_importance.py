"""Importance equals its formula from plain hooks, knows a module that does nothing, and ranks what
to drop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError
from stratoscope.layers import module_importance
from stratoscope.layers.module_importance import least, turned
from stratoscope.models import LM, wrap
from support import tiny
from support.subjects import ROWS, THREE, close, lm_of, padded, parts, untouched

EXAMPLE = {"measure": {}}


def test_closed_form() -> None:
    """A quarter turn is 1, none is 0 however long the vector became, a half turn 2; padding does
    not count."""
    x = torch.tensor([[[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]]])
    y = torch.tensor([[[[0.0, 2.0], [5.0, 0.0], [-1.0, 0.0]]]])
    assert turned(x, y, torch.tensor([[True, True, False]])).item() == pytest.approx(0.5)
    assert turned(x, y, torch.tensor([[True, True, True]])).item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", [*THREE, "gpt_neox"])
def test_equals_plain_hooks(name: str) -> None:
    lm = lm_of(name)
    with untouched(lm):
        found = module_importance.measure(lm, padded(ROWS, "left"))
    for example, row in enumerate(ROWS):
        seen = passed(lm.layout.layers[""], lm, row)
        close(
            found.block[example],
            [1 - float(torch.cosine_similarity(x, y, dim=-1).mean()) for x, y in seen],
            1e-4,
        )


@torch.no_grad()
def passed(
    layers: list[torch.nn.Module], lm: LM, row: list[int]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each layer is given and gives back, by plain hooks: (position, dim) twice."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(_: object, args: tuple, out: Any) -> None:
        seen.append((args[0][0], out[0] if isinstance(out, torch.Tensor) else out[0][0]))

    hooks = [layer.register_forward_hook(hook) for layer in layers]
    lm.model(torch.tensor([row]))
    for each in hooks:
        each.remove()
    return seen


@torch.no_grad()
def test_a_module_that_writes_nothing_has_none() -> None:
    lm = lm_of("llama")
    parts(lm, 1)[0].weight.zero_()
    parts(lm, 2)[1].weight.zero_()
    found = module_importance.measure(lm, ROWS)
    assert (abs(found.attention[:, 1]) < 1e-6).all()
    assert (abs(found.mlp[:, 2]) < 1e-6).all()
    assert (found.mlp[:, 1] > 1e-3).all()
    close(found.block[:, 1], found.mlp[:, 1], 1e-6)
    assert least(found, 1, "attention") == ["layers.1.attn.out"]
    assert set(least(found, 2, "joint")) == {"layers.1.attn.out", "layers.2.mlp.out"}


def test_what_to_drop() -> None:
    found = module_importance.measure(lm_of("gpt2"), ROWS)
    order = np.argsort(found.mlp.mean("example").values)
    assert least(found, 3, "mlp") == [f"layers.{layer}.mlp.out" for layer in order]
    assert len(least(found, 2, "block")) == 4
    assert len(least(found, 5, "joint")) == 5
    assert least(found, 0, "attention") == []
    for n, kind in ((4, "attention"), (-1, "mlp"), (7, "joint")):
        with pytest.raises(InputError, match="there are"):
            least(found, n, kind)


def test_images_too() -> None:
    found = module_importance.measure(wrap(tiny.model("vit")), tiny.inputs("vit"))
    assert found.attention.shape == (1, 3)
    assert (found.block > 0).all()
