"""The next token is what plain Hugging Face says."""

from __future__ import annotations

import pytest
import torch

from stratoscope.errors import InputError
from stratoscope.models import wrap
from stratoscope.tokens import next_token
from support import tiny

EXAMPLE = {"measure": lambda case: {"answer": case.answer, "foil": case.foil}}


def test_next_token_is_the_softmax_of_plain_hugging_face() -> None:
    lm = wrap(tiny.model("llama"))
    rows = tiny.inputs("llama")
    found = next_token.measure(lm, rows, top=4)
    for example, row in enumerate(rows):
        with torch.no_grad():
            expected = lm.model(torch.tensor([row])).logits[0, -1].softmax(-1).topk(4)
        torch.testing.assert_close(
            torch.tensor(found["probability"].values[example]),
            expected.values,
            rtol=1e-4,
            atol=1e-6,
        )
        assert found["token"].values[example].tolist() == [str(int(i)) for i in expected.indices]
        assert int(found["answer_id"][example]) == int(expected.indices[0])
        assert int(found["foil_id"][example]) == int(expected.indices[1])


def test_top_must_fit_the_vocabulary() -> None:
    with pytest.raises(InputError, match="choose 1 to 96"):
        next_token.measure(wrap(tiny.model("llama")), [[1, 2]], top=97)
