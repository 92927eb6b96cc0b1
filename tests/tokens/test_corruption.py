"""Corruption exchanges a word for one of its kind, and says so."""

from __future__ import annotations

import pytest

from stratoscope.engine.kinds import kind
from stratoscope.errors import InputError
from stratoscope.lab import planted
from stratoscope.models import wrap
from stratoscope.tokens import corruption, next_token
from support import tiny

EXAMPLE = {"measure": lambda case: {"answer": case.answer, "foil": case.foil}}
ONE_TOKEN = "by its next token"


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


NAMES = ["Finn", "Hana", "Omar", "Lena"]


MIXED = [*NAMES, "the", "of", "said", "went", "ate", "7", "8", "9", "كتاب", "باب", "قلم", "!"]


def _exchanged(lm: object, prompt: str, **options: object) -> list[tuple[int, str, str]]:
    found = corruption.measure(lm, prompt, answer="7", foil="8", **options)
    ids, clean = found["id"].values[0].tolist(), lm.batch(prompt).ids[0].tolist()
    return [(n, MIXED[a], MIXED[b]) for n, (a, b) in enumerate(zip(clean, ids)) if a != b]


@pytest.mark.parametrize(
    "prompt", ["Finn ate the كتاب", "كتاب said of Omar", "the Finn ! the Hana", "7 of the Omar"]
)
def test_a_word_is_exchanged_for_one_of_its_kind_and_never_the_last(prompt: str) -> None:
    lm = wrap(tiny.model("llama"), tiny.tokenizer(MIXED))
    last = len(prompt.split()) - 1
    for seed in range(4):
        for place, old, new in _exchanged(lm, prompt, seed=seed, draws=4):
            assert place < last
            assert old not in ("the", "of", "!")  # a content word, where there is one
            assert kind(old) == kind(new)
            assert new not in ("7", "8")


def test_what_a_chat_template_wrote_is_never_exchanged() -> None:
    tokenizer = tiny.tokenizer(["<s>", "</s>", "user", "assistant", *MIXED[:-4]])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>", "</s>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s> {% endfor %}"
        "{% if add_generation_prompt %}<s> assistant Finn{% endif %}"
    )
    lm = wrap(tiny.model("llama"), tokenizer)
    said = [{"role": "user", "content": "Hana ate Omar"}]
    prompt = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    words = prompt.split()
    for seed in range(6):
        found = corruption.measure(lm, prompt, answer="7", foil="8", seed=seed, draws=2)
        places = found["changed"].values[0].nonzero()[0].tolist()
        assert places
        assert {words[p] for p in places} <= {"Hana", "ate", "Omar"}


def test_a_prompt_without_an_exchangeable_word_is_refused() -> None:
    lm = wrap(tiny.model("llama"), tiny.tokenizer(MIXED))
    with pytest.raises(InputError, match="before the last"):
        corruption.measure(lm, "! ! Finn", answer="7", foil="8")
