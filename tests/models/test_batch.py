"""Inputs in every form people have them, brought to one layout; padding reaches no output."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from stratoscope.errors import InputError
from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.models.batch import make
from support import tiny

ROWS = [[3, 14, 15, 92, 65], [38, 46, 26]]


def padded(left: bool) -> dict[str, torch.Tensor]:
    width = max(map(len, ROWS))
    ids = [([0] * (width - len(r)) + r) if left else (r + [0] * (width - len(r))) for r in ROWS]
    mask = [
        ([0] * (width - len(r)) + [1] * len(r)) if left else ([1] * len(r) + [0] * (width - len(r)))
        for r in ROWS
    ]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


FORMS: dict[str, Any] = {
    "lists of ids": ROWS,
    "tuples": tuple(map(tuple, ROWS)),
    "a list of tensors": [torch.tensor(row) for row in ROWS],
    "a mapping padded right": padded(left=False),
    "a mapping padded left": padded(left=True),
    "a mapping of lists": {k: v.tolist() for k, v in padded(left=True).items()},
    "a mapping of arrays": {k: v.numpy() for k, v in padded(left=True).items()},
    "a mapping with a bool mask": {
        k: v.bool() if "mask" in k else v for k, v in padded(left=True).items()
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_batch(form: str) -> None:
    batch = tiny.lm("llama").batch(FORMS[form])
    assert batch.ids.tolist() == [[3, 14, 15, 92, 65], [38, 46, 26, 0, 0]]
    assert batch.lengths.tolist() == [5, 3]
    assert batch.padded
    assert len(batch) == 2
    assert batch.tokens == (("3", "14", "15", "92", "65"), ("38", "46", "26"))
    assert tiny.lm("llama").batch(batch).ids is batch.ids


@pytest.mark.parametrize(
    "one", [[3, 14, 15], torch.tensor([3, 14, 15]), np.array([[3, 14, 15]]), [[3, 14, 15]]]
)
def test_a_single_prompt(one: Any) -> None:
    batch = tiny.lm("llama").batch(one)
    assert batch.ids.tolist() == [[3, 14, 15]]
    assert not batch.padded


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize(
    "name", [n for n in tiny.CONFIGS if n not in ("vit", "clip", "siglip", *tiny.VLMS)]
)
def test_padding_reaches_no_output(name: str, left: bool) -> None:
    lm = tiny.lm(name)
    with torch.no_grad():
        together = next(iter(lm(padded(left)).values()))
        for number, row in enumerate(ROWS):
            alone = next(iter(lm.model(torch.tensor([row])).values()))
            assert tiny.gap(together[number, : len(row)], alone[0]) < 1e-4


@pytest.mark.parametrize("left", [True, False])
def test_what_has_a_value_for_each_token_moves_with_it(left: bool) -> None:
    """BERT's segments."""
    given = padded(left)
    kinds = torch.zeros_like(given["input_ids"])
    kinds[given["input_ids"] == 65] = 1
    kinds[given["input_ids"] == 26] = 1
    batch = tiny.lm("bert").batch(given | {"token_type_ids": kinds})
    assert batch.extra["token_type_ids"].tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 0, 0]]
    arguments, _ = batch.left_padded()
    assert arguments["token_type_ids"].tolist() == [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]]
    with torch.no_grad():
        together = tiny.lm("bert")(batch)["logits"]
        alone = (
            tiny.lm("bert")
            .model(torch.tensor([ROWS[1]]), token_type_ids=torch.tensor([[0, 0, 1]]))
            .logits
        )
    assert tiny.gap(together[1, :3], alone[0]) < 1e-4


def test_left_padded_is_what_generation_takes() -> None:
    batch = tiny.lm("llama").batch(ROWS)
    arguments, shift = batch.left_padded()
    assert arguments["input_ids"].tolist() == [[3, 14, 15, 92, 65], [0, 0, 38, 46, 26]]
    assert arguments["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert shift.tolist() == [0, 2]


def test_one_example_alone() -> None:
    batch = tiny.lm("llama").batch(ROWS)
    assert batch.example(1).ids.tolist() == [[38, 46, 26]]
    assert not batch.example(1).padded
    assert batch.example(1).tokens == (("38", "46", "26"),)
    image = tiny.lm("llava").batch(tiny.inputs("llava"))
    assert image.example(0) is image


def test_coordinates() -> None:
    coords = tiny.lm("llama").batch(ROWS).coords("query", "text_query")
    assert coords["text_query"] == (
        ("example", "query"),
        [["3", "14", "15", "92", "65"], ["38", "46", "26", "", ""]],
    )
    assert coords["example_text"] == (("example",), ["314159265", "384626"])


# --- text -----------------------------------------------------------------------------------------


def test_text_goes_through_the_tokenizer() -> None:
    p = planted.induction()
    lm = wrap(p.model, p.tokenizer)
    batch = lm.batch(p.clean)
    assert batch.ids.tolist() == [p.tokenizer(p.clean)["input_ids"]]
    assert lm.batch([p.clean, p.clean]).ids.shape[0] == 2
    assert lm.batch(p.tokenizer(p.clean)).ids.tolist() == batch.ids.tolist()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([], "must be prompts"),
        ([[]], "prompt 0 is empty"),
        ([[1], []], "prompt 1 is empty"),
        ("", "without a tokenizer"),
        ("Hello", "without a tokenizer"),
        (torch.empty(0, 4, dtype=torch.long), "empty"),
        (torch.zeros(1, 4), "integers"),
        (torch.zeros(1, 2, 3, dtype=torch.long), "shape"),
        ([[1, 96]], "token id 96"),
        ([[-1]], "token id -1"),
        (["a", [1]], "mix text and token ids"),
        (None, "NoneType"),
        (3.5, "float"),
        ({"input_ids": [[1, 2]], "attention_mask": [[0, 0]]}, "prompt 0 is empty"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "differ in shape"),
    ],
)
def test_what_cannot_be_read_is_refused(given: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        tiny.lm("llama").batch(given)


def test_an_empty_text_is_refused() -> None:
    p = planted.copy_head()
    with pytest.raises(InputError, match="prompt 1 is empty"):
        wrap(p.model, p.tokenizer).batch([p.clean, ""])


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    lm = tiny.lm("gpt2")
    assert lm.batch([[1] * 64]).ids.shape == (1, 64)
    with pytest.raises(InputError, match="65 tokens; this model's context is 64"):
        lm.batch([[1] * 65])
    with pytest.raises(InputError, match="context is 3"):
        make([[1, 2, 3, 4]], None, limit=3, pad=0, image=None)


def test_a_pad_token_outside_the_vocabulary_does_no_harm() -> None:
    """Some published Llama configs say -1."""
    model = tiny.model("llama")
    model.config.pad_token_id = -1
    lm = wrap(model)
    assert tiny.gap(lm(ROWS)["logits"][1, :3], tiny.lm("llama")([ROWS[1]])["logits"][0]) < 1e-4


def test_roberta_s_context_leaves_room_for_its_position_offset() -> None:
    lm = tiny.lm("roberta")
    config = lm.model.config
    # positions are numbered from there
    longest = config.max_position_embeddings - config.pad_token_id - 1
    assert lm([[3] * longest])["logits"].shape[1] == longest
    with pytest.raises(InputError, match=f"context is {longest}"):
        lm.batch([[3] * (longest + 1)])
