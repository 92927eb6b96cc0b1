"""Mean heads: the mean by plain hooks, place by place or at the end, and a planted head that then
knows nothing of its prompt."""

from __future__ import annotations

import pytest
import torch

from stratoscope.editing import mean_heads
from stratoscope.engine.metric import last_logits, target
from stratoscope.errors import InputError
from stratoscope.lab import planted
from stratoscope.models import wrap
from support.subjects import ROWS, close, entering, lm_of, logits_with, padded, parts, untouched

SAME = [[3, 14, 15, 92, 65], [38, 46, 26, 43, 3], [5, 6, 7, 8, 9]]
EXAMPLE = {
    "edit": lambda case: {"request": [(0, 1), (1, 0)], "prompts": case.references, "last": 2}
}


@pytest.mark.parametrize("last", [None, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_it_is_the_mean_by_plain_hooks(name: str, last: int | None) -> None:
    lm, size, head = lm_of(name), lm_of(name).dims.head_dim, 2
    out, here = parts(lm, 1)[0], slice(2 * size, 3 * size)
    edit = mean_heads.edit(lm, [(1, head)], prompts=SAME, last=last)
    assert edit.note == "L1H2 at their mean over 3 prompts"
    mean = torch.stack([entering(lm, out, row) for row in SAME]).mean(dim=0)[:, here]
    asked = [[9, 8, 7, 6, 4]] if last is None else ROWS

    def change(x: torch.Tensor) -> None:
        place = slice(0, None) if last is None else slice(-last, None)
        x[place, here] = mean[place]

    expected = torch.stack([logits_with(lm, out, row, change) for row in asked])
    with untouched(lm), edit:
        found = last_logits(lm, padded(asked, "left"))
    close(found, expected, 1e-4)
    assert not torch.allclose(found, last_logits(lm, asked), atol=1e-4)


def test_a_planted_head_at_its_mean_says_nothing_of_its_prompt() -> None:
    p = planted.copy_head()
    lm, some = wrap(p.model, p.tokenizer), p.variants(12, seed=2)
    prompts = [v.clean for v in some]
    asked = target(lm, prompts, [v.answer for v in some], [v.foil for v in some])
    others = [v.clean for v in p.variants(40, seed=3)]

    def right() -> float:
        return float((asked.difference(last_logits(lm, prompts)) > 1).double().mean())

    assert right() == 1
    [(layer, head)] = p.heads
    with mean_heads.edit(lm, [(layer, head)], prompts=others, last=1):
        assert right() <= 0.5
    for other in range(lm.dims.heads):
        if other != head:
            with mean_heads.edit(lm, [(layer, other)], prompts=others, last=1):
                assert right() == 1


def test_refusals() -> None:
    lm = lm_of("llama")
    with pytest.raises(InputError, match=r"\(layer, head\), at least one"):
        mean_heads.edit(lm, [], prompts=SAME)
    with pytest.raises(InputError, match="head 4 of layer 0: this model has 0 to 3"):
        mean_heads.edit(lm, [(0, 4)], prompts=SAME)
    with pytest.raises(InputError, match="have 5 to 8 tokens"):
        mean_heads.edit(lm, [(0, 1)], prompts=ROWS)
    for last in (0, 6):
        with pytest.raises(InputError, match="the shortest prompt has 5 tokens"):
            mean_heads.edit(lm, [(0, 1)], prompts=ROWS, last=last)
