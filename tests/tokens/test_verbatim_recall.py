"""Surprisal against plain Hugging Face, and recall where it is known: in a planted induction
circuit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError, SiteError
from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.tokens import verbatim_recall
from stratoscope.tokens._surprisal import surprisal
from support import tiny

EXAMPLE = {"measure": {}}


def by_hand(model: torch.nn.Module, row: list[int], kept: int) -> list[float]:
    """-log2 p, token by token, each from a forward pass of its own."""
    found = []
    for at in range(len(row) - kept, len(row)):
        if at == 0:
            found.append(float("nan"))
            continue
        with torch.no_grad():
            logits = model(torch.tensor([row[:at]])).logits[0, -1]
        found.append(-float(logits.double().log_softmax(0)[row[at]]) / np.log(2))
    return found


def test_bits_of_a_uniform_and_a_certain_model() -> None:
    ids = torch.tensor([3, 1, 2])
    assert verbatim_recall.bits(torch.zeros(3, 8), ids)[1:].tolist() == pytest.approx([3.0, 3.0])
    sure = torch.full((3, 8), -100.0)
    sure[0, 1] = sure[1, 2] = 100
    assert verbatim_recall.bits(sure, ids)[1:].tolist() == [0.0, 0.0]
    assert verbatim_recall.bits(sure, ids)[0].isnan()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_surprisal_equals_hugging_face(name: str) -> None:
    lm = tiny.lm(name)
    texts, before = [[5, 9, 31, 7], [8, 40]], [[11, 12, 13], [9, 8]]
    found = verbatim_recall.measure(lm, texts, earlier=before)
    for number, (text, old) in enumerate(zip(texts, before)):
        n = len(text)
        np.testing.assert_allclose(
            found.surprisal[number, :n], by_hand(lm.model, old + text, n), atol=1e-4, rtol=1e-5
        )
        np.testing.assert_allclose(
            found["first"][number, :n], by_hand(lm.model, text, n), atol=1e-4, rtol=1e-5
        )
    assert np.isnan(found.surprisal[1, 2:]).all()


def test_an_induction_circuit_recalls_a_list_and_a_permuted_one_less() -> None:
    p = planted.induction()
    lm = wrap(p.model, p.tokenizer)
    words = [w for w in p.tokenizer.get_vocab() if w.isalpha()][:8]
    text = " ".join(words)
    same = verbatim_recall.measure(lm, text, opening=words[-1])
    other = verbatim_recall.measure(lm, text, earlier=" ".join(words[::-1]), opening=words[-1])
    assert float(same.repeat[0]) < 0.5 * float(same.repeat_null[0])
    assert float(same.surprisal[0, 1:].mean()) < 0.6 * float(other.surprisal[0, 1:].mean())


@pytest.mark.parametrize("opening", [[], [11, 12]])
def test_repeat_is_the_ratio_of_medians_of_the_same_tokens(opening: list[int], monkeypatch) -> None:
    """numpy's median, of an even number of tokens too; tokens without a `first` are in neither."""
    lm = tiny.lm("gpt2")
    if opening:
        monkeypatch.setattr(verbatim_recall, "before", lambda lm: opening)
    texts = [[5, 9, 31, 7], [8, 40, 3], [77, 2, 19, 4, 60, 61], [9]]
    found = verbatim_recall.measure(lm, texts, earlier=[[44, 45, 46]] * 4)
    for number in range(4):
        here = np.isfinite(found["first"].values[number])
        assert here.sum() == len(texts[number]) - (not opening)
        if here.any():
            for name, of in (("repeat", "surprisal"), ("repeat_null", "null")):
                ratio = np.median(found[of].values[number][here]) / np.median(
                    found["first"].values[number][here]
                )
                assert float(found[name][number]) == pytest.approx(float(ratio), rel=1e-5)
        else:
            assert np.isnan(found.repeat[number])


@pytest.mark.parametrize("last", [[1, 3], [9, 0]])
def test_the_end_alone_is_the_end_of_all(last: list[int]) -> None:
    """No logits of what is not wanted; a row that is shorter than that is wanted whole."""
    lm, rows = tiny.lm("llama"), [[11, 12, 5, 9, 31, 7], [9, 8, 40]]
    whole, end = surprisal(lm, rows), surprisal(lm, rows, last)
    for number, (row, n) in enumerate(zip(rows, last)):
        for at in range(6):
            wanted = 1 <= at < len(row) and at >= len(row) - n
            assert bool(end[number, at].isfinite()) == wanted
            if wanted:
                assert float(end[number, at]) == pytest.approx(float(whole[number, at]), rel=1e-6)


def test_without_its_null_the_rest_is_the_same() -> None:
    lm = tiny.lm("gpt2")
    whole, less = (verbatim_recall.measure(lm, [[5, 9, 31]], null=on) for on in (True, False))
    assert {*whole.data_vars} - {*less.data_vars} == {"null", "repeat_null"}
    for name in less.data_vars:
        np.testing.assert_array_equal(less[name], whole[name])


def test_what_cannot_be_asked() -> None:
    lm = tiny.lm("llama")
    with pytest.raises(InputError, match="one for each"):
        verbatim_recall.measure(lm, [[1, 2], [3, 4]], earlier=[[1, 2]])
    with pytest.raises(SiteError, match="no surprisal"):
        verbatim_recall.measure(tiny.lm("bert"), [[1, 2, 3]])


def test_only_words_and_not_the_first_are_counted() -> None:
    p = planted.induction()
    lm = wrap(p.model, p.tokenizer)
    words = [word for word in p.tokenizer.get_vocab() if word.isalpha()][:5]
    text = " ".join(words)
    whole = verbatim_recall.measure(lm, text, opening=words[-1])
    found = verbatim_recall.measure(lm, text, opening=words[-1], words=True, skip=2)
    assert found.counted.values.tolist() == [[False, False, True, True, True]]
    assert whole.counted.values.all()
    late = [np.median(x.values[0, 2:]) for x in (found.surprisal, found["first"])]
    assert float(found.repeat[0]) == pytest.approx(late[0] / late[1], rel=1e-5)
    assert not verbatim_recall._spoken(" ,.")
    assert verbatim_recall._spoken(" 7")
