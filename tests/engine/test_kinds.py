"""What kind of word a token is, and that the rival of an answer is of its kind."""

from __future__ import annotations

import pytest
import torch

from stratoscope.engine.kinds import kind, rival
from stratoscope.engine.metric import target
from stratoscope.models import LM, wrap
from support import tiny

ALIKE = [
    (" Paris", " Berlin"),
    (" the", " a"),
    ("2", "7"),
    (",", "."),
    (" كتاب", " باب"),
    (" USA", " UK"),
    ("##ing", "##ed"),
    (" ", "\n"),
    (" 三", " 人"),
    (" don't", " can't"),
    ("<E0 A4>", "<A6>"),
]
APART = [
    (" Paris", "Paris"),
    (" Paris", " the"),
    (" Paris", " paris"),
    (" Paris", " PARIS"),
    (" the", " cat"),
    (" 2", " two"),
    ("ه", "ername"),
    (" Москва", " Moscow"),
    ("##ing", "ing"),
    (",", "a"),
    (" The", " Paris"),
    ("<A6>", "!"),
    ("<A6>", "<A6"),
]


@pytest.mark.parametrize(
    ("text", "pieces", "name"),
    [
        (" Paris", False, "capitalised word"),
        ("paris", False, "word without a space before it"),
        ("paris", True, "word"),
        ("##ing", True, "word without a space before it"),
        (" كتاب", False, "Arabic word"),
        ("<F0 9F>", False, "part of a character"),
        (" ±", False, "token of signs"),
        (" the", False, "function word"),
    ],
)
def test_a_kind_has_a_name_for_a_sentence(text: str, pieces: bool, name: str) -> None:
    assert kind(text).named(pieces=pieces) == name


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_alike(one: str, other: str) -> None:
    assert kind(one) == kind(other)


@pytest.mark.parametrize(("one", "other"), APART)
def test_apart(one: str, other: str) -> None:
    assert kind(one) != kind(other)


WORDS = [
    "the",
    "a",
    "of",
    "Paris",
    "London",
    "Parisian",
    "cat",
    "dog",
    "2",
    "3",
    "كتاب",
    "باب",
    "!",
]
WORDS += [f"word{chr(97 + n // 26)}{chr(97 + n % 26)}" for n in range(96 - len(WORDS))]


@pytest.fixture(scope="module")
def lm() -> LM:
    return wrap(tiny.model("llama"), tiny.tokenizer(WORDS))


def scored(logits: dict[str, float]) -> torch.Tensor:
    """Logits over the tiny vocabulary: those given, and -10 elsewhere."""
    row = torch.full((96,), -10.0)
    for word, value in logits.items():
        row[WORDS.index(word)] = value
    return row


@pytest.mark.parametrize(
    ("logits", "answer", "foil"),
    [
        ({"Paris": 9, "the": 8, "cat": 7, "London": 1}, "Paris", "London"),
        ({"the": 9, "Paris": 8, "a": 1, "cat": 7}, "the", "a"),
        ({"2": 9, "the": 8, "3": 0}, "2", "3"),
        ({"كتاب": 9, "cat": 8, "باب": 0}, "كتاب", "باب"),
        # not the same word once more
        ({"Paris": 9, "Parisian": 8, "London": 0}, "Paris", "London"),
        ({"Parisian": 9, "Paris": 8, "London": 0}, "Parisian", "London"),  # nor cut short
    ],
)
def test_the_rival_is_of_the_answer_s_kind(
    lm: LM, logits: dict[str, float], answer: str, foil: str
) -> None:
    found = rival(lm, scored(logits), WORDS.index(answer))
    assert WORDS[found.token] == foil
    assert not found.weak
    assert repr(foil) in found.why


def test_a_word_of_bert_s_is_not_said_to_lack_a_space() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordPiece({word: n for n, word in enumerate(WORDS)}, unk_token="!"))
    bert = wrap(tiny.model("bert"), PreTrainedTokenizerFast(tokenizer_object=made))
    found = rival(bert, scored({"cat": 9, "dog": 8}), WORDS.index("cat"))
    assert WORDS[found.token] == "dog"
    assert "space" not in found.why


def test_without_one_of_its_kind_the_question_is_said_to_be_weak(lm: LM) -> None:
    found = rival(lm, scored({"!": 9, "the": 8}), WORDS.index("!"))
    assert WORDS[found.token] == "the"
    assert found.weak
    assert "the question is weak" in found.why


def test_the_default_foil_of_every_method_is_the_rival(lm: LM) -> None:
    asked = target(lm, "the cat of Paris")
    assert kind(asked.foil_text[0]) == kind(asked.answer_text[0])
    assert [int(asked.foil[0])] == [r.token for r in asked.rivals]
    assert target(lm, "the cat of Paris", foil="dog").rivals == ()


def test_many_answers_look_through_the_unembedding_once(lm: LM, monkeypatch) -> None:
    looked = []
    weight = type(lm).weight
    monkeypatch.setattr(
        type(lm), "weight", lambda lm, site: looked.append(site) or weight(lm, site)
    )
    many = target(lm, ["the cat of Paris", "a dog of London", "2 3 7 the"])
    assert looked == ["logits"]
    assert [r.token for r in many.rivals] == [
        target(lm, text).rivals[0].token
        for text in ("the cat of Paris", "a dog of London", "2 3 7 the")
    ]
