"""Function tokens and shares by hand, surprisal against Hugging Face's cross-entropy, and a
language whose losses are known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError, SiteError
from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.papers.function_tokens import bigram_model
from stratoscope.tokens import transition_loss as t
from stratoscope.tokens._surprisal import nats
from support import tiny
from support.subjects import ROWS, close, lm_of, padded, untouched

EXAMPLE = {
    "measure": lambda case: {"function": [row[i] for row in case.rows or [[3, 3]] for i in (0, -2)]}
}

CC, CF, FC, FF = range(4)
FUNCTION = [3, 14, 26]


def test_function_tokens_by_hand() -> None:
    counts = torch.tensor([1, 30, 0, 20, 20, 29])
    assert t.function_tokens(counts, 0.30).tolist() == [1]  # reached exactly
    assert t.function_tokens(counts, 0.31).tolist() == [1, 5]
    assert t.function_tokens(counts, 0.60).tolist() == [1, 5, 3]  # of two alike, the lower id
    # never one that does not occur
    assert t.function_tokens(counts, 1.0).tolist() == [1, 5, 3, 4, 0]
    assert t.function_tokens(counts).tolist() == [1, 5]
    assert t.function_tokens(torch.ones(100, dtype=torch.long), 0.07).tolist() == [*range(7)]
    for share, wrong in ((0.0, counts), (1.1, counts), (0.4, 0 * counts), (0.4, counts - 1)):
        with pytest.raises(InputError, match="give a share"):
            t.function_tokens(wrong, share)


def test_transitions_are_named_in_their_order() -> None:
    words = ("content", "function")
    for before in (False, True):
        for after in (False, True):
            number = int(t.kinds(torch.tensor([before]), torch.tensor([after]))[0])
            assert t.TRANSITIONS[number] == f"{words[before]}->{words[after]}"


def test_means_and_shares_by_hand() -> None:
    found = t.by_transition(torch.tensor([1.0, 3.0, 5.0, 1.0]), torch.tensor([FC, FC, CC, FF]))
    close(found["loss"], [5.0, np.nan, 2.0, 1.0])
    close(found["count"], [1, 0, 2, 1])
    close(found["loss_share"], [0.5, 0, 0.4, 0.1])
    close(found["prediction_share"], [0.25, 0, 0.5, 0.25])


def test_nats_of_logits_made_by_hand() -> None:
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5], [1.0, 1.0, 1.0]]).log()
    close(nats(logits, torch.tensor([2, 1, 2])), [np.nan, -math.log(0.2), math.log(2)])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_surprisal_and_loss_equal_hugging_face(name: str) -> None:
    lm, rows = lm_of(name), [[i % 96 for i in row] for row in ROWS]
    with untouched(lm):
        found = t.measure(lm, rows, function=FUNCTION)
    kinds: dict[str, list[float]] = {word: [] for word in t.TRANSITIONS}
    for number, row in enumerate(rows):
        with torch.no_grad():
            out = lm.model(torch.tensor([row]), labels=torch.tensor([row]))
        each = torch.nn.functional.cross_entropy(
            out.logits[0, :-1].double(), torch.tensor(row[1:]), reduction="none"
        )
        close(found.surprisal[number, : len(row)], [np.nan, *each])
        # as it is trained
        assert float(found.surprisal[number].mean()) == pytest.approx(float(out.loss), rel=1e-5)
        for before, after, loss in zip(row, row[1:], each.tolist()):
            first, second = (
                "function" if word in FUNCTION else "content" for word in (before, after)
            )
            word = f"{first}->{second}"
            kinds[word].append(loss)
        words = found.kind.values[number]
        assert words[0] == ""
        assert (words[len(row) :] == "").all()
    every = sum(map(sum, kinds.values()))
    for word, losses in kinds.items():
        one = found.sel(transition=word)
        assert int(one["count"]) == len(losses) == (found.kind.values == word).sum()
        assert float(one.loss) == pytest.approx(
            np.mean(losses) if losses else np.nan, rel=1e-5, nan_ok=True
        )
        assert float(one.loss_share) == pytest.approx(sum(losses) / every, rel=1e-5)
        assert float(one.prediction_share) == pytest.approx(
            len(losses) / (len(rows[0]) + len(rows[1]) - 2)
        )


def test_only_where_a_word_begins() -> None:
    """Pieces inside a word have a surprisal and no kind, in the means and in the null."""
    p = planted.induction()
    lm = wrap(p.model, p.tokenizer)
    whole = t.measure(lm, p.clean, function=[3, 4])
    assert t.begins_a_word("the", " cat")
    assert t.begins_a_word("the", ".")
    assert t.begins_a_word("(", "cat")
    assert not t.begins_a_word(" c", "at")
    batch = lm.batch(p.clean)
    tokens = [word if i % 3 else f" {word}" for i, word in enumerate(batch.tokens[0])]
    some = dataclasses.replace(batch, tokens=[tokens])
    found = t.measure(lm, some, function=[3, 4], words=True, draws=5)
    first = [False] + [i % 3 == 0 for i in range(1, len(tokens))]
    assert [bool(kind) for kind in found.kind.values[0]] == first
    close(found.surprisal, whole.surprisal)
    surprisal, kind = found.surprisal.values[0], whole.kind.values[0]
    for word in t.TRANSITIONS:
        own = [x for x, k, here in zip(surprisal, kind, first) if here and k == word]
        assert float(found["count"].sel(transition=word)) == len(own)
        expected = np.mean(own) if own else np.nan
        assert float(found.loss.sel(transition=word)) == pytest.approx(expected, nan_ok=True)
    assert int(found["count"].sum()) == sum(first) < int(whole["count"].sum())


def test_many_rows_are_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, rows = lm_of("llama"), [[i % 96 for i in row] for row in ROWS * 3]
    whole = t.measure(lm, padded(rows, "left"), function=FUNCTION)
    monkeypatch.setattr("stratoscope.tokens._surprisal._AT_ONCE", 16)
    close(t.measure(lm, rows, function=FUNCTION).surprisal, whole.surprisal)


def bigram_language(rows: int = 6, length: int = 31) -> tuple[torch.Tensor, list[list[int]]]:
    """Tokens 0 and 1 are function tokens: after one of them comes any of six content tokens, after
    those one of the two."""
    chances = torch.zeros(8, 8)
    chances[:2, 2:], chances[2:, :2] = 1 / 6, 1 / 2
    generator = torch.Generator().manual_seed(0)
    texts = [[0] for _ in range(rows)]
    for text in texts:
        while len(text) < length:
            text.append(int(torch.multinomial(chances[text[-1]], 1, generator=generator)))
    return chances, texts


def test_a_language_whose_losses_are_known() -> None:
    chances, texts = bigram_language()
    lm = wrap(bigram_model(chances))
    found = t.measure(lm, texts, function=[0, 1], draws=50)
    close(found.loss, [np.nan, math.log(2), math.log(6), np.nan])
    close(found.prediction_share, [0, 0.5, 0.5, 0])
    close(found.loss_share[FC], math.log(6) / math.log(12))
    assert float(found.null_loss_share[:, FC].median()) < 0.7 * float(found.loss_share[FC])
    # what follows is as hard after any dealt-out token: all content tokens cost ln 6
    content = found.null_loss.values[:, [CC, FC]]
    close(content[~np.isnan(content)], np.full((~np.isnan(content)).sum(), math.log(6)))


def test_labels_dealt_anew_occur_as_often_and_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([500, 300, 0, *[10] * 40, *[1] * 100])
    draws = torch.stack([t.dealt(counts, 420, generator) for _ in range(20)])
    assert not draws[:, 2].any()  # what does not occur has no label
    assert all(400 < int(counts[draw].sum()) <= 420 for draw in draws)
    assert not draws[:, 0].any()  # what does not fit is left out
    assert 0 < draws[:, 1].sum() < 20
    assert len({tuple(draw.tolist()) for draw in draws}) == 20
    assert t.dealt(counts, 1300, generator).sum() == 142
    assert not t.dealt(counts, 0, generator).any()


def test_the_null_moves_labels_of_the_token_before_only() -> None:
    generator = torch.Generator().manual_seed(3)
    before, after = torch.randint(20, (2, 400), generator=generator)
    function, loss = torch.arange(20) < 6, torch.rand(400, generator=generator)
    found = t.null(loss, before, after, function, draws=30, seed=1)
    predicted = function[after].float().mean()
    close(found["prediction_share"][:, [CF, FF]].sum(dim=1), predicted.expand(30))
    close(
        found["loss_share"][:, [CF, FF]].sum(dim=1),
        (loss[function[after]].sum() / loss.sum()).expand(30),
    )
    preceded = found["prediction_share"][:, [FC, FF]].sum(dim=1)
    assert (preceded <= function[before].float().mean() + 1e-6).all()
    assert (preceded > 0.8 * function[before].float().mean()).all()
    again = t.null(loss, before, after, function, draws=30, seed=1)
    assert torch.equal(found["loss"], again["loss"])
    assert found["loss"].std(dim=0).min() > 0


def test_what_cannot_be_asked() -> None:
    lm = lm_of("llama")
    for function, told in (([], "no token ids"), ([96], "run from 0 to 95"), ([-1], "no token id")):
        with pytest.raises(InputError, match=told):
            t.measure(lm, ROWS[1:], function=function)
    with pytest.raises(InputError, match="two tokens or more"):
        t.measure(lm, [[5], [7]], function=[5])
    with pytest.raises(InputError, match="draws of 1 or more"):
        t.measure(lm, ROWS[1:], function=[5], draws=0)
    with pytest.raises(InputError, match="where a word begins"):
        t.measure(lm, ROWS[1:], function=[5], words=True)
    with pytest.raises(SiteError, match="no surprisal"):
        t.measure(tiny.lm("bert"), ROWS[1:], function=[5])
