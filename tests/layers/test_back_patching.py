"""Back-patching: a planted model that hops too late, and the same numbers from Hugging Face with
plain hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError
from stratoscope.layers import back_patching
from stratoscope.models import wrap
from stratoscope.papers import back_patching as paper
from support import tiny

EXAMPLE = {"measure": lambda case: {"answer": case.answer}}
ONE_TOKEN = "the most likely next token"

ROW = [3, 14, 15, 92, 65, 35]


def test_margin_and_decoded_at_by_hand() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0], [0.0, 3.0, 3.5]])
    assert back_patching.margin(logits, torch.tensor([1, 1])).tolist() == [2.0, -0.5]
    rank = torch.tensor([[9.0, 3, 0, 0], [9, 9, 9, 9], [0, 5, 5, 5]])
    assert back_patching.decoded_at(rank)[[0, 2]].tolist() == [2, 0]
    assert torch.isnan(back_patching.decoded_at(rank)[1])
    assert back_patching.decoded_at(rank, top=4)[0] == 1


def test_strangers_answer_something_else() -> None:
    for seed in range(5):
        found = back_patching.strangers([1, 1, 2, 1], seed)
        assert found is not None
        assert found[:2] == [2, 2]
        assert found[3] == 2
        assert found[2] in (0, 1, 3)
    assert back_patching.strangers([4, 4], 0) == [1, 0]
    assert back_patching.strangers([4], 0) is None


def test_a_model_that_hops_too_late_is_helped_by_one_pair_alone() -> None:
    lm, prompts, answers = paper.late_hop()
    found = back_patching.measure(lm, prompts, answer=answers)
    assert (found.unpatched < 0).all()
    # the bridge, written by layer 1, is read by layer 0
    assert (found.margin.sel(depth=2, layer=0) > 5).all()
    others = found.margin.where((found.depth != 2) | (found.layer != 0))
    assert float(others.max()) < 0
    assert float(found.null.max()) < 0
    assert np.isnan(found.margin.sel(depth=1, layer=1)).all()
    first = back_patching.measure(lm, prompts, answer=answers, position=0)
    assert float(first.margin.max()) < 0  # the word that knows is the last


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_equals_hugging_face(name: str) -> None:
    lm = wrap(tiny.model(name))
    rows, places = [ROW, [38, 46, 26, 43]], [3, -1]
    found = back_patching.measure(lm, rows, answer=[7, 8], position=places)
    layers = lm.model.transformer.h if name == "gpt2" else lm.model.model.layers
    for example, (row, place, answer) in enumerate(zip(rows, places, (7, 8))):
        ids = torch.tensor([row])
        states: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(
                lambda m, a, out, states=states: states.append(
                    (out[0] if isinstance(out, tuple) else out).clone()
                )
            )
            for layer in layers
        ]
        lm.model(ids)
        for hook in hooks:
            hook.remove()
        for depth, layer in ((1, 0), (2, 0), (3, 1), (3, 2)):

            def put(module, args, depth=depth, states=states, place=place):
                changed = args[0].clone()
                changed[:, place] = states[depth - 1][:, place]
                return (changed, *args[1:])

            hook = layers[layer].register_forward_pre_hook(put)
            logits = lm.model(ids).logits[0, -1]
            hook.remove()
            best = torch.cat([logits[:answer], logits[answer + 1 :]]).max()
            assert float(found.margin.sel(depth=depth, layer=layer)[example]) == pytest.approx(
                float(logits[answer] - best), rel=1e-3, abs=1e-3
            )


def test_steps_and_refusals() -> None:
    lm = wrap(tiny.model("llama"))
    found = back_patching.measure(lm, [ROW], answer=7, every=2)
    assert found.depth.values.tolist() == [2]
    assert found.layer.values.tolist() == [0, 2]
    whole = back_patching.measure(lm, [ROW], answer=7)
    assert float(found.margin[0, 0, 0]) == pytest.approx(
        float(whole.margin.sel(depth=2, layer=0)[0]), abs=1e-5
    )
    assert np.isnan(whole.null).all()  # a single prompt has no stranger
    for every in (0, 4):
        with pytest.raises(InputError, match="every"):
            back_patching.measure(lm, [ROW], answer=7, every=every)
    with pytest.raises(InputError, match="outside"):
        back_patching.measure(lm, [ROW], answer=7, position=6)
