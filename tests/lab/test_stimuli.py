"""Stimuli have as many tokens as each other, end with a word, and are what they are called."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stratoscope.errors import InputError
from stratoscope.lab import stimuli

WORDS = "lamp river green walked table old horse street window paper sang quietly".split()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Every word known here is one token, any other one token a letter."""
    known = [*WORDS, *stimuli.FUNCTION, *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {word: n for n, word in enumerate(dict.fromkeys([*known, "?"]))}
    vocab |= {
        f"##{letter}": len(vocab) + n for n, letter in enumerate("abcdefghijklmnopqrstuvwxyz")
    }
    wordpiece = Tokenizer(models.WordPiece(vocab, unk_token="?"))
    wordpiece.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=wordpiece, unk_token="?")


def sentences(n: int) -> list[str]:
    generator = random.Random(0)
    draw = lambda: [  # noqa: E731
        *generator.sample(WORDS, 7),
        *generator.sample(sorted(stimuli.FUNCTION), 9),
    ]
    return [" ".join(generator.sample(draw(), 16)).capitalize() + "." for _ in range(n)]


def test_as_many_tokens_and_the_last_ends_a_word(tokenizer: PreTrainedTokenizerFast) -> None:
    made = stimuli.conditions(tokenizer, sentences(40), 15, length=12)
    assert tuple(made) == stimuli.CONDITIONS
    for texts in made.values():
        assert len(texts) == 15
        assert {len(tokenizer(text)["input_ids"]) for text in texts} == {12}


def test_each_condition_is_what_it_is_called(tokenizer: PreTrainedTokenizerFast) -> None:
    given = sentences(40)
    made = stimuli.conditions(tokenizer, given, 15, length=12)
    begun = [" ".join(stimuli.spoken(text)) for text in given]
    assert all(any(text.startswith(s) for text in begun) for s in made["sentence"])
    assert len({*made["sentence"]}) == 15
    used = Counter(word for text in made["sentence"] for word in text.split())
    assert all(word in used for text in made["words"] for word in text.split())
    assert not {*made["words"]} & {*made["sentence"]}
    real = {*WORDS, *stimuli.FUNCTION}
    assert not any(word in real for text in made["nonwords"] for word in text.split())
    for sentence, other in zip(made["sentence"], made["jabberwocky"]):
        for old, new in zip(sentence.split(), other.split()):
            assert (new == old) == (old in stimuli.FUNCTION)
            assert (new in real) == (old in stimuli.FUNCTION)


def test_the_same_seed_gives_the_same_and_another_others(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    one, same, other = (
        stimuli.conditions(tokenizer, sentences(40), 5, seed=seed) for seed in (1, 1, 2)
    )
    assert one == same
    assert all(one[name] != other[name] for name in stimuli.CONDITIONS)


def test_what_is_said_of_words() -> None:
    assert (
        stimuli.spoken("\u201cDon\u2019t,\u201d she said \u2013 twice!")
        == "don't she said twice".split()
    )
    generator = random.Random(0)
    first = stimuli.pseudoword(frozenset(), random.Random(0))
    assert stimuli.pseudoword(frozenset({first}), generator) != first


def test_too_few_sentences(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match=r"3 of 3 sentences .* and n=5: give more"):
        stimuli.conditions(tokenizer, sentences(3), 5)
    with pytest.raises(InputError, match="0 of 1 sentences"):
        stimuli.conditions(tokenizer, ["too short"], 1)
    with pytest.raises(InputError, match="at least one text"):
        stimuli.conditions(tokenizer, sentences(3), 0)
