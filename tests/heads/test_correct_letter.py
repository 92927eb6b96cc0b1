"""Correct-letter heads: picks by hand, a planted head that looks at the right option, and the same
attention from Hugging Face."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError
from stratoscope.heads import correct_letter
from stratoscope.lab import planted
from stratoscope.models import LM, wrap
from stratoscope.models.text import JOINED
from support import tiny
from support.subjects import ROWS, close, lm_of, untouched

EXAMPLE = {
    "measure": lambda case: {
        "options": [[[length - 3], [length - 2, -1]] for length in case.lengths],
        "right": [answer % 2 for answer in case.answer],
    }
}


def test_picks_by_hand() -> None:
    attention = torch.tensor([[0.2, 0.5, 0.1], [0.4, 0.4, 0.1], [0.0, 0.0, 0.0]])[:, None]
    third = 1 / 3
    assert correct_letter.picks(attention)[:, 0].flatten().tolist() == pytest.approx(
        [0, 1, 0, 0.5, 0.5, 0, third, third, third]
    )


def test_null_is_the_mean_over_pairs_of_questions() -> None:
    generator = torch.Generator().manual_seed(0)
    picked = correct_letter.picks(torch.rand(6, 2, 3, 4, generator=generator))
    right = torch.tensor([0, 3, 1, 0, 0, 2])
    pairs = [picked[e][..., right[f]] for e, f in itertools.permutations(range(6), 2)]
    close(correct_letter.exchanged(picked, right), torch.stack(pairs).mean(dim=0), 1e-6)
    assert correct_letter.exchanged(picked[:1], right[:1]).isnan().all()


@pytest.fixture(scope="module")
def questions() -> tuple[LM, list[str], list[list[list[int]]], list[int]]:
    """Of each prompt three words are options, the name that the planted head looks at now the
    first, now the second or the third."""
    p = planted.copy_head()
    variants = p.variants(24, 0)
    options, right = [], []
    for number, one in enumerate(variants):
        words = one.clean.split()
        name = words.index(one.answer)
        turn = number * 5 % 3
        row = [[name - 1], [name + 1]]
        row.insert(turn, [name - len(words)])  # from the end: the same
        options.append(row)
        right.append(turn)
    return wrap(p.model, p.tokenizer), [one.clean for one in variants], options, right


def test_the_planted_head_picks_the_right_option(questions) -> None:
    lm, prompts, options, right = questions
    with untouched(lm):
        found = correct_letter.measure(lm, prompts, options=options, right=right)
    assert (found.picks[:, 1, 3] == 1).all()
    chosen = found.attention[:, 1, 3].values[range(len(right)), right]
    assert chosen.min() > 0.9
    # of 24, each place is right 8 times: another question's is the own in 7 of 23
    assert float(found.null[1, 3]) == pytest.approx(7 / 23)
    assert correct_letter.heads(found)[0] == (1, 3)
    assert correct_letter.heads(found, 0.9) == [(1, 3)]


def test_a_head_that_looks_at_one_place_is_no_correct_letter_head(questions) -> None:
    """With the name always the first option, it is picked always, and by the null too."""
    lm, prompts, options, right = questions
    first = [[row[place], *row[:place], *row[place + 1 :]] for row, place in zip(options, right)]
    found = correct_letter.measure(lm, prompts, options=first, right=0)
    assert (found.picks[:, 1, 3] == 1).all()
    assert float(found.null[1, 3]) == 1
    assert (1, 3) not in correct_letter.heads(found)
    with pytest.raises(InputError, match="4 questions: 5"):
        correct_letter.heads(found.isel(example=slice(4)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@torch.no_grad()
def test_equals_hugging_face(name: str) -> None:
    options = [[[1], [2, 4], [-3]], [[0, 1], [2], [3]]]
    found = correct_letter.measure(lm_of(name), ROWS, options=options, right=[1, 2])
    other = tiny.model(name)
    other.set_attn_implementation("eager")
    for example, row in enumerate(ROWS):
        patterns = torch.stack(other(torch.tensor([row]), output_attentions=True).attentions)
        last = patterns[:, 0, :, -1]
        parts = [last[..., [place % len(row) for place in o]].sum(-1) for o in options[example]]
        expected = torch.stack(parts, dim=-1)
        close(found.attention[example], expected, 1e-5)
        best = expected.argmax(dim=-1) == [1, 2][example]
        assert np.array_equal(found.picks[example], best.float())


def test_options_are_found_in_the_text() -> None:
    p = planted.copy_head()
    lm = wrap(p.model, p.tokenizer)
    prompt = "by the window Eve drank warm tea who"
    said = correct_letter.measure(lm, prompt, options=[["the window", "Eve", "tea"]], right=1)
    told = correct_letter.measure(lm, prompt, options=[[[1, 2], [3], [6]]], right=1)
    assert np.array_equal(said.attention, told.attention)
    assert said.null.isnull().all()
    for option, match in (("the", "2 times"), ("Gus", "0 times"), ("", "0 times")):
        with pytest.raises(InputError, match=match):
            correct_letter.measure(
                lm, "by the window Eve the tea who", options=[["Eve", option]], right=0
            )


@pytest.mark.parametrize(
    ("tokens", "option", "words", "expected"),
    [
        (("<s>", "A", ".", " dog", "\n", "B", ".", " cat"), "B. cat", False, [5, 6, 7]),
        ((" do", "g\nB", ". cat"), "dog", False, [0, 1]),  # a token that holds any of it
        (("a", "日", JOINED, "本", JOINED, "b"), "日", False, [1, 2]),
        (("a", "日", JOINED, "本", JOINED, "b"), "本b", False, [3, 4, 5]),
        (("the", "play", "##ing", "cat"), "playing", True, [1, 2]),
        (("the", "play", "##ing", "cat"), "cat", True, [3]),
    ],
)
def test_positions_of_a_part_of_the_text(tokens, option, words, expected) -> None:
    assert correct_letter._positions(tokens, option, words) == expected


def test_refusals() -> None:
    lm, pair = lm_of("gpt2"), [[0], [1]]
    for options, right, match in (
        ([pair], 0, "2 prompts, options for 1"),
        ([pair, [[0]]], 0, r"\[1, 2\] each"),
        ([[[0]], [[1]]], 0, r"\[1\] each"),
        ([pair, pair], [0], "1 right"),
        ([pair, pair], 2, "right=2: there are 2"),
        ([pair, [[0], [5]]], 0, r"option \[5\].*5 tokens"),
        ([pair, [[0], []]], 0, r"option \[\]"),
    ):
        with pytest.raises(InputError, match=match):
            correct_letter.measure(lm, ROWS, options=options, right=right)
