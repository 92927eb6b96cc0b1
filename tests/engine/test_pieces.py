"""Texts joined into one prompt: what a tokenizer puts around each stands once, before everything;
ids stay as they are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from stratoscope.engine.pieces import before, pieces
from stratoscope.heads import retrieval_score
from stratoscope.lab import planted
from stratoscope.models import LM, wrap
from stratoscope.tokens import verbatim_recall
from support import tiny


def with_start(kind: str = "bos", ends: bool = False) -> tuple[LM, int]:
    """A planted model whose tokenizer begins every text with the word `soap`, as Llama's does with
    <s>."""
    p = planted.induction()
    inside = Tokenizer.from_str(p.tokenizer.backend_tokenizer.to_str())
    first, last = (p.tokenizer.convert_tokens_to_ids(word) for word in ("soap", "oar"))
    template = "soap $A oar" if ends else "soap $A"
    inside.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("soap", first), ("oar", last)]
    )
    named = {"bos_token": "soap"} if kind == "bos" else {"cls_token": "soap"}
    named |= {"eos_token": "oar"} if ends else {}
    return wrap(
        p.model, PreTrainedTokenizerFast(tokenizer_object=inside, pad_token="<pad>", **named)
    ), first


def read(lm: LM, run) -> list[list[int]]:
    """Every row of ids that the model reads during a call."""
    seen: list[list[int]] = []
    hook = lm.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.extend(
            (kwargs["input_ids"] * kwargs["attention_mask"]).tolist()
        ),
        with_kwargs=True,
    )
    try:
        run()
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize(("kind", "ends"), [("bos", False), ("cls", True)])
def test_pieces_are_texts_without_what_the_tokenizer_puts_around_them(
    kind: str, ends: bool
) -> None:
    lm, first = with_start(kind, ends)
    bare = [lm.tokenizer.convert_tokens_to_ids(word) for word in ("key", "lamp")]
    assert before(lm) == [first]
    assert pieces(lm, "key lamp") == [bare]
    assert pieces(lm, np.array(["key lamp", "lamp"])) == [bare, bare[1:]]
    assert pieces(lm, [[first, *bare]]) == [[first, *bare]]  # ids are what they are
    padded = {"input_ids": torch.tensor([[0, *bare]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    assert pieces(lm, padded) == [bare]
    plain = wrap(lm.model, planted.induction().tokenizer)
    assert (before(plain), before(tiny.lm("llama"))) == ([], [])


def test_a_needle_s_prompt_has_one_start_and_its_cue_is_a_word() -> None:
    lm, first = with_start()
    ids = {
        word: lm.tokenizer.convert_tokens_to_ids(word)
        for word in ("key", "lamp", "mat", "pen", "ink", "jar")
    }
    asked = {"haystack": "pen ink jar", "length": 3, "cue": 1, "depth": 0.34}
    found = {}
    rows = read(lm, lambda: found.update(r=retrieval_score.measure(lm, "key lamp mat", **asked)))
    needle, hay = (
        [ids[w] for w in words] for words in (("key", "lamp", "mat"), ("pen", "ink", "jar"))
    )
    expected = [first, hay[0], *needle, *hay[1:], *needle[:2]]
    assert expected in rows
    assert all(row.count(first) <= 1 for row in rows)
    # by hand: of the positions that say lamp and mat, the heads whose most attended key is that
    # word in the needle
    model = lm.model
    model.set_attn_implementation("eager")
    out = model(torch.tensor([expected]), output_attentions=True)
    said = (
        out.logits[0, -2:].argmax(dim=-1).tolist() == needle[1:],
        out.logits[0, -2:].argmax(dim=-1),
    )
    best = torch.stack(out.attentions)[:, 0, :, -2:].argmax(dim=-1)
    hit = (best == torch.tensor([3, 4])) & (said[1] == torch.tensor(needle[1:]))
    np.testing.assert_allclose(found["r"].score[0], hit.float().mean(dim=-1))
    assert float(found["r"].score.max()) == 1.0


def test_recall_reads_one_start_and_counts_no_start_between_the_readings() -> None:
    lm, first = with_start()
    words = [lm.tokenizer.convert_tokens_to_ids(word) for word in ("key", "lamp", "mat")]
    opening = [lm.tokenizer.convert_tokens_to_ids("pen")]
    found = {}
    rows = read(
        lm, lambda: found.update(r=verbatim_recall.measure(lm, "key lamp mat", opening="pen"))
    )
    assert [first, *opening, *words, *words] in rows
    assert all(
        row.count(first) <= 1
        for row in rows
        if row[0] == first and row[1:2] == opening and row[-3:] == words
    )
    assert found["r"].text.values.tolist() == [["key", "lamp", "mat"]]
    logits = lm.model(torch.tensor([[first, *opening, *words, *words]])).logits[
        0
    ].detach().log_softmax(dim=-1) / np.log(2)
    expected = [-float(logits[len(words) + 1 + at, word]) for at, word in enumerate(words)]
    np.testing.assert_allclose(found["r"].surprisal[0], expected, rtol=1e-4)
    alone = verbatim_recall.measure(lm, "key lamp mat")
    assert np.isfinite(alone["first"]).all()  # the start precedes the text's first word
