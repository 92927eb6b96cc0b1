"""Every form in which people pass prompts is read, or refused with a sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stratoscope.errors import InputError
from stratoscope.models.batch import make
from stratoscope.models.inputs import rows_of
from support.tiny import byte_level

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if not loop.last or add_generation_prompt %}.{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Column:
    """A column of a data frame: it has no shape of two axes, only values."""

    def __init__(self, values: list[Any]) -> None:
        self.values, self.dtype, self.shape = values, "object", (len(values),)

    def tolist(self) -> list[Any]:
        return self.values


def texts(rows: list[list[int]], tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row) for row in rows]


@pytest.mark.parametrize(
    "given",
    [
        np.array(["a b", "c"]),
        Column(["a b", "c"]),
        ("a b", "c"),
        np.array(["a b", "c"], dtype=object),
    ],
)
def test_texts_in_other_containers(given: Any) -> None:
    tokenizer = byte_level()
    assert texts(rows_of(given, tokenizer), tokenizer) == ["a b", "c"]


def test_ids_of_numpy_s_own_integers() -> None:
    assert rows_of([np.int64(5), np.int32(6)], None) == [[5, 6]]
    assert rows_of(Column([[5, 6], [7]]), None) == [[5, 6], [7]]


def test_a_chat_goes_through_the_model_s_template() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    chat = [{"role": "user", "content": "hi"}]
    assert texts(rows_of(chat, tokenizer), tokenizer) == ["<user>hi.<assistant>"]
    assert texts(rows_of([chat, chat], tokenizer), tokenizer) == ["<user>hi.<assistant>"] * 2
    begun = [*chat, {"role": "assistant", "content": "I am"}]
    assert texts(rows_of(begun, tokenizer), tokenizer) == ["<user>hi.<assistant>I am"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (b"abc", "decode them to text"),
        ([b"abc"], "prompt 0 is bytes"),
        ([{"role": "user", "content": "hi"}], "no chat template"),
        (["a", "\ud800"], "prompt 1, .* surrogate"),
        ([1.5, 2.0], "prompt 0 is 1.5"),
        ([[1, 1.5]], "holds 1.5, where token ids are integers"),
        (np.array([1.5]), "integers"),
        ([["a", "b"]], "prompt 0 is a list of texts"),
        ([None], "prompt 0 is None"),
        ({"a"}, "got set"),
        (3, "got int 3"),
    ],
)
def test_what_is_no_prompt_gets_its_sentence(given: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        rows_of(given, byte_level())


def test_a_chat_with_pictures_is_left_to_the_processor() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(InputError, match="processor"):
        rows_of([{"role": "user", "content": [{"type": "image"}]}], tokenizer)


def test_a_mapping_that_holds_no_model_inputs() -> None:
    with pytest.raises(InputError, match=r"this one has 'text': 'a'\. Pass a text as it is"):
        make({"text": "a"}, byte_level(), limit=None, pad=0, image=None)
