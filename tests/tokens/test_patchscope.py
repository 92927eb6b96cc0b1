"""Patchscope: the same numbers from Hugging Face with plain hooks, a known word read, refusals."""

from __future__ import annotations

import pytest
import torch

from stratoscope.errors import InputError
from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.models.text import token_text
from stratoscope.tokens import patchscope
from support import tiny

INTO = [11, 12, 13, 14, 15]

EXAMPLE = {"measure": lambda case: {"answer": case.answer, "into": INTO, "place": 1}}
WHOLE_ANSWER = {"into": [3, 4, 5], "place": 1}
ONE_TOKEN = "asked for the next token"

ROWS = [[3, 14, 15, 92, 65, 35], [38, 46, 26, 43]]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("layer", [None, 1])
@torch.no_grad()
def test_equals_hugging_face(name: str, layer: int | None) -> None:
    lm = wrap(tiny.model(name))
    places, answers = [2, -1], [7, 8]
    found = patchscope.measure(
        lm, ROWS, answer=answers, position=places, into=INTO, place=-2, layer=layer
    )
    layers = lm.model.transformer.h if name == "gpt2" else lm.model.model.layers
    assert found.depth.values.tolist() == list(range(lm.dims.layers + (layer is not None)))
    for example, (row, place, answer) in enumerate(zip(ROWS, places, answers)):
        # what enters each layer, and what leaves the last, before the final norm
        states: list[torch.Tensor] = []
        hooks = [
            part.register_forward_pre_hook(
                lambda m, args, states=states: states.append(args[0].clone())
            )
            for part in layers
        ]
        hooks += [
            layers[-1].register_forward_hook(
                lambda m, a, out, states=states: states.append(
                    (out[0] if isinstance(out, tuple) else out).clone()
                )
            )
        ]
        lm.model(torch.tensor([row]))
        for hook in hooks:
            hook.remove()
        for depth in found.depth.values:

            def put(module, args, depth=int(depth), states=states, place=place):
                changed = args[0].clone()
                changed[:, 3] = states[depth][:, place]
                return (changed, *args[1:])

            hook = layers[depth if layer is None else layer].register_forward_pre_hook(put)
            logits = lm.model(torch.tensor([INTO])).logits[0, -1]
            hook.remove()
            here = found.sel(depth=depth).isel(example=example)
            assert int(here.answer_rank) == int((logits > logits[answer]).sum())
            assert here.token.item() == token_text(lm.tokenizer, int(logits.argmax()))


def test_a_planted_bridge_is_read_by_the_model_itself() -> None:
    """The country that layer 0 writes about a person, put at another word after layer 0: the
    model's layer 1 says its capital. Of the person's own embedding it says nothing there."""
    story = planted.two_hop()
    lm = wrap(story.model, story.tokenizer)
    prompts = ["home of Yuki", "home of Wanjiru"]
    found = patchscope.measure(
        lm, prompts, answer=["Tokyo", "Nairobi"], into="the of unknown", place=-1, layer=1
    )
    said = found.token.values
    assert [text.strip() for text in said[:, 1]] == ["Tokyo", "Nairobi"]
    assert (found.answer_rank.sel(depth=1) == 0).all()
    assert (found.answer_rank.sel(depth=0) > 0).all()


def test_refusals() -> None:
    lm = wrap(tiny.model("llama"))
    for wrong, match in (
        ({"layer": 9}, "layer=9"),
        ({"place": 5}, "has 5 tokens"),
    ):
        with pytest.raises(InputError, match=match):
            patchscope.measure(lm, ROWS, answer=7, into=INTO, **({"place": 0} | wrong))
    story = planted.two_hop()
    lm = wrap(story.model, story.tokenizer)
    with pytest.raises(InputError, match="0 tokens '\\?'"):
        patchscope.measure(lm, ["home of Yuki"], into="the home of")
    words = wrap(tiny.model("llama"), tiny.tokenizer(["?", *(f"w{n}" for n in range(95))]))
    with pytest.raises(InputError, match="2 tokens '\\?'"):
        patchscope.measure(words, ["w1 w2"], into="? w3 ?")


def test_one_sweep_finds_the_first_token_and_the_rank(monkeypatch) -> None:
    lm, swept, sweep = wrap(tiny.model("llama")), [], patchscope.sweep
    monkeypatch.setattr(patchscope, "sweep", lambda *a, **k: swept.append(1) or sweep(*a, **k))
    found = patchscope.measure(lm, ROWS, answer=[7, 8], into=INTO, place=-2)
    assert swept == [1]
    assert found.answer_rank.dtype.kind == "f"
