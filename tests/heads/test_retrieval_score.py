"""Retrieval score: patterns by hand, the planted copying head, and greedy decoding step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.engine.generate import generate
from stratoscope.engine.trace import trace
from stratoscope.errors import InputError, SiteError
from stratoscope.heads import retrieval_score
from stratoscope.lab import planted
from stratoscope.models import wrap
from support.subjects import ROWS, close, lm_of, untouched

EXAMPLE = {"measure": {}}

PLANTED = [planted.induction(), planted.induction_gpt2()]


def test_hits_by_hand() -> None:
    ids = torch.tensor([5, 7, 8, 9, 7, 7])
    match = retrieval_score.matches(ids, torch.tensor([7, 9]), 1, 4)
    # the 7s outside the needle do not count
    assert match.int().tolist() == [[0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
    pattern = torch.zeros(1, 3, 2, 6)
    pattern[0, 0, [0, 1], [1, 3]] = (
        0.4  # both right, though most of the attention is elsewhere in small parts
    )
    pattern[0, 0, 0, 4] = 0.3
    pattern[0, 1, [0, 1], [4, 3]] = 1.0  # the right word in the wrong place, then right
    assert retrieval_score.hits(pattern, match).int().tolist() == [[[1, 1], [0, 1], [0, 0]]]


@pytest.mark.parametrize("p", PLANTED, ids=lambda p: p.name)
def test_the_planted_copier_scores_one_and_no_other(p: planted.Planted) -> None:
    lm = wrap(p.model, p.tokenizer)
    words, generator = sorted({*p.tokenizer.get_vocab()} - {"<pad>"}), np.random.default_rng(0)
    needles = [" ".join(generator.permutation(words)[:5]) for _ in range(12)]
    with untouched(lm):
        found = retrieval_score.measure(lm, needles, length=12)
    score = found.score.values
    assert (score[:, 1, 2] == 1).all()
    assert (found.recall == 1).all()
    score[:, 1, 2] = 0
    assert score.mean(axis=0).max() < 0.25  # noise heads hit now and then
    assert 0.03 < found.null.mean() < 0.08  # one of about twenty


def test_one_pass_is_greedy_decoding() -> None:
    """The heads' most attended tokens, step by step while the model generates the needle itself."""
    p = PLANTED[0]
    lm = wrap(p.model, p.tokenizer)
    needle, hay = (
        p.tokenizer("soap key lamp mat hat")["input_ids"],
        p.tokenizer("oar pen ink jar rug net")["input_ids"],
    )
    found = retrieval_score.measure(lm, [needle], haystack=[hay], cue=2, depth=0.5, length=6)
    prompt = retrieval_score.text(hay, needle, needle[:2], 3)
    assert prompt == [*hay[:3], *needle, *hay[3:], *needle[:2]]
    with trace(lm, "layers.*.attn.pattern", positions=-1, stop=False) as seen:
        [said] = generate(lm, [prompt], tokens=3)
    assert said.tolist() == needle[2:]
    expected = np.zeros((2, 4))
    for layer in range(2):
        for step, pattern in enumerate(seen.steps(f"layers.{layer}.attn.pattern")):
            expected[layer] += pattern.reshape(4, -1).argmax(dim=-1).numpy() == 3 + 2 + step
    close(found.score[0], expected / 3, 1e-6)
    assert found.null[0, 0, 0] == pytest.approx(np.mean([1 / 13, 1 / 14, 1 / 15]), abs=1e-6)


@pytest.mark.parametrize("p", PLANTED, ids=lambda p: p.name)
def test_a_question_stands_in_the_place_of_the_cue(p: planted.Planted) -> None:
    """The planted copier goes by the last word: asked by the word before the answer it scores one,
    by another word it finds nothing; and at the end stands the question, to the token."""
    lm = wrap(p.model, p.tokenizer)
    needles, hay = ["soap key lamp mat", "hat pen soap ink"], "oar jar rug net"
    options = {"haystack": hay, "cue": 3, "length": 4}
    found = retrieval_score.measure(lm, needles, question=["rug lamp", "jar oar soap"], **options)
    assert found.recall.values.tolist() == [1, 1]
    assert (found.score[:, 1, 2] == 1).all()
    # the one match, among what the question's last word sees
    assert found.null[:, 0, 0].values == pytest.approx([1 / 10, 1 / 11], abs=1e-6)
    astray = retrieval_score.measure(lm, needles, question=["lamp rug", "soap oar"], **options)
    assert astray.recall.values.tolist() == [0, 0]
    assert not astray.score.any()
    plain = retrieval_score.measure(lm, needles, **options)
    again = retrieval_score.measure(
        lm, needles, question=["soap key lamp", "hat pen soap"], **options
    )
    assert plain.score.equals(again.score)
    # later tokens of an answer follow the earlier ones: induction again, whatever was asked
    longer = retrieval_score.measure(lm, needles, question=["rug", "oar"], **options | {"cue": 1})
    assert longer.recall.values == pytest.approx([2 / 3, 2 / 3])


def test_a_haystack_is_cut_and_holds_no_word_of_the_needle() -> None:
    p = PLANTED[1]
    lm = wrap(p.model, p.tokenizer)  # 20 words, 32 positions
    found = retrieval_score.measure(
        lm, ["soap key lamp mat", "hat pen jar key oar ink"], length=500
    )
    assert (
        "Haystacks have 16 tokens, not 500. Haystacks have 14 tokens, not 500."
        in found.attrs["notes"]
    )
    given = retrieval_score.measure(
        lm, ["soap key lamp"], haystack="oar pen ink jar rug net", length=4, depth=1.0
    )
    assert given.attrs["notes"] == ""


def test_refusals() -> None:
    lm = lm_of("llama")
    for options, said in (
        ({"cue": 5}, "needle of 5 tokens"),
        ({"cue": 0}, "at least one is given"),
        ({"cue": [1]}, "1 cues for 2"),
        ({"question": [[5, 6]]}, "1 questions for 2"),
        ({"depth": 1.5}, "depth of 0 to 1"),
        ({"length": 0}, "no room"),
    ):
        with pytest.raises(InputError, match=said):
            retrieval_score.measure(lm, ROWS, **options)
    with pytest.raises(SiteError, match="recite"):
        retrieval_score.measure(lm_of("bert"), ROWS)
    with pytest.raises(SiteError, match="ALiBi"):
        retrieval_score.measure(lm_of("bloom"), ROWS)
