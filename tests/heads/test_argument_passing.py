"""Argument passing: planted heads that move the subject, and the same numbers from Hugging Face
with plain hooks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.heads import argument_passing
from stratoscope.lab import planted
from stratoscope.models import wrap
from support import tiny
from support.subjects import CORRUPT, ROWS, close, lm_of, logits_with, parts, untouched

EXAMPLE = {
    "measure": lambda case: {"corrupt": case.corrupt, "answer": case.answer, "foil": case.foil}
}


def test_attention_to_by_hand() -> None:
    # two layers, one example, one head
    pattern = torch.tensor([[[[0.5, 0.3, 0.2, 0.0]]], [[[0.1, 0.1, 0.1, 0.7]]]])
    subject = torch.tensor([[False, True, True, False]])
    assert argument_passing.attention_to(pattern, subject).flatten().tolist() == pytest.approx(
        [0.5, 0.2]
    )


@pytest.mark.parametrize(
    "make", [planted.copy_head, planted.fact_lookup_moved, planted.suppression]
)
def test_planted_mover_is_the_one_head(make) -> None:
    p = make()
    lm = wrap(p.model, p.tokenizer)
    with untouched(lm):
        found = argument_passing.measure(
            lm, p.clean, corrupt=p.corrupt, answer=p.answer, foil=p.foil
        ).isel(example=0)
    [head] = p.heads
    assert float(found.attention[head]) > 0.9
    assert float(found.effect[head]) > 0.8
    for at in p.opposing_heads:
        assert float(found.effect[at]) < 0  # without it the answer is said louder
        found.effect[at] = 0
    found.effect[head] = 0
    assert abs(found.effect).max() < 0.1
    assert abs(found.null).max() < 0.3


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_equals_hugging_face(name: str) -> None:
    lm = lm_of(name)
    found = argument_passing.measure(lm, [ROWS[0]], corrupt=[CORRUPT[0]], answer=7, foil=50).isel(
        example=0
    )
    other = tiny.model(name)
    other.set_attn_implementation("eager")
    pattern = torch.stack(other(torch.tensor([ROWS[0]]), output_attentions=True).attentions)[
        :, 0, :, -1
    ]
    close(found.attention, pattern[..., [2, 6]].sum(-1), 1e-5)  # where the two rows differ
    plain, size = lm.model, lm.dims.head_dim
    ends = [plain(torch.tensor([row])).logits[0, -1] for row in (ROWS[0], CORRUPT[0])]
    d = lambda logits: float(logits[7] - logits[50])  # noqa: E731
    for layer, head in ((0, 1), (1, 3), (2, 2)):
        here, module = slice(head * size, (head + 1) * size), parts(lm, layer)[0]
        seen: list[torch.Tensor] = []
        logits_with(
            lm, module, CORRUPT[0], lambda x, seen=seen, here=here: seen.append(x[-1, here].clone())
        )
        changed = logits_with(
            lm, module, ROWS[0], lambda x, seen=seen, here=here: x[-1, here].copy_(seen[0])
        )
        expected = (d(ends[0]) - d(changed)) / (d(ends[0]) - d(ends[1]))
        assert float(found.effect[layer, head]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_subject_is_what_differs_before_the_last_token() -> None:
    lm = lm_of("gpt2")
    last = [*ROWS[1][:-1], 90]
    found = argument_passing.measure(lm, [ROWS[1]], corrupt=[last], answer=7, foil=50)
    # only the last token differs: there is no subject
    assert np.array_equal(found.attention, np.zeros((1, 3, 4)))
