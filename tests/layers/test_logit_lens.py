"""The logit lens against plain Hugging Face and a planted fact."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.engine.intervene import intervene, replaced
from stratoscope.errors import MemoryRefusal
from stratoscope.lab import planted
from stratoscope.layers import logit_lens
from stratoscope.models import wrap
from support import tiny

EXAMPLE = {"measure": lambda case: {"answer": case.answer}}
ONE_TOKEN = "read as the next token"

PROMPT, OTHER = [3, 14, 15, 92, 65, 35], [3, 14, 17, 92, 61, 35]


def test_answer_rank_counts_what_scores_higher() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.0, -1.0], [5.0, 5.0, 1.0, 0.0]])
    assert logit_lens.answer_rank(logits, torch.tensor([2, 3])).tolist() == [1, 3]
    assert logit_lens.answer_rank(logits, torch.tensor([1, 1])).tolist() == [0, 0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_logit_lens_equals_plain_hugging_face(name: str) -> None:
    lm = wrap(tiny.model(name))
    found = logit_lens.measure(lm, [PROMPT], answer=7, top=3)
    with torch.no_grad():
        out = lm.model(torch.tensor([PROMPT]), output_hidden_states=True)
        last = out.logits.softmax(-1)[0]
        middle = lm.model.lm_head(lm.layout.final_norm(out.hidden_states[1]))[0]
    if name == "gemma2":
        cap = lm.model.config.final_logit_softcapping
        middle = torch.tanh(middle / cap) * cap
    for depth, expected in ((1, middle.softmax(-1)), (lm.dims.layers, last)):
        values = torch.tensor(found["probability"].values[0, depth])
        torch.testing.assert_close(values, expected.topk(3).values, rtol=1e-4, atol=1e-6)
        chosen = torch.tensor(found["answer_probability"].values[0, depth])
        torch.testing.assert_close(chosen, expected[:, 7], rtol=1e-4, atol=1e-6)
        ranks = (expected > expected[:, [7]]).sum(-1)
        assert found["answer_rank"].values[0, depth].tolist() == ranks.tolist()


def test_the_logit_lens_in_pieces_is_the_logit_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces are small enough (that is what bounds memory), and change nothing."""
    lm = wrap(tiny.model("llama"))
    rows = [[*PROMPT, 5, 6], OTHER, PROMPT[:2], [*OTHER, 9]]
    whole = logit_lens.measure(lm, rows, answer=7)
    sizes: list[tuple[int, ...]] = []
    monkeypatch.setattr(logit_lens, "_STREAMS", 2 * 8 * 4 * lm.dims.dim * (lm.dims.layers + 1))
    monkeypatch.setattr(logit_lens, "_LOGITS", 3 * 4 * lm.dims.vocab)
    told, told_of, seen = [], logit_lens.ranked, logit_lens.capture
    monkeypatch.setattr(
        logit_lens, "ranked", lambda x, *rest: (told.append(len(x)), told_of(x, *rest))[1]
    )
    monkeypatch.setattr(
        logit_lens, "capture", lambda lm, b, *s: (sizes.append(b.ids.shape), seen(lm, b, *s))[1]
    )
    calls: list[tuple[int, int]] = []
    pieces = logit_lens.measure(lm, rows, answer=7, progress=lambda *at: calls.append(at))
    assert sizes == [(2, 8), (2, 7)]
    assert max(told) == 3
    assert calls[-1] == (sum(map(len, rows)) * (lm.dims.layers + 1),) * 2
    for name in whole.data_vars:
        if whole[name].dtype.kind == "f":
            np.testing.assert_allclose(
                pieces[name].values, whole[name].values, rtol=1e-5, atol=1e-7
            )
        else:
            assert (pieces[name].values == whole[name].values).all()
    # a change that numbers its examples counts those of the user's batch
    sizes.clear()
    with intervene(lm, replaced("layers.0.mlp.out", 0.0, examples=[3])):
        changed = logit_lens.measure(lm, rows, answer=7).answer_probability.values
    assert sizes == [(4, 8)]
    moved = abs(np.nan_to_num(changed - pieces.answer_probability.values)).max(axis=(1, 2))
    assert (moved > 1e-6).tolist() == [False, False, False, True]


def test_a_logit_lens_too_large_is_refused_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = wrap(tiny.model("llama"))
    monkeypatch.setattr(logit_lens, "available", lambda device: 10_000)
    with pytest.raises(MemoryRefusal, match="the logit lens of 1 prompts of 6 tokens would take"):
        logit_lens.measure(lm, PROMPT, top=60)


def test_logit_lens_sees_the_planted_fact_come_in() -> None:
    p = planted.fact_lookup()
    [(layer, _)] = p.neurons
    rank = logit_lens.measure(wrap(p.model, p.tokenizer), p.clean, answer=p.answer)[
        "answer_rank"
    ].values[0, :, -1]
    assert rank[layer + 1] == 0
    assert rank[layer] > 0
