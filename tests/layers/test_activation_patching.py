"""Patching of layers equals plain hooks, and follows planted paths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stratoscope.lab import planted
from stratoscope.layers import activation_patching
from stratoscope.models import wrap
from support import tiny

EXAMPLE = {
    "measure": lambda case: {"corrupt": case.corrupt, "answer": case.answer, "foil": case.foil}
}

PROMPT, OTHER = [3, 14, 15, 92, 65, 35], [3, 14, 17, 92, 61, 35]


def test_patching_equals_plain_hooks() -> None:
    lm = wrap(tiny.model("llama"))
    found = activation_patching.measure(lm, [PROMPT], corrupt=[OTHER], answer=7, foil=8)
    model, clean, corrupt = lm.model, torch.tensor([PROMPT]), torch.tensor([OTHER])
    with torch.no_grad():
        source = model(clean, output_hidden_states=True).hidden_states
        ends = [float((x := model(ids).logits[0, -1])[7] - x[8]) for ids in (clean, corrupt)]
        for layer, position in ((0, 2), (1, 4), (2, 5)):

            def put(
                module: Any, args: tuple, layer: int = layer, position: int = position
            ) -> tuple:
                changed = args[0].clone()
                changed[:, position] = source[layer][:, position]
                return (changed, *args[1:])

            hook = model.model.layers[layer].register_forward_pre_hook(put)
            logits = model(corrupt).logits[0, -1]
            hook.remove()
            expected = (float(logits[7] - logits[8]) - ends[1]) / (ends[0] - ends[1])
            assert float(found["effect"][0, layer, position]) == pytest.approx(
                expected, rel=1e-3, abs=1e-3
            )


@pytest.mark.parametrize("make", [planted.copy_head, planted.fact_lookup_moved])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patching_follows_the_planted_path(make: Any, direction: str) -> None:
    p = make()
    lm = wrap(p.model, p.tokenizer)
    found = activation_patching.measure(
        lm, p.clean, corrupt=p.corrupt, direction=direction, answer=p.answer, foil=p.foil
    )
    effect = found["effect"].values[0]
    differ = [i for i, (a, b) in enumerate(zip(p.clean.split(), p.corrupt.split())) if a != b]
    # at the entry all is where the prompts differ
    assert effect[0, differ].max() == pytest.approx(1, abs=0.05)
    same = [i for i in range(effect.shape[1]) if i not in differ]
    assert abs(effect[0, same]).max() < 0.05
    last = activation_patching.measure(
        lm,
        p.clean,
        corrupt=p.corrupt,
        direction=direction,
        site="resid_post",
        answer=p.answer,
        foil=p.foil,
    )["effect"].values[0, -1]
    # after the last layer only the last token is read
    assert last[-1] == pytest.approx(1, abs=1e-3)
    assert abs(last[:-1]).max() < 1e-3
    assert abs(found["null"]).max() < 0.5
