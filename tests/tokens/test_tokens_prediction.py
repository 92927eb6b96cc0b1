"""The next token against a plain softmax, and the automatic corrupt prompt against what it promises."""

from __future__ import annotations

import pytest
import torch

from models import tiny
from stratoscope.errors import InputError
from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.tokens import corruption, next_token


def test_next_token_is_the_softmax_of_plain_hugging_face() -> None:
    lm = wrap(tiny.model("llama"))
    rows = tiny.inputs("llama")
    found = next_token.measure(lm, rows, top=4)
    for example, row in enumerate(rows):
        with torch.no_grad():
            expected = lm.model(torch.tensor([row])).logits[0, -1].softmax(-1).topk(4)
        torch.testing.assert_close(
            torch.tensor(found["probability"].values[example]), expected.values, rtol=1e-4, atol=1e-6
        )
        assert found["token"].values[example].tolist() == [str(int(i)) for i in expected.indices]
        assert int(found["answer_id"][example]) == int(expected.indices[0])
        assert int(found["foil_id"][example]) == int(expected.indices[1])


def test_top_must_fit_the_vocabulary() -> None:
    with pytest.raises(InputError, match="choose 1 to 96"):
        next_token.measure(wrap(tiny.model("llama")), [[1, 2]], top=97)


@pytest.mark.parametrize("make", [planted.copy_head, planted.induction, planted.indirect_object])
def test_corruption_lowers_the_difference_and_says_what_it_changed(make: object) -> None:
    p = make()  # type: ignore[operator]
    lm = wrap(p.model, p.tokenizer)
    words = {"answer": p.answer, "foil": p.foil}
    found = corruption.measure(lm, p.clean, **words)
    ids, clean = found["id"].values[0], lm.batch(p.clean).ids[0].numpy()
    assert ids.shape == clean.shape
    assert (found["changed"].values[0] == (ids != clean)).all()
    assert 1 <= int(found["changed"].sum()) <= 3
    assert float(found["corrupt_difference"][0]) < float(found["clean_difference"][0])
    again = next_token.measure(lm, [ids.tolist()], **words)["logit_difference"]
    assert float(again[0]) == pytest.approx(float(found["corrupt_difference"][0]), abs=1e-3)
    for token in {p.tokenizer.decode([int(i)]) for i in ids[ids != clean]}:
        assert repr(token.strip()) in str(found["how"].values[0])
    assert corruption.measure(lm, p.clean, **words).identical(found)
    assert p.tokenizer.convert_tokens_to_ids(p.answer) not in ids[ids != clean]
