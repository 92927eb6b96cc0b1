"""Scores against plain Transformers, row by row; ties, normalisation, and what cannot share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

import stratoscope
from stratoscope.benchmarks import Item, _shared, likelihood
from stratoscope.editing import clamp
from stratoscope.engine.intervene import add, intervene
from stratoscope.errors import InputError, SiteError
from stratoscope.models.lm import LM

WORDS = [f"w{i}" for i in range(40)]
ITEMS = [
    Item("w1 w2 w3", ("w4", "w5", "w6 w7"), 0, "a", "one"),
    Item("w9", ("w8 w1 w3", "w8 w1", "w8 w2 w3 w4"), 1, "a", "alike"),
    Item("", ("w3 w4 w5 w6", "w3 w4 w7 w6"), 0, "b", "whole texts"),
    Item("w1 w2 w3 w1 w2 w3 w5 w8 w9", ("w1", "w2"), 1, "b", "single"),
    Item("w7 w7", ("w1 w1", "w2 w3 w4 w9 w9"), 0, "b", "different"),
]


def tokenizer() -> Any:
    whole = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<s>", *WORDS])}))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", pad_token="<s>")


SIZES = {"vocab_size": 41, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ROPE = {  # other angles above four tokens
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 4,
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
}
MODELS: dict[str, Any] = {
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=41,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
        )
    ),
    "bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=41, hidden_size=32, n_layer=2, n_head=4, bos_token_id=0)
    ),
    "mistral": lambda: hf.MistralForCausalLM(
        hf.MistralConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, sliding_window=4)
    ),
    "longrope": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**SIZES, intermediate_size=48, rope_parameters=ROPE.copy())
    ),
    "mamba": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=41, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
}
SHARES = {"llama", "gpt2", "bloom"}


def subject(name: str) -> LM:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))  # else all choices are nearly alike
    return stratoscope.wrap(model, tokenizer())


@torch.no_grad()
def by_hand(lm: LM, item: Item) -> list[float]:
    """Plain Transformers: one row at a time."""
    found = []
    for choice in item.choices:
        context = lm.tokenizer(item.context or "<s>")["input_ids"]
        ids = context + lm.tokenizer(choice)["input_ids"]
        said = lm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(said[i - 1, ids[i]].item() for i in range(len(context), len(ids))))
    return found


@pytest.mark.parametrize("size", [4096, 1])
@pytest.mark.parametrize("name", MODELS)
def test_log_likelihoods_are_plain_ones(name: str, size: int) -> None:
    """Whatever is shared and however many run together."""
    lm = subject(name)
    found = likelihood.score(lm, ITEMS, batch_tokens=size)
    for number, item in enumerate(ITEMS):
        row = found["logprob"].to_numpy()[number]
        assert row[: len(item.choices)] == pytest.approx(by_hand(lm, item), abs=1e-5)
        assert np.isnan(row[len(item.choices) :]).all()
    assert found.attrs["shared_prefix"] == str(name in SHARES)
    naive = likelihood.score(lm, ITEMS, shared_prefix=False)
    np.testing.assert_allclose(found["logprob"], naive["logprob"], atol=1e-5)


def test_beginnings_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tokens pass through the model than rows hold."""
    lm = subject("llama")
    passed: list[int] = []
    groups = [likelihood._choices(lm, item) for item in ITEMS]
    hook = lm.model.register_forward_pre_hook(
        lambda _, args, kwargs: passed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    _shared.shared(lm, groups[3:4], 4096)
    hook.remove()
    assert passed == [9]  # two single tokens after nine: no second pass
    assert [_shared.common(group) for group in groups] == [3, 2, 3, 9, 2]


def test_right_margin_and_normalisation() -> None:
    lm = subject("llama")
    found = likelihood.score(lm, ITEMS)
    for number, item in enumerate(ITEMS):
        scores = by_hand(lm, item)
        best = max(range(len(scores)), key=scores.__getitem__)
        assert int(found["predicted"][number]) == best
        assert float(found["right"][number]) == float(best == item.gold)
        other = max(s for n, s in enumerate(scores) if n != item.gold)
        assert float(found["margin"][number]) == pytest.approx(scores[item.gold] - other, abs=1e-5)
    tokens = likelihood.score(lm, ITEMS, normalise="tokens")["score"]
    letters = likelihood.score(lm, ITEMS, normalise="characters")["score"]
    blind = likelihood.score(lm, ITEMS, normalise="blind")["score"]
    assert float(tokens[0, 2]) == pytest.approx(by_hand(lm, ITEMS[0])[2] / 2, abs=1e-5)
    assert float(letters[0, 2]) == pytest.approx(by_hand(lm, ITEMS[0])[2] / 5, abs=1e-5)
    bare = by_hand(lm, Item("", ITEMS[0].choices, 0))
    assert float(blind[0, 2]) == pytest.approx(by_hand(lm, ITEMS[0])[2] - bare[2], abs=1e-5)


def test_inside_an_edit_the_changed_model_is_asked() -> None:
    lm = subject("llama")
    plain = likelihood.score(lm, ITEMS)["logprob"]
    with clamp.edit(lm, [(1, 3)], value=5.0):
        inside = likelihood.score(lm, ITEMS)
        assert inside["logprob"][0, 0] == pytest.approx(by_hand(lm, ITEMS[0])[0], abs=1e-5)
    assert float(abs(inside["logprob"] - plain).max()) > 1e-3
    np.testing.assert_array_equal(likelihood.score(lm, ITEMS)["logprob"], plain)


def test_what_is_refused() -> None:
    lm = subject("llama")
    with pytest.raises(InputError, match="benchmark items is needed, got list"):
        likelihood.score(lm, ["w1 w2"])
    with pytest.raises(InputError, match="choose one of sum"):
        likelihood.score(lm, ITEMS, normalise="mean")
    with pytest.raises(InputError, match="without a tokenizer"):
        likelihood.score(stratoscope.wrap(lm.model), ITEMS)
    bert = hf.BertModel(hf.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(SiteError, match="does not predict the next token"):
        likelihood.score(stratoscope.wrap(bert.eval(), tokenizer()), ITEMS)
    for fields, words in (
        (("w1", ("w2",), 0), "at least two"),
        (("w1", ("w2", "w2"), 0), "all different"),
        (("w1", ("w2", ""), 0), "empty choice"),
        (("w1", ("w2", "w3"), 2), "gold 2"),
    ):
        with pytest.raises(InputError, match=words):
            Item(*fields)
    assert math.isfinite(float(likelihood.score(lm, ITEMS)["margin"][0]))


def test_no_beginning_is_shared_where_padding_would_count_in_the_window() -> None:
    """The longest row has ten tokens: longer than this window, not twice as long."""
    config = hf.MistralConfig(
        **SIZES, intermediate_size=48, num_key_value_heads=2, sliding_window=6
    )
    lm = stratoscope.wrap(hf.MistralForCausalLM(config).eval(), tokenizer())
    assert likelihood.score(lm, ITEMS).attrs["shared_prefix"] == "False"


def test_no_beginning_is_shared_inside_a_change() -> None:
    """One that names a position would act there in each part of a row."""
    lm = subject("llama")
    with intervene(lm, add("layers.0.resid_post", torch.ones(32), positions=-1)):
        found = likelihood.score(lm, ITEMS)
        whole = likelihood.score(lm, ITEMS, shared_prefix=False)
    assert found.attrs["shared_prefix"] == "False"
    assert np.allclose(found.logprob, whole.logprob, atol=1e-5, equal_nan=True)


def test_no_pass_holds_more_tokens_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, sizes, forward = subject("llama"), [], LM.__call__

    def counted(lm: LM, inputs: Any, *rest: Any, **options: Any) -> Any:
        sizes.append(len(inputs) * max(map(len, inputs)))
        return forward(lm, inputs, *rest, **options)

    monkeypatch.setattr(LM, "__call__", counted)
    likelihood.score(lm, ITEMS, shared_prefix=False, batch_tokens=24)
    assert len(sizes) > 1
    assert max(sizes) <= 24
    assert max(sizes) > 12  # and they are filled


def test_a_beginning_on_the_other_side_of_longrope_s_length_is_not_shared() -> None:
    """The shortest and the longest item, on which sharing is tried, both would allow it."""
    lm = subject("longrope")
    texts = [("w1 w2 w3 w1 w2", 1), ("w1 w2 w3", 5), ("w1 w2 w3 w1 w2 w3 w5 w8 w9", 1)]
    items = [Item(text, ("w4 " * n, "w6 " * n), 0) for text, n in texts]
    found = likelihood.score(lm, items, batch_tokens=1)
    for number, item in enumerate(items):
        assert found["logprob"].to_numpy()[number] == pytest.approx(by_hand(lm, item), abs=1e-5)
